"OpenLineage events as the specification's own client has them; receivers that are down, slow, broken, far away or gone; senders that are killed"
import enum
import importlib
import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import typing
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import attr
import jsonschema
import pytest
from openlineage.client import event_v2, generated
from openlineage.client.generated import base
from openlineage.client.serde import Serde

from retrain_nb.digest import canonical, digest
from retrain_nb.faces.cli import main
from retrain_nb.loop import deliver as room
from retrain_nb.loop.deliver import deliver, event, refused, waiting
from retrain_nb.records import UsageError
from retrain_nb.services import openlineage
from retrain_nb.services.openlineage import RefusedError, UndeliveredError, post, run_uuid
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.stores import catalog, database, ledger

ROOT, FORMAT1 = Path(__file__).resolve().parent.parent, Path(__file__).parent/"fixtures"/"format1"
NOW = datetime(2024, 3, 1, 3, tzinfo=UTC)


def with_lineage(book, **lines):
    return replace(book, settings=book.settings.model_copy(update={"lineage": book.settings.lineage.model_copy(update=lines)}))


@pytest.fixture
def history(tmp_path):
    "Three cycles that really ran: a first champion, a refresh, and a run that its contract stopped"
    furnish(tmp_path/"book", "toy")
    shutil.copytree(FORMAT1, tmp_path/"book"/".retrain")
    return open_workbench(tmp_path/"book")


@pytest.fixture
def book(tmp_path):
    furnish(tmp_path/"book", "toy")
    return open_workbench(tmp_path/"book")


def night(book, n, state="ok", **ended): # A run in the ledger that nobody has run: three events
    run, model = f"retrain-{n}", digest(f"model {n}")
    recipe = book.artifacts.put(canonical({"view": "parcels", "trainer": "lightgbm 4.7.0", "commit": "c"*40}), "recipe")
    planned = {"run": run, "page": "retrain", "recipe": recipe, "as_of": "2024-03-01T00:00:00Z", "cycle": f"cycle-{n}", "parameters": {}, "code": digest("page")}
    book.append("run.planned", f"{run}:planned", planned, NOW)
    book.append("run.started", f"{run}:started", {"run": run, "attempt": 1}, NOW)
    book.append("run.ended", f"{run}:ended", {"run": run, "state": state, "verdict": None, "metrics": {}, "model": model, **ended}, NOW)
    book.append("champion.set", f"cycle-{n}:champion", {"run": run, "model": model, "decision": "refresh", "by": "jane"}, NOW)


def outbox(book): return [row["seq"] for row in book.ask(catalog.dump)["outbox"]]


def told(book): return [event(book, seq) for seq in sorted(outbox(book))]


# --- What the specification's client says ---

for _found in pkgutil.iter_modules(generated.__path__): importlib.import_module(f"{generated.__name__}.{_found.name}")
FACETS = {c._get_schema(): c for m in list(sys.modules.values()) if m.__name__.startswith(generated.__name__)
          for c in vars(m).values() if isinstance(c, type) and issubclass(c, base.BaseFacet)}
FORMATS = {"runId": "uuid", "eventTime": "date-time", "nominalStartTime": "date-time", "url": "uri", "producer": "uri", "schemaURL": "uri",
           "_producer": "uri", "_schemaURL": "uri"}
SIMPLE = {str: "string", int: "integer", bool: "boolean", float: "number"}

def schema_of(hint, defs, name=""): # -> the JSON schema of what the client's class or annotation takes; classes go into `defs`
    if type(hint) is types.UnionType or typing.get_origin(hint) is typing.Union:
        return schema_of(next(a for a in typing.get_args(hint) if a is not type(None)), defs, name)
    if typing.get_origin(hint) is list: return {"type": "array", "items": schema_of(typing.get_args(hint)[0], defs)}
    if typing.get_origin(hint) is dict: return {"type": "object"} # Facets: each is held to its own schema
    if hint in SIMPLE: return {"type": SIMPLE[hint], **({"format": FORMATS[name]} if name in FORMATS else {})}
    if issubclass(hint, enum.Enum): return {"enum": [m.value for m in hint]}
    key = f"{hint.__module__}.{hint.__name__}"
    if key not in defs:
        defs[key] = {}
        fields = attr.fields(attr.resolve_types(hint))
        needed = [f.name for f in fields if f.default is attr.NOTHING or f.name in ("producer", "schemaURL", "_producer", "_schemaURL")]
        defs[key] |= {"type": "object", "properties": {f.name: schema_of(f.type, defs, f.name) for f in fields}, "required": needed,
                      "additionalProperties": hint is base.RunFacet} # The schema of our own facets, which add to it
    return {"$ref": f"#/$defs/{key}"}


