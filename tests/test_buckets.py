"""The artifact store in a bucket, on two real S3 servers on loopback: one honours a conditional put, one ignores it.

Damage in the bucket, names that want out of the prefix, writers at once, a server that dies in the middle of a put."""
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain_nb.digest import digest
from retrain_nb.records import RetrainError, UsageError, VerificationError
from retrain_nb.stores.artifacts import Artifacts

BIN = Path(sys.executable).parent
MODEL = b'{"booster": "tree"}'
KEY, SECRET = "tester", secrets.token_hex(16)
HASTY = {"retries": {"max_attempts": 1}, "connect_timeout": 2, "read_timeout": 20} # The tests wait for nobody


def free_ports(n):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in held]
    for s in held: s.close()
    return ports


class Server:
    "One S3 server with its own folder and ports; `honours` says whether it knows If-None-Match"
    def __init__(self, kind, folder):
        self.kind, self.folder, self.ports, self.honours = kind, folder, free_ports(8), kind == "seaweedfs"
        (folder/"data").mkdir()
        identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write", "List"]}
        (folder/"s3.json").write_text(json.dumps({"identities": [identity]}))

    def command(self):
        a, b, c, d, e, f, g, h = self.ports
        if self.kind == "rclone":
            return ["rclone", "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{g}", "--auth-key", f"{KEY},{SECRET}", self.folder/"data"]
        return ["weed", "server", f"-dir={self.folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-s3.iam=false", "-s3.autoCreateBucket=false", "-master.telemetry=false",
                f"-master.port={a}", f"-master.port.grpc={b}", f"-volume.port={c}", f"-volume.port.grpc={d}", f"-filer.port={e}", f"-filer.port.grpc={f}",
                f"-s3.port={g}", f"-s3.port.grpc={h}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={self.folder}/s3.json",
                "-master.volumeSizeLimitMB=64", "-volume.max=8", "-volume.minFreeSpace=0",
                f"-filer.localSocket={self.folder}/filer.sock", f"-s3.localSocket={self.folder}/s3.sock"]

    def start(self):
        name, *rest = self.command()
        with (self.folder/"log").open("a") as log:
            self.process = subprocess.Popen([BIN/name, *rest], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        until = time.monotonic() + 60
        while True:
            try:
                fs = self.raw()
                if not fs.exists("bucket"): fs.mkdir("bucket")
                return fs.pipe_file("bucket/ready", b"yes")
            except Exception:
                if time.monotonic() > until or self.process.poll() is not None: raise
                time.sleep(.2)

    def stop(self):
        with suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGKILL) # Asked politely, one of the two takes 15 s
        self.process.wait(20)
        for port in self.ports: # It leaves its sockets where no setting can move them
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"): left.unlink()

    def options(self, port=None):
        return {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port or self.ports[6]}", "config_kwargs": HASTY,
                "client_kwargs": {"region_name": "us-east-1"}, "skip_instance_cache": True}

    def raw(self):
        "The bucket without any of our code"
        import s3fs
        return s3fs.S3FileSystem(**self.options())

    def store(self, prefix="models", **options): return Artifacts(f"s3://bucket/{prefix}", **{**self.options(), **options})


@contextmanager
def serving(kind, folder):
    server = Server(kind, folder)
    try:
        server.start()
        yield server
    finally: server.stop()


@pytest.fixture(scope="module", params=["seaweedfs", "rclone"])
def server(request, tmp_path_factory):
    with serving(request.param, tmp_path_factory.mktemp(request.param)) as running: yield running


def test_what_goes_into_a_bucket_comes_out(server):
    store = server.store("whole")
    names = [store.put(data, "record") for data in (MODEL, b"{}", b'{"x": "' + b"0"*3_000_000 + b'"}')]
    assert store.put(MODEL, "model") == names[0] == digest(MODEL)
    assert store.digests() == server.store("whole").digests() == sorted(names)
    assert [store.size(n) for n in names] == [19, 2, 3_000_009] and all(map(store.has, names))
    assert store.get(names[0]) == MODEL and len(store.get(names[2])) == 3_000_009
    assert server.raw().find("bucket/whole") == sorted(f"bucket/whole/{n}" for n in names)
    assert [store.remove(names[0]), store.remove(names[0])] == [True, False]
    assert not store.has(names[0]) and names[0] not in store.digests()
    for ask in (store.get, store.size):
        with pytest.raises(VerificationError, match=f"s3://bucket/whole/.*{names[0]} is missing.*Restore"): ask(names[0])


