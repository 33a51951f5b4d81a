"Faults of the artifact store and of the durable write below it: full disks, files in the way, damage, hostile names, races"
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain_nb.digest import digest
from retrain_nb.durable import remove_file, safe_name, write_atomic, write_once
from retrain_nb.records import RetrainError, UsageError, VerificationError
from retrain_nb.stores.artifacts import KINDS, Artifacts

MODEL = b'{"booster": "tree"}'


def every_file(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_every_kind_of_the_list_goes_in_and_comes_out(tmp_path):
    store = Artifacts(tmp_path)
    assert "pickle" not in KINDS
    for kind in KINDS:
        assert store.get(store.put(MODEL + kind.encode(), kind)) == MODEL + kind.encode()


def test_any_of_19_bytes_changed_is_found(tmp_path):
    store = Artifacts(tmp_path)
    name = store.put(MODEL, "model")
    for i in range(len(MODEL)):
        store.path(name).write_bytes(MODEL[:i] + bytes([MODEL[i] ^ 1]) + MODEL[i+1:])
        with pytest.raises(VerificationError, match=f"{name}.*was changed.*recorded is {name}"): store.get(name)
    store.path(name).write_bytes(MODEL[:-1])
    with pytest.raises(VerificationError): store.get(name)
    store.path(name).unlink()
    assert not store.has(name)
    with pytest.raises(VerificationError, match="is missing"): store.get(name)


@given(st.one_of(st.text(), st.text(alphabet="./\\0af%", max_size=70), st.binary(), st.just("A"*64), st.just("0"*64 + "\n"), st.none()))
def test_no_crafted_name_reaches_a_path(text):
    store = Artifacts("/nowhere")
    for ask in (store.get, store.has, store.path, store.locate, store.size, store.remove):
        with pytest.raises(UsageError): ask(text)


@given(st.text(alphabet="ab.-_/\\ \n\0Z", max_size=70))
def test_a_safe_name_stays_in_its_folder(text):
    try: name = safe_name(text)
    except UsageError: return
    assert os.path.dirname(os.path.normpath(f"/store/{name}")) == "/store"


def test_16_writers_of_one_artifact_leave_one_whole_file(tmp_path):
    data = b'{"x": "' + b"0"*200_000 + b'"}'
    with ThreadPoolExecutor(16) as pool: names = set(pool.map(lambda _: Artifacts(tmp_path).put(data, "record"), range(16)))
    assert names == {digest(data)}
    assert every_file(tmp_path) == [digest(data)]
    assert Artifacts(tmp_path).get(digest(data)) == data


def test_what_a_killed_writer_left_is_neither_listed_nor_in_the_way(tmp_path):
    store, name = Artifacts(tmp_path), digest(MODEL)
    (store.path(name).parent/f".{name}.0123456789abcdef.tmp").write_bytes(MODEL[:5])
    assert store.digests() == []
    assert store.put(MODEL, "model") == name
    assert store.digests() == [name]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from retrain_nb.durable import write_atomic
from retrain_nb.records import RetrainError
from retrain_nb.stores.artifacts import Artifacts
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
large = b'{"x": "' + b"0"*50_000 + b'"}'
for write in (lambda: Artifacts(folder).put(large, "model"), lambda: write_atomic(folder/"index.html", b"n"*50_000)):
    try: write()
    except RetrainError as e: print(e.exit_code, e)
"""


def test_a_full_disk_leaves_nothing_half_written_and_the_former_file_as_it_was(tmp_path):
    kept = Artifacts(tmp_path).put(MODEL, "model")
    write_atomic(tmp_path/"index.html", b"one run")
    before = every_file(tmp_path)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    for line, size in zip(done.stdout.splitlines(), ("50,009 bytes", "50,000 bytes"), strict=True):
        assert line.startswith("1 no room for " + size) and str(tmp_path) in line and "Free some space" in line
    assert every_file(tmp_path) == before
    assert (tmp_path/"index.html").read_bytes() == b"one run"
    assert Artifacts(tmp_path).get(kept) == MODEL


def test_a_store_that_a_former_version_spread_over_folders_is_read_where_it_is(tmp_path):
    store, name = Artifacts(tmp_path), digest(MODEL)
    write_once(tmp_path/name[:2]/name, MODEL)
    assert (store.get(name), store.size(name), store.digests(), store.has(name)) == (MODEL, len(MODEL), [name], True)
    assert store.put(MODEL, "model") == name and every_file(tmp_path) == [f"{name[:2]}/{name}"] # Not twice
    other = store.put(b"{}", "record")
    assert store.digests() == sorted([name, other]) and every_file(tmp_path) == sorted([f"{name[:2]}/{name}", other])
    assert store.remove(name) and not store.has(name) and store.digests() == [other]


def test_without_nameless_files_the_bytes_wait_beside_the_target(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")                   # As on other systems; network file systems refuse it in the same words
    store = Artifacts(tmp_path)
    name = store.put(MODEL, "model")
    assert store.get(name) == MODEL and every_file(tmp_path) == [name]
    store.path(name).write_bytes(b"damaged")
    with pytest.raises(VerificationError): store.put(MODEL, "model")
    with ThreadPoolExecutor(8) as pool: assert set(pool.map(lambda _: Artifacts(tmp_path).put(b"{}", "record"), range(8))) == {digest(b"{}")}
    assert every_file(tmp_path) == sorted([name, digest(b"{}")])


KILLED = """
import sys
from retrain_nb.stores.artifacts import Artifacts
print(Artifacts(sys.argv[1]).put(b"{" + b" "*100_000 + b"}", "record"), flush=True)
"""
CALLS = {"openat": True, "write": False, "fsync": False, "linkat": False, "close": True} # Whether to count only those on the store


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_a_writer_killed_at_each_of_its_calls_leaves_the_artifact_whole_or_not_at_all(tmp_path):
    data, trials, there = b"{" + b" "*100_000 + b"}", 0, 0
    store = Artifacts(tmp_path)
    store.put(MODEL, "model")
    for call, ours in CALLS.items():
        for when in range(1, 9):
            store.remove(digest(data))
            only = ["-P", str(store.path(digest(data)).parent)] if ours else [] # Python itself opens and closes a hundred others
            inject = ["strace", "-f", "-qq", "-o", os.devnull, *only, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={when}"]
            done = subprocess.run([*inject, sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
            if done.returncode == 0: break                 # It came to its end before that call
            trials += 1
            assert done.returncode in (-9, 137), done.stderr
            assert store.digests() in ([digest(MODEL)], sorted([digest(MODEL), digest(data)]))
            if store.has(digest(data)):
                there += 1
                assert store.get(digest(data)) == data     # And a put later finds it
            assert store.put(data, "record") == digest(data)
            assert every_file(tmp_path) == store.digests() # Nothing else was left
    print(f"{trials} kills: the artifact was there after {there}")
    assert trials >= 8 and 0 < there < trials


STEPS = {"write_once(p/'a'/'b'/'x', b'1')": ["mkdir a", "fsync .", "mkdir a/b", "fsync a", "fsync a/b/*", "name a/b/x", "fsync a/b"],
         "write_once(p/'x', b'1')": ["fsync *", "name x", "fsync ."],
         "os.mkdir(p/'a'); (p/'a'/'x').write_bytes(b'1'); write_once(p/'a'/'x', b'1')": ["mkdir a", "fsync a"], # Whoever wrote it may have been killed before
         "write_atomic(p/'x', b'1')": ["fsync *", "name x", "fsync ."],
         "(p/'x').write_bytes(b'1'); remove_file(p/'x')": ["unlink x", "fsync ."]}


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("code", STEPS)
def test_bytes_are_durable_before_their_name_and_every_name_before_it_counts(tmp_path, code, nameless):
    log, root = tmp_path/"log", tmp_path/"store"
    root.mkdir()
    setup = "import os; from pathlib import Path; from retrain_nb.durable import *; p = Path(os.sys.argv[1])" + ("" if nameless else "; del os.O_TMPFILE")
    watch = "trace=mkdir,mkdirat,fsync,fdatasync,link,linkat,rename,renameat,renameat2,unlink,unlinkat"
    subprocess.run(["strace", "-f", "-qq", "-y", "-o", log, "-e", watch, sys.executable, "-c", f"{setup}\n{code}", root], check=True)
    told = []
    for call, rest in re.findall(r"(\w+)\((.*)\) += \d", log.read_text()):
        if not (paths := re.findall(rf"{re.escape(str(root))}(?:/([^\"<>]*))?[\"<>]", rest)): continue
        path, kind = paths[-1] or ".", "name" if call[:4] in ("link", "rena") else call.removesuffix("at")
        if kind == "unlink" and path.endswith(".tmp"): continue # What waited beside the target
        if kind == "fsync" and not (root/path).is_dir(): path = os.path.join(os.path.dirname(path), "*")
        told.append(f"{kind} {path}")
    assert told == STEPS[code]


DENIED = """
import os, sys
from retrain_nb.records import RetrainError
from retrain_nb.stores.artifacts import Artifacts
if os.geteuid() == 0: os.setuid(65534)                     # Root may write anywhere, so become somebody who may not
try: Artifacts(sys.argv[1]).put(b"{}", "model")
except RetrainError as e: print(e.exit_code, e)
"""


def test_a_read_only_folder_is_named_with_its_user_and_cure():
    folder = Path(tempfile.mkdtemp())                      # Not `tmp_path`, which others may not even enter
    folder.chmod(0o555)
    try:
        done = subprocess.run([sys.executable, "-c", DENIED, str(folder)], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"1 no permission to write {folder}/") and f"Let this user write to {folder}" in done.stdout
        assert f"as user {os.geteuid() or 65534}" in done.stdout
        assert every_file(folder) == []
    finally: folder.rmdir()


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path/"store").write_text("not a folder")
    with pytest.raises(RetrainError, match="a file is in the way"): Artifacts(tmp_path/"store").put(MODEL, "model")
    assert every_file(tmp_path) == ["store"]


def test_write_once_never_touches_other_bytes(tmp_path):
    (tmp_path/"a").write_bytes(b"evidence")
    with pytest.raises(VerificationError): write_once(tmp_path/"a", b"something else")
    assert (tmp_path/"a").read_bytes() == b"evidence"


def test_a_writer_and_a_collector_of_the_same_file_never_meet_in_an_error(tmp_path):
    path, until = tmp_path/"a"/"x", time.monotonic() + 1

    def write():
        while time.monotonic() < until: write_once(path, b"the same bytes")

    def remove():
        while time.monotonic() < until: remove_file(path)
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(write), pool.submit(write), pool.submit(remove)]: done.result()


def test_what_is_no_file_where_one_should_be_is_named_and_stays(tmp_path):
    (tmp_path/"folder").mkdir()
    (tmp_path/"link").symlink_to(tmp_path/"nowhere")
    for name in ("folder", "link"):
        with pytest.raises(VerificationError, match=f"{name} is there and cannot be read"): write_once(tmp_path/name, b"x")
    assert (tmp_path/"folder").is_dir() and (tmp_path/"link").is_symlink() and not (tmp_path/"nowhere").exists()