def check(what, hint):
    defs = {}
    jsonschema.Draft202012Validator({**schema_of(hint, defs), "$defs": defs}, format_checker=jsonschema.FormatChecker()).validate(what)


def facets_of(e):
    yield from e["run"]["facets"].items()
    yield from e["job"]["facets"].items()
    for d in (*e["inputs"], *e["outputs"]):
        yield from d["facets"].items()
        yield from d.get("inputFacets", {}).items()
    for d in e["run"]["facets"].get("parent", {}).values():
        if isinstance(d, dict): assert not d.get("facets")


def conforms(e): # As JSON, facet by facet, and made again by the client's own classes
    check(e, base.RunEvent)
    for name, said in facets_of(e):
        assert said["_schemaURL"] in FACETS, name
        assert (FACETS[said["_schemaURL"]] is base.RunFacet) == name.startswith("retrainNb_"), name
        check(said, FACETS[said["_schemaURL"]])
    plain = lambda kind, d: kind(**{k: v for k, v in d.items()})
    made = event_v2.RunEvent(eventType=event_v2.RunState(e["eventType"]), eventTime=e["eventTime"], producer=e["producer"], run=plain(event_v2.Run, e["run"]),
                             job=plain(event_v2.Job, e["job"]), inputs=[plain(event_v2.InputDataset, d) for d in e["inputs"]],
                             outputs=[plain(event_v2.OutputDataset, d) for d in e["outputs"]])
    theirs = Serde.to_dict(made)
    for d in theirs["outputs"]: d.pop("outputFacets")
    assert theirs == e


def test_recorded_runs_become_events_that_fit_the_client(history):
    events = told(history)
    assert [e["eventType"] for e in events] == ["START", "COMPLETE", "OTHER"]*2 + ["START", "FAIL", "OTHER"]
    for e in events: conforms(e)
    complete = events[4]
    assert complete["inputs"][0]["name"] == "retrain_nb.demo.toy:rows" and complete["job"]["namespace"] == "parcels"
    assert len(complete["inputs"][0]["facets"]["schema"]["fields"]) == 9
    facets = complete["run"]["facets"]
    assert set(facets) == {"nominalTime", "parent", "processing_engine", "retrainNb_recipe", "retrainNb_metrics", "retrainNb_verdict", "retrainNb_entry"}
    assert [(m["name"], m["direction"]) for m in facets["retrainNb_metrics"]["metrics"]] == [("auc", "higher"), ("brier", "lower"), ("log_loss", "lower")]
    assert all(m["low"] < m["value"] < m["high"] for m in facets["retrainNb_metrics"]["metrics"])
    assert len(facets["retrainNb_verdict"]["checks"]) > 10
    row = history.ask(catalog.run, "retrain-d3f4002856a2")
    assert complete["outputs"][0]["facets"]["version"]["datasetVersion"] == row["model"]
    assert events[5]["run"]["facets"]["retrainNb_decision"]["champion"] == row["model"]
    assert facets["parent"]["run"]["runId"] == run_uuid("parcels", row["cycle"])
    assert "freshness" in [c["name"] for c in events[7]["run"]["facets"]["retrainNb_verdict"]["checks"] if c["outcome"] == "FAIL"]
    leaves = {e.leaf for e in history.ask(ledger.entries)}
    assert {e["run"]["facets"]["retrainNb_entry"]["leaf"] for e in events} < leaves and len({e["run"]["runId"] for e in events}) == 3