def test_what_others_wrote_or_removed_since_a_listing_is_seen(server):
    store, fs = server.store("shared"), server.raw()
    name, late, gone = store.put(MODEL, "record"), digest(b"late"), store.put(b"[]", "record")
    assert store.digests() == sorted([name, gone]) and store.has(gone) and not store.has(late) # Now there is a listing to remember
    fs.pipe_file(f"bucket/shared/{late}", b"late")
    fs.rm_file(f"bucket/shared/{gone}")
    assert store.has(late) and store.size(late) == 4 and not store.has(gone) and store.written(gone) is None
    assert store.digests() == sorted([name, late]) and store.objects() == {name: len(MODEL), late: 4}


def test_the_two_servers_differ_in_what_they_make_of_a_condition(server):
    "Else the tests below would not reach both ways"
    fs = server.raw()
    fs.pipe_file("bucket/condition", b"first")
    if server.honours:
        with pytest.raises(OSError): fs.pipe_file("bucket/condition", b"second", mode="create")
    else: fs.pipe_file("bucket/condition", b"second", mode="create")
    assert fs.cat_file("bucket/condition") == (b"first" if server.honours else b"second")


def test_damage_in_the_bucket_is_refused_and_kept_as_evidence(server):
    store, fs = server.store("damage"), server.raw()
    name = store.put(MODEL, "model")
    for i in range(len(MODEL)):
        damaged = MODEL[:i] + bytes([MODEL[i] ^ 1]) + MODEL[i+1:] if i else MODEL[:-1]
        fs.pipe_file(f"bucket/damage/{name}", damaged)
        with pytest.raises(VerificationError, match=f"{name} was changed.*recorded is {name}"): store.get(name)
        with pytest.raises(VerificationError, match="as evidence"): store.put(MODEL, "model")
        assert fs.cat_file(f"bucket/damage/{name}") == damaged


def test_what_appears_between_look_and_put_is_not_replaced_where_the_server_honours_the_condition(server):
    if not server.honours: return                         # Then the last writer wins; under one digest both have the same bytes
    store, name = server.store("between"), digest(MODEL)
    key, looks = f"bucket/between/{name}", []
    look = store.shelf._peek
    def peek(wanted):
        looks.append(wanted)
        if len(looks) > 1: return look(wanted)
        server.raw().pipe_file(key, b"somebody else's")   # After our look, before our put
    store.shelf._peek = peek
    with pytest.raises(VerificationError, match="as evidence"): store.put(MODEL, "model")
    assert server.raw().cat_file(key) == b"somebody else's"


def test_8_writers_of_one_artifact_leave_one_whole_object(server):
    data = b'{"x": "' + b"0"*400_000 + b'"}'
    with ThreadPoolExecutor(8) as pool: names = set(pool.map(lambda _: server.store("writers").put(data, "record"), range(8)))
    assert names == {digest(data)} == set(server.store("writers").digests())
    assert server.store("writers").get(digest(data)) == data


def test_neighbours_and_strangers_are_not_listed(server):
    store, fs, name = server.store("near"), server.raw(), digest(MODEL)
    assert store.digests() == []
    for key in (f"near2/{name}", f"near/zz/{name}", "near/notes.txt", f"near/{name[:12]}", f"near/{digest(b'')}/{name}"):
        fs.pipe_file(f"bucket/{key}", MODEL)
    assert store.digests() == [] and not store.has(name)


@given(st.one_of(st.text(), st.text(alphabet="./\\0af%?#", max_size=70), st.binary(), st.just("A"*64), st.just("0"*64 + "\n"), st.none()))
def test_no_crafted_name_reaches_a_key(text):
    store = Artifacts("s3://bucket/prefix", endpoint_url="http://127.0.0.1:9") # Nobody listens: a request would be another error
    for ask in (store.get, store.has, store.size, store.remove, store.locate, store.path):
        with pytest.raises(UsageError, match="is no digest"): ask(text)