@pytest.mark.parametrize("state, type", [("ok", "COMPLETE"), ("failed", "FAIL"), ("killed", "ABORT"), ("lost", "ABORT")])
def test_however_a_run_ended_there_is_one_start_and_one_end(book, state, type):
    night(book, 1, state, cause="x raised KeyError: 'Jane Doe'", model="" if state != "ok" else digest("model"))
    events = told(book)
    for e in events: conforms(e)
    assert [e["eventType"] for e in events] == ["START", type, "OTHER"]
    assert events[0]["job"]["facets"]["sourceCodeLocation"]["version"] == "c"*40
    assert b"Jane" not in canonical(events[1])
    assert ("errorMessage" in events[1]["run"]["facets"]) == (state != "ok") == (not events[1]["outputs"])


@pytest.mark.parametrize("spoil", [
    lambda e: e.update(eventType="DONE"), lambda e: e.update(eventTime="yesterday"), lambda e: e.pop("producer"), lambda e: e["run"].update(runId="retrain-1"),
    lambda e: e.update(extra=1), lambda e: e["job"].pop("namespace"), lambda e: e["run"]["facets"]["nominalTime"].pop("nominalStartTime"),
    lambda e: e["run"]["facets"]["nominalTime"].update(nominalstart="x"), lambda e: e["run"]["facets"]["retrainNb_entry"].pop("_producer"),
    lambda e: e["job"]["facets"]["sourceCodeLocation"].update(url="no address"), lambda e: e["run"]["facets"]["parent"].update(run={}),
    lambda e: e["run"]["facets"]["nominalTime"].update(_schemaURL="https://openlineage.io/spec/facets/9-9-9/X.json")])
def test_an_event_that_does_not_fit_is_found(book, spoil):
    night(book, 1)
    e = told(book)[1]
    conforms(e)
    spoil(e)
    with pytest.raises((jsonschema.ValidationError, AssertionError)): conforms(e)


# --- The same bytes, and nothing personal ---

def test_events_are_the_same_bytes_on_another_day_in_another_process_and_after_the_catalog_was_made_again(history):
    before = [canonical(e) for e in told(history)]
    code = ("import sys; from retrain_nb.digest import canonical; from retrain_nb.services.workbench import open_workbench; from retrain_nb.loop import deliver as d\n"
            "b = open_workbench(sys.argv[1]); print('\\n'.join(canonical(d.event(b, s)).decode() for s in b.ask(d.waiting)))")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code, str(history.root)], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.encode().splitlines() == before
    (history.root/"contract.toml").write_text((history.root/"contract.toml").read_text() + '\n[columns.driver]\nkind = "text"\ntag = "personal"\n')
    with history.engine.begin() as c: catalog.rebuild(c, ledger.entries(c))
    assert [canonical(e) for e in told(open_workbench(history.root))] == before


def test_no_row_no_person_and_no_tagged_column_is_told(tmp_path):
    furnish(tmp_path/"book", "toy")
    contract = tmp_path/"book"/"contract.toml"
    tagged = '\n[columns.parcel_id]\nkind = "text"\ntag = "personal"\n\n[columns.rain]\nkind = "number"\ntag = "forbidden"\n'
    contract.write_text(re.sub(r"\n\[columns\.(parcel_id|rain)\]\n(?:(?!\[).*\n)*", "\n", contract.read_text()) + tagged)
    book = open_workbench(tmp_path/"book")
    rows = book.freeze(NOW, NOW)
    given = {"snapshot": rows.digest, "settings": book.freeze_policy()}
    leaf = lambda name: {"name": name, "outcome": "FAIL", "reason": "3 of 9 rows hold none of the 2 known values; found `Jane Doe`", "parts": []}
    verdict = {"name": "contract", "outcome": "FAIL", "reason": "found `Jane Doe`", "parts": [leaf("parcel_id.categories"), leaf("rain.forbidden"), leaf("load.range")]}
    book.append("run.planned", "r:planned", {"run": "r", "page": "retrain", "recipe": "", "as_of": "2024-03-01T00:00:00Z", "cycle": "", "parameters": given}, NOW)
    for kind, more in (("run.started", {"host": "secrethost", "pid": 4711}), ("run.ended", {"state": "failed", "cause": "cell 3 raised ValueError: bad 'Jane Doe'", "verdict": verdict, "metrics": {}}),
                       ("champion.kept", {"verdict": verdict, "reason": "Jane Doe says so", "by": "jane"})):
        book.append(kind, f"r:{kind}", {"run": "r", **more}, NOW)
    events = told(book)
    for e in events: conforms(e)
    text = b"\n".join(canonical(e) for e in events).decode()
    frame = book.snapshots.read(rows.digest)
    assert events[0]["inputs"][0]["inputFacets"]["inputStatistics"]["rowCount"] == len(frame) and "load.range" in text and "(withheld).categories" in text
    secret = {"Jane", "jane", "parcel_id", "rain", "secrethost", "4711", str(tmp_path), *frame["parcel_id"].astype(str)}
    assert len(secret) > 1000 and [word for word in secret if word in text.replace("retrain", "")] == []


# --- Receivers ---

class Receiver:
    "A server on loopback that behaves as it is told, and counts"
    def __init__(self, *behaviour, port=0): # For each request in turn a status, or a function; the last goes on for ever
        self.behaviour, self.got, self.tokens, self.gone = list(behaviour), [], [], threading.Event()
        us = self
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                does = us.behaviour.pop(0) if len(us.behaviour) > 1 else us.behaviour[0]
                data = self.rfile.read(int(self.headers["Content-Length"]))
                us.tokens.append(self.headers["Authorization"])
                if callable(does): return does(self, us, data)
                if 200 <= does < 300: us.got.append(data)
                self.send_response(does)
                if does in (302, 307): self.send_header("Location", us.elsewhere)
                self.end_headers()
            do_GET = do_POST
            def log_message(self, *_): pass
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    def ids(self): return [json.loads(data)["run"]["facets"]["retrainNb_entry"]["leaf"] for data in self.got]
    def __enter__(self): return self
    def __exit__(self, *_):
        self.gone.set()
        self.server.shutdown()
        self.server.server_close()


def hang(handler, us, data): us.gone.wait(30)


def drip(handler, us, data): # One byte of a header at a time: each is in time for a socket that waits for bytes
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
    while not us.gone.wait(0.05):
        try: handler.wfile.write(b"x")
        except OSError: return


def nonsense(handler, us, data): handler.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_down_slow_broken_moved_then_up_everything_arrives_once_and_in_order(book):
    for n in (1, 2): night(book, n)
    all_of_them, port, said = [canonical(e) for e in told(book)], free_port(), []
    here = with_lineage(book, url=f"http://127.0.0.1:{port}")
    down = deliver(here, said.append)
    assert (down["sent"], down["waiting"]) == (0, 6) and "cannot be reached" in down["why"] and len(said) == 1 and "6 events wait" in said[0]
    with Receiver(200) as elsewhere, Receiver(201, 500, hang, 307, 302, nonsense, 404, 200, port=port) as receiver:
        receiver.elsewhere = elsewhere.url
        for why, sent, wait in (("answered 500", 1, 5), ("did not answer in", 0, 5), ("answered 307", 0, 5), ("answered 302", 0, 5), ("cannot be reached", 0, 5), ("answered 404", 0, 5)):
            found = deliver(here, seconds=0.5)
            assert (why in found["why"], found["sent"], found["waiting"]) == (True, sent, wait), found
        assert deliver(here) == {"channel": "openlineage", "sent": 5, "refused": 0, "waiting": 0, "why": ""}
        assert deliver(here)["sent"] == 0
        assert receiver.got == all_of_them and len(set(receiver.ids())) == 6 and not elsewhere.tokens
    files = {p.read_bytes() for p in (book.mirrors/"openlineage").iterdir()}
    assert files == set(all_of_them)


@pytest.mark.parametrize("behaviour", [hang, drip])
def test_a_server_that_hangs_or_drips_holds_nobody_longer_than_the_bound(book, behaviour):
    for n in range(3): night(book, n)
    with Receiver(behaviour) as receiver:
        start = time.monotonic()
        found = deliver(with_lineage(book, url=receiver.url), seconds=0.6)
        took = time.monotonic() - start
    assert 0.5 < took < 1.2 and found["waiting"] == 9 and len(receiver.tokens) == 1
    assert room.PATIENCE == 5.0