@pytest.mark.parametrize(("url", "says"), [
    ("file:///srv/x", "is a folder of this machine"), ("simplecache::s3://bucket/x", "is a chain"), ("s3://", "names no place"),
    ("s3://bucket/../other", "names no place"), ("s3://key:secret@bucket/x", "holds a password")])
def test_a_url_that_cannot_keep_the_promises_is_refused(url, says):
    with pytest.raises(UsageError, match=says) as error: Artifacts(url)
    assert "secret" not in str(error.value)


def test_a_protocol_nobody_knows_a_missing_bucket_and_a_wrong_key_are_named(server):
    with pytest.raises(RetrainError, match="could not write nosuch://x/.*Protocol not known"): Artifacts("nosuch://x/y").put(MODEL, "model")
    with pytest.raises(RetrainError, match="could not write s3://nobucket/.*that the bucket is there"):
        Artifacts("s3://nobucket/x", **server.options()).put(MODEL, "model")
    with pytest.raises(RetrainError, match="this user has the right"): server.store("wrong", secret="not the secret").put(MODEL, "model")


@contextmanager
def cutting(server, after):
    "A relay to the server that passes `after` bytes of what clients send, then kills the server"
    listener, seen = socket.create_server(("127.0.0.1", 0)), [0]
    def pump(source, sink, counts):
        with suppress(OSError):
            while data := source.recv(65536):
                if counts and (seen := seen_more(len(data))) > after:
                    sink.sendall(data[:max(0, len(data) - (seen - after))])
                    server.stop()
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError): end.shutdown(socket.SHUT_RDWR)
    def seen_more(n):
        seen[0] += n
        return seen[0]
    def accept():
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                try: far = socket.create_connection(("127.0.0.1", server.ports[6]), timeout=5)
                except OSError:
                    client.close()
                    continue
                for ends in ((client, far, True), (far, client, False)): threading.Thread(target=pump, args=ends, daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    try: yield listener.getsockname()[1], seen
    finally: listener.close()


def test_a_server_that_dies_in_the_middle_of_a_put_is_named_and_a_later_put_works(tmp_path):
    data = b'{"x": "' + os.urandom(2_000_000).hex().encode() + b'"}'
    with serving("rclone", tmp_path) as server:          # The other takes half a minute to start again
        kept = server.store().put(MODEL, "model")
        with cutting(server, after=1_000_000) as (port, seen):
            with pytest.raises(RetrainError, match=rf"could not write s3://bucket/models/.*{digest(data)}: .*Check that the server answers") as error:
                server.store(**server.options(port)).put(data, "record")
            assert seen[0] > 1_000_000 and error.value.exit_code == 1
        for ask in (server.store().get, server.store().has):
            with pytest.raises(RetrainError, match="Check that the server answers"): ask(kept) # Down is not the same as absent
        server.start()
        assert server.store().put(data, "record") == digest(data)
        assert server.store().get(digest(data)) == data and server.store().get(kept) == MODEL
        assert server.store().digests() == sorted([kept, digest(data)])


def test_a_workbench_keeps_its_artifacts_where_the_settings_say(tmp_path):
    place = tmp_path/"server"
    place.mkdir()
    with serving("rclone", place) as server:
        environment = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
                       "AWS_ENDPOINT_URL": server.options()["endpoint_url"]}
        def say(*words):
            done = subprocess.run([BIN/"retrain-nb", *words, "--root", tmp_path/"book"], capture_output=True, text=True, env=environment)
            assert done.returncode in (0, 4), done.stderr + done.stdout # What the gates think of the toy is not at issue
            return json.loads(done.stdout)
        subprocess.run([BIN/"retrain-nb", "init", tmp_path/"book", "--demo", "toy"], check=True, capture_output=True)
        path = tmp_path/"book"/"settings.ini"
        text = re.sub(r"^\[workbench\]$", "[workbench]\nartifacts = s3://bucket/book", path.read_text(), flags=re.MULTILINE)
        path.write_text(text.replace("mode = offline", "mode = disabled") + "\n[run]\nprofile_rows = 0\n")
        run = say("show", say("cycle", "--now", "2024-04-01", "--json")["run"], "--json")
        assert run["state"] == "ok" and not list((tmp_path/"book"/".retrain"/"artifacts").rglob("*"))
        assert json.loads(server.store("book").get(run["model"]))["booster"].startswith("tree\n")