def test_many_slow_answers_share_one_bound(book):
    for n in range(3): night(book, n)
    def slow(handler, us, data):
        time.sleep(0.25)
        us.got.append(data)
        handler.send_response(200)
        handler.end_headers()
    with Receiver(slow) as receiver:
        start = time.monotonic()
        first = deliver(with_lineage(book, url=receiver.url), seconds=0.9)
        took = time.monotonic() - start
        assert took < 1.4 and 1 <= first["sent"] <= 3 and first["waiting"] == 9 - first["sent"]
        assert deliver(with_lineage(book, url=receiver.url))["waiting"] == 0
        assert list(dict.fromkeys(receiver.ids())) == [e["run"]["facets"]["retrainNb_entry"]["leaf"] for e in told(book)]


def test_a_name_that_nobody_answers_for_holds_nobody(book, monkeypatch):
    night(book, 1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30)) # A resolver that is down has no timeout of ours
    start = time.monotonic()
    assert "did not answer" in deliver(with_lineage(book, url="http://marquez.example:5000"), seconds=0.4)["why"]
    assert time.monotonic() - start < 1


def test_the_token_goes_out_and_nowhere_else(book, monkeypatch):
    monkeypatch.setenv("LINEAGE_TOKEN", "very-secret-token")
    night(book, 1)
    said = []
    with Receiver(200) as elsewhere, Receiver(307, 302, 500, 200) as receiver:
        receiver.elsewhere, here = elsewhere.url, with_lineage(book, url=receiver.url, token_env="LINEAGE_TOKEN")
        for _ in range(4): deliver(here, said.append)
        assert receiver.tokens == ["Bearer very-secret-token"]*6 and elsewhere.tokens == [] and len(receiver.got) == 3
    kept = [p for p in book.root.rglob("*") if p.is_file() and b"very-secret" in p.read_bytes()]
    assert kept == [] and len(said) == 3 and "secret" not in " ".join(said)
    night(book, 2)
    for url, value, why in (("http://marquez.example", "very-secret-token", "in the clear"), ("https://marquez.example", "", "is not set"), ("https://marquez.example", "very\nsecret", "holds no token")):
        monkeypatch.setenv("LINEAGE_TOKEN", value)
        found = deliver(with_lineage(book, url=url, token_env="LINEAGE_TOKEN"))
        assert why in found["why"] and "secret" not in found["why"] and found["waiting"] == 3


def test_loopback_is_reached_without_a_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"): monkeypatch.delenv(name, raising=False)
    with Receiver(200) as receiver: post(receiver.url, b"{}", seconds=2)
    assert receiver.got == [b"{}"]
    with pytest.raises(UndeliveredError, match="marquez.example cannot be reached"): post("http://marquez.example", b"{}", seconds=2) # By the proxy


def test_an_address_with_an_impossible_port_is_told():
    with pytest.raises((UsageError, UndeliveredError)): post("http://127.0.0.1:99999999/x", b"{}")


# --- A receiver that refuses for good ---

@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_an_event_that_is_refused_for_good_holds_up_nobody_and_is_sent_again_by_hand(tmp_path, database_url, status):
    furnish(tmp_path/"book", "toy")
    book = open_workbench(tmp_path/"book")
    book = replace(book, settings=book.settings.model_copy(update={"workbench": book.settings.workbench.model_copy(update={"database": database_url})}))
    for n in (1, 2): night(book, n)
    wanted, seqs, said = [canonical(e) for e in told(book)], sorted(outbox(book)), []
    with Receiver(200, status, 200) as receiver:
        here = with_lineage(book, url=receiver.url)
        assert deliver(here, said.append) == {"channel": "openlineage", "sent": 5, "refused": 1, "waiting": 0, "why": ""}
        assert receiver.got == [wanted[0], *wanted[2:]]                     # The others, in their order, once
        assert [(r["seq"], r["why"]) for r in book.ask(refused)] == [(seqs[1], f"{receiver.url} answered {status}.")]
        assert len(said) == 1 and f"1 event refused and set aside, first entry {seqs[1]}: " in said[0] and "deliver --again" in said[0]
        assert deliver(here, said.append)["sent"] == 0 and len(said) == 1 and len(receiver.tokens) == 6 # Not asked again by itself
        with book.engine.begin() as c: catalog.rebuild(c, ledger.entries(c))
        assert book.ask(waiting) == []                                      # Nor after the views were made again
        assert deliver(here, again=True)["sent"] == 1 and receiver.got[5:] == [wanted[1]] and book.ask(refused) == []
        assert deliver(here, again=True)["sent"] == 0                       # What was taken is not sent again by this
    book.engine.dispose()


@pytest.mark.parametrize("status", [401, 403, 404, 405, 407, 408, 409, 410, 421, 425, 426, 429, 500, 501, 502, 503, 504, 507])
def test_an_answer_that_may_change_is_no_refusal_and_nothing_overtakes(book, status):
    night(book, 1)
    with Receiver(200, status, 200) as receiver:
        here = with_lineage(book, url=receiver.url)
        found = deliver(here)
        assert (found["sent"], found["refused"], found["waiting"]) == (1, 0, 2) and f"answered {status}" in found["why"] and len(receiver.got) == 1
        assert deliver(here)["sent"] == 2 and receiver.got == [canonical(e) for e in told(book)]


def test_a_server_that_is_down_while_the_refused_are_sent_again_has_them_wait_in_their_order(book):
    for n in (1, 2): night(book, n)
    with Receiver(422) as receiver: assert deliver(with_lineage(book, url=receiver.url))["refused"] == 6
    night(book, 3)
    found = deliver(with_lineage(book, url=f"http://127.0.0.1:{free_port()}"), again=True)
    assert (found["sent"], found["refused"], found["waiting"]) == (0, 0, 9) and book.ask(refused) == []
    with Receiver(200) as receiver:
        deliver(with_lineage(book, url=receiver.url))
        assert receiver.got == [canonical(e) for e in told(book)]


def test_of_two_at_once_the_one_that_was_taken_counts(book):
    night(book, 1)
    seq = outbox(book)[0]
    for first, second in ((None, "too long"), ("too long", None)):
        with book.engine.begin() as c:
            c.execute(database.deliveries.delete())
            for why in (first, second): room.mark(c, seq, NOW, why)
        assert book.ask(refused) == [] and seq not in book.ask(waiting)


def test_a_person_hears_of_what_was_refused_and_sends_it_again(book, capsys):
    night(book, 1)
    def call(*words):
        code = main([*words, "--root", str(book.root), "--json"])
        heard = capsys.readouterr()
        return code, json.loads(heard.out), heard.err
    lineage = lambda: next(c for c in call("doctor")[1]["checks"] if c["check"] == "lineage")
    assert lineage() == {"check": "lineage", "outcome": "PASS", "found": "3 events waiting"}
    with Receiver(415, 415, 200) as receiver:
        settings = book.root/"settings.ini"
        settings.write_text(f"{settings.read_text()}\n[lineage]\nurl = {receiver.url}\n")
        code, done, err = call("deliver")
        assert (code, done["sent"], done["refused"], len(done["set_aside"])) == (3, 1, 2, 2) and "2 events refused" in err
        assert lineage()["outcome"] == "FAIL" and "2 events refused" in lineage()["found"] and "answered 415" in lineage()["found"]
        code, done, err = call("deliver")
        assert (code, done["sent"], done["refused"], len(done["set_aside"]), err) == (3, 0, 0, 2, "")  # It stays said
        code, done, _ = call("deliver", "--again")
        assert (code, done["sent"], done["set_aside"]) == (0, 2, []) and lineage()["found"] == "0 events waiting"
    with book.lock():
        assert call("deliver", "--again")[0] == 75


def test_a_refusal_is_a_kind_of_failure():
    with Receiver(422) as receiver, pytest.raises(RefusedError, match="answered 422.*deliver --again"): post(receiver.url, b"{}", seconds=2)
    assert issubclass(RefusedError, UndeliveredError)


# --- Senders that are killed, or two at once ---

SEND = "import sys; from retrain_nb.services.workbench import open_workbench; from retrain_nb.loop.deliver import deliver; print(deliver(open_workbench(sys.argv[1])))"


def test_a_process_killed_between_sending_and_remembering_sends_the_same_bytes_again(book):
    night(book, 1)
    wanted = [canonical(e) for e in told(book)]
    def kill(handler, us, data): # It was taken, and the sender never hears of it
        us.got.append(data)
        os.kill(us.sender.pid, signal.SIGKILL)
    with Receiver(200, kill, 200) as receiver:
        settings = book.root/"settings.ini"
        settings.write_text(f"{settings.read_text()}\n[lineage]\nurl = {receiver.url}\n")
        receiver.sender = subprocess.Popen([sys.executable, "-c", SEND, str(book.root)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        assert receiver.sender.wait(60) == -signal.SIGKILL and receiver.got == wanted[:2]
        assert len(book.ask(waiting)) == 2
        assert deliver(open_workbench(book.root))["waiting"] == 0
        assert receiver.got == [wanted[0], wanted[1], wanted[1], wanted[2]] and len(set(receiver.ids())) == 3


def test_two_at_once_lose_nothing_and_keep_the_order_of_first_arrivals(book):
    for n in range(5): night(book, n)
    wanted = [canonical(e) for e in told(book)]
    with Receiver(200) as receiver:
        here = with_lineage(book, url=receiver.url)
        both = [threading.Thread(target=deliver, args=(here,)) for _ in range(2)]
        for t in both: t.start()
        for t in both: t.join()
        assert list(dict.fromkeys(receiver.got)) == wanted and book.ask(waiting) == []


@pytest.mark.parametrize("what", ["artifact", "mark", "file"])
def test_what_cannot_be_made_sent_or_remembered_waits_and_reaches_nobody(book, what, monkeypatch):
    night(book, 1)
    if what == "artifact": book.artifacts.path(book.ask(ledger.find_key, "retrain-1:planned").body["recipe"]).write_bytes(b"{}")
    if what == "mark": monkeypatch.setattr(room, "mark", lambda *_: 1/0)
    if what == "file": (book.root/"mirrors").write_text("in the way")
    before, said = book.ask(ledger.entries), []
    found = deliver(book, said.append)
    assert (found["sent"], found["waiting"]) == (0, 3) and re.match(r"entry \d+: \S", found["why"]) and len(said) == 1
    assert book.ask(ledger.entries) == before


def test_on_both_databases_nothing_is_sent_again_after_the_catalog_was_made_again(tmp_path, database_url):
    furnish(tmp_path/"book", "toy")
    book = open_workbench(tmp_path/"book")
    book = replace(book, settings=book.settings.model_copy(update={"workbench": book.settings.workbench.model_copy(update={"database": database_url})}))
    night(book, 1)
    assert deliver(book)["sent"] == 3
    with book.engine.begin() as c:
        room.mark(c, outbox(book)[0], NOW) # A second time
        catalog.rebuild(c, ledger.entries(c))
    assert deliver(book) == {"channel": "openlineage", "sent": 0, "refused": 0, "waiting": 0, "why": ""}
    with book.engine.begin() as c: c.execute(database.deliveries.delete().where(database.deliveries.c.seq == outbox(book)[1]))
    assert deliver(book)["sent"] == 1
    book.engine.dispose()


def test_the_mirror_is_nobodys_change(tmp_path):
    furnish(tmp_path/"book", "toy")
    git = lambda *words: subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@example.com", *words], cwd=tmp_path/"book", check=True, capture_output=True)
    git("init"), git("add", "-A"), git("commit", "-m", "all")
    from retrain_nb.stores import origin
    book = open_workbench(tmp_path/"book")
    night(book, 1)
    assert deliver(book)["sent"] == 3
    assert origin.repository(book.root, book.written)[1] == ""
    (book.root/"mine.py").write_text("x = 1\n")
    assert origin.repository(book.root, book.written)[1] != ""


def test_events_without_a_run_are_passed_over(book):
    night(book, 1)
    book.append("champion.set", "by hand", {"run": "", "model": digest("x"), "decision": "rollback"}, NOW)
    book.append("champion.set", "imported", {"run": "from-elsewhere", "model": digest("x"), "decision": "rollback"}, NOW)
    assert deliver(book)["sent"] == 5 and len(list((book.mirrors/"openlineage").iterdir())) == 3
    assert openlineage.file_name({"eventType": "START", "run": {"facets": {"retrainNb_entry": {"run": "../../etc/x y", "seq": 1}}}}) == ".._.._etc_x_y-start.json"
