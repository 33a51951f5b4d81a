"Lineage told to others: in the standard's own terms, nothing personal, at least once, and never in the way of a run"
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import attr
import jsonschema
import pytest
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    dataset_version_dataset,
    error_message_run,
    input_statistics_input_dataset,
    job_type_job,
    nominal_time_run,
    parent_run,
    processing_engine_run,
    schema_dataset,
    test_run,
)

from retrain_nb.digest import canonical, digest
from retrain_nb.faces.cli import main
from retrain_nb.services import openlineage
from retrain_nb.services.openlineage import Told, deliver, event, run_id, tellable
from retrain_nb.services.workbench import open_workbench
from retrain_nb.stores import catalog, ledger
from retrain_nb.windows import parse_time

OURS = json.loads((Path(openlineage.__file__).with_name("openlineage.json")).read_text())
KNOWN = {"parent": parent_run.ParentRunFacet, "nominalTime": nominal_time_run.NominalTimeRunFacet, "processing_engine": processing_engine_run.ProcessingEngineRunFacet,
         "errorMessage": error_message_run.ErrorMessageRunFacet, "test": test_run.TestRunFacet, "jobType": job_type_job.JobTypeJobFacet, "schema": schema_dataset.SchemaDatasetFacet,
         "version": dataset_version_dataset.DatasetVersionDatasetFacet, "inputStatistics": input_statistics_input_dataset.InputStatisticsInputDatasetFacet}
INSIDE = {("schema", "fields"): schema_dataset.SchemaDatasetFacetFields, ("test", "tests"): test_run.TestExecution}


def official(name, said): # -> the facet as the standard's own client makes it; raises if it would not
    fields = {k: v for k, v in said.items() if k not in ("_producer", "_schemaURL")}
    for inner, kind in ((k, INSIDE[name, k]) for k in fields if (name, k) in INSIDE): fields[inner] = [kind(**item) for item in fields[inner]]
    if name == "parent": fields = {"run": parent_run.Run(**fields["run"]), "job": parent_run.Job(**fields["job"])}
    made = KNOWN[name](**fields, producer=said["_producer"])
    assert made._schemaURL == said["_schemaURL"]
    return made


def facets(holder):
    for name, said in holder.items():
        if not name.startswith("retrainNb_"): yield name, official(name, said)
        else: jsonschema.validate(said, {**OURS, "$ref": f"#/$defs/{name.removeprefix('retrainNb_')}"})


def check(told): # -> the event in the client's own classes, once every facet has been through it
    datasets = [kind(d["namespace"], d["name"], facets=dict(facets(d["facets"])), **({"inputFacets": dict(facets(d["inputFacets"]))} if "inputFacets" in d else {}))
                for kind, group in ((InputDataset, told["inputs"]), (OutputDataset, told["outputs"])) for d in group]
    made = RunEvent(eventTime=told["eventTime"], producer=told["producer"], eventType=RunState[told["eventType"]], run=Run(told["run"]["runId"], dict(facets(told["run"]["facets"]))),
                    job=Job(told["job"]["namespace"], told["job"]["name"], dict(facets(told["job"]["facets"]))),
                    inputs=[d for d in datasets if isinstance(d, InputDataset)], outputs=[d for d in datasets if isinstance(d, OutputDataset)])
    assert made.schemaURL == told["schemaURL"] and set(told) <= {f.name for f in attr.fields(RunEvent)}
    return made


@pytest.fixture(scope="module")
def parcels(tmp_path_factory):
    "Two real cycles: a champion, and a candidate that the contract refuses"
    root = tmp_path_factory.mktemp("lineage")/"parcels"
    assert main(["init", str(root), "--demo", "toy"]) == 0
    text = (root/"settings.ini").read_text().replace("mode = offline", "mode = disabled")
    (root/"settings.ini").write_text(text + "\n[run]\nprofile_rows = 0\n")
    assert main(["cycle", "--now", "2024-03-01", "--root", str(root)]) == 0
    assert main(["cycle", "--now", "2024-04-15", "--root", str(root)]) == 3
    return root


@pytest.fixture
def book(parcels, tmp_path):
    "A copy in which nothing was told yet"
    root = Path(shutil.copytree(parcels, tmp_path/"parcels"))
    shutil.rmtree(root/".retrain"/"openlineage", ignore_errors=True)
    book = open_workbench(root)
    with book.engine.begin() as c: c.exec_driver_sql("DELETE FROM deliveries")
    return book


def written(book): return [json.loads(p.read_bytes()) for p in sorted((book.store/"openlineage").glob("*.json"))]


def test_events_of_real_runs_are_what_the_standards_own_client_would_make(book):
    assert deliver(book) == {"sent": 6, "waiting": 0, "problem": ""}
    told = written(book)
    for t in told: check(t)
    assert [t["eventType"] for t in told] == ["START", "COMPLETE", "OTHER", "START", "FAIL", "OTHER"]
    assert len({t["run"]["runId"] for t in told}) == 2 and {t["job"]["namespace"] for t in told} == {"parcels"}
    champion = book.ask(catalog.champion)
    assert told[1]["outputs"][0]["facets"]["version"]["datasetVersion"] == champion["model"]
    assert told[1]["inputs"][0]["name"] == "retrain_nb.demo.toy:rows" and told[1]["inputs"][0]["facets"]["version"]["datasetVersion"] == champion["snapshot"]
    assert told[2]["run"]["facets"]["retrainNb_decision"]["outcome"] == "bootstrap" and told[5]["run"]["facets"]["retrainNb_decision"]["outcome"] == "kept"
    leaves = {e.seq: e.leaf for e in book.ask(ledger.entries)}
    assert all(leaves[t["run"]["facets"]["retrainNb_ledger"]["entry"]] == t["run"]["facets"]["retrainNb_ledger"]["leaf"] for t in told)
    assert all(t["run"]["facets"]["retrainNb_metrics"]["metrics"] for t in told[1:2])
    assert {m["name"]: m["direction"] for m in told[1]["run"]["facets"]["retrainNb_metrics"]["metrics"]}["auc"] == "max"


def breaks(told, *path): # -> the same event with one field of one facet gone wrong
    wrong = json.loads(json.dumps(told))
    holder = wrong
    for step in path[:-1]: holder = holder[step]
    holder["no_such_field"] = holder.pop(path[-1])
    return wrong


@pytest.mark.parametrize("path", [("run", "facets", "nominalTime", "nominalStartTime"), ("run", "facets", "retrainNb_verdict", "outcome"), ("run", "runId"),
                                  ("inputs", 0, "facets", "version", "datasetVersion"), ("run", "facets", "test", "tests", 0, "status")])
def test_an_event_that_is_not_to_the_standard_is_found(book, path):
    deliver(book)
    with pytest.raises((TypeError, KeyError, jsonschema.ValidationError)): check(breaks(written(book)[1], *path))


def test_an_event_does_not_change_when_the_world_does(book):
    deliver(book)
    before = {p.name: p.read_bytes() for p in (book.store/"openlineage").iterdir()}
    shutil.rmtree(book.store/"openlineage")
    book.append("run.started", "again", {"run": book.ask(catalog.champion)["run"], "attempt": 2}, parse_time("2030-01-01")) # A later entry about the same run
    with book.engine.begin() as c: c.exec_driver_sql("DELETE FROM deliveries")
    deliver(book)
    after = {p.name: p.read_bytes() for p in (book.store/"openlineage").iterdir()}
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1


HIDDEN, VALUE = "passenger", "Zaphod"


def unkind(kind, body):
    "An event in which everything that a program or a check could say holds a column that is hidden, or a value"
    planned = {"run": "r", "page": "retrain", "cycle": "c", "as_of": "2024-03-01T00:00:00Z", "code": "", "recipe": "9"*64, "parameters": {"note": VALUE}}
    frozen = {"snapshot": "5"*64, "rows": 3, "columns": [HIDDEN, "load"], "kinds": ["text", "float64"], "parts": [], "source": {"adapter": "a:b"}}
    return event(Told(workbench="w", seq=1, kind=kind, at="2024-03-01T03:00:00Z", leaf="f"*64, body={"run": "r", "by": VALUE, **body}, planned=planned, frozen=frozen,
                      recipe={"trainer": "lightgbm 4"}, hidden=(HIDDEN,)))


def test_no_value_no_person_and_no_hidden_column_is_told():
    leaf = lambda name, reason: {"name": name, "outcome": "FAIL", "reason": reason, "parts": [], "value": 1.0}
    verdict = {"name": "all", "outcome": "FAIL", "reason": f"{HIDDEN} {VALUE}", "parts": [
        {"name": "contract", "outcome": "FAIL", "reason": VALUE, "parts": [leaf("load", f"3 rows; found {VALUE}"), leaf(f"{HIDDEN}.kind", "is text")]}, leaf("drift", f"`{HIDDEN}` moved")]}
    cause = f"cell 3 raised ValueError: could not convert {VALUE} in {HIDDEN}"
    events = [unkind("run.started", {}), unkind("run.ended", {"state": "failed", "cause": cause, "section": "Train", "outcome": None, "verdict": verdict}),
              unkind("champion.kept", {"reason": f"{HIDDEN} is odd", "verdict": verdict}), unkind("champion.set", {"reason": f"the {HIDDEN}", "model": "7"*64})]
    for told in events:
        check(told)
        assert HIDDEN not in json.dumps(told) and VALUE not in json.dumps(told)
    assert events[1]["run"]["facets"]["errorMessage"]["message"] == "the run was failed at `Train`: ValueError"
    assert {f["name"] for f in events[0]["inputs"][0]["facets"]["schema"]["fields"]} == {"load"}
    assert [c["outcome"] for c in tellable(verdict, [HIDDEN])] == ["FAIL"]*3


@pytest.mark.parametrize("state, kind", [("ok", "COMPLETE"), ("failed", "FAIL"), ("killed", "ABORT"), ("lost", "ABORT")])
def test_how_a_run_ended_is_said_in_the_standards_words(state, kind): assert check(unkind("run.ended", {"state": state})).eventType.name == kind


def test_two_workbenches_that_run_the_same_recipe_do_not_share_a_run(): assert run_id("a", "retrain-1") != run_id("b", "retrain-1") == run_id("b", "retrain-1")


def test_an_event_written_by_an_older_version_stays_as_it_is(book):
    deliver(book)
    path = sorted((book.store/"openlineage").iterdir())[0]
    path.write_text("{\"older\": true}")
    with book.engine.begin() as c: c.exec_driver_sql("DELETE FROM deliveries")
    assert deliver(book)["problem"] == "" and path.read_text() == "{\"older\": true}"


def test_a_damaged_recipe_holds_up_nothing_else(book):
    champion = book.ask(catalog.champion)
    path = book.artifacts.path(book.ask(catalog.run, champion["run"])["recipe"])
    path.write_bytes(path.read_bytes().replace(b"lightgbm", b"lightgbn"))
    done = deliver(book)
    assert (done["sent"], done["waiting"]) == (3, 3) and "was changed" in done["problem"]


def test_killed_between_telling_and_noting_it_is_told_again_in_the_same_words(book):
    code = ("import os, sys; from retrain_nb.services import openlineage; from retrain_nb.services.workbench import open_workbench\n"
            "openlineage._mark = lambda *_: os._exit(9)\nopenlineage.deliver(open_workbench(sys.argv[1]))")
    assert subprocess.run([sys.executable, "-c", code, str(book.root)]).returncode == 9
    before = {p.name: p.read_bytes() for p in (book.store/"openlineage").iterdir()}
    assert len(before) == 6 and deliver(book) == {"sent": 6, "waiting": 0, "problem": ""}
    assert {p.name: p.read_bytes() for p in (book.store/"openlineage").iterdir()} == before


# --- Over HTTP, against a real server on loopback ---

class Collector(ThreadingHTTPServer):
    "Answers as `mood` says, and keeps what it accepted"
    daemon_threads = True
    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.mood, self.accepted, self.asked = "up", [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()
    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}"
    def end(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_POST(self):
        data, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        server.asked.append((self.path, dict(self.headers)))
        if server.mood == "slow": time.sleep(3)
        if server.mood == "drips":
            for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x"*200:
                try: self.wfile.write(bytes([byte]))
                except OSError: return None
                time.sleep(.1)
        if server.mood == "accepts, then says 500": server.accepted.append((self.headers["Idempotency-Key"], data))
        if server.mood.startswith("refuses") and b'"START"' in data: return self.answer(422)
        if server.mood == "redirect": return self.answer(307, {"Location": "http://127.0.0.1:1/stolen"})
        if server.mood != "up" and not server.mood.startswith("refuses"): return self.answer(500)
        server.accepted.append((self.headers["Idempotency-Key"], data))
        self.answer(201)
    def answer(self, status, headers=()):
        try:
            self.send_response(status)
            for name, value in {**dict(headers), "Content-Length": "0"}.items(): self.send_header(name, value)
            self.end_headers()
        except OSError: pass


@pytest.fixture
def collector():
    server = Collector()
    yield server
    server.end()


def told_to(book, url, token=""):
    (book.root/"settings.ini").write_text((book.root/"settings.ini").read_text() + f"\n[lineage]\nurl = {url}\ntoken_env = {token}\n")
    return open_workbench(book.root)


def test_down_slow_500_redirect_then_up_and_everything_arrives_once_per_event(book, collector, monkeypatch):
    monkeypatch.setattr(openlineage.send, "__defaults__", ("", 0.5)) # The limit itself is held by the next test
    before = [e.leaf for e in book.ask(ledger.entries)]
    book = told_to(book, collector.url)
    port = collector.server_port
    collector.end()
    assert "ConnectionRefusedError" in deliver(book)["problem"]
    again = Collector(port)
    try:
        for mood, word in (("slow", "did not answer within 0.5 s"), ("500", "answered with 500"), ("redirect", "answered with 307")):
            again.mood = mood
            done = deliver(book)
            assert done["sent"] == 0 and done["waiting"] == 6 and word in done["problem"], mood
        assert again.accepted == []
        again.mood = "accepts, then says 500"                              # It has the event, and we cannot know
        assert deliver(book)["sent"] == 0
        again.mood = "up"
        assert deliver(book) == {"sent": 6, "waiting": 0, "problem": ""}
        assert deliver(book)["sent"] == 0
        copies = Counter(key for key, _ in again.accepted)
        assert len(copies) == 6 and sorted(copies.values()) == [1, 1, 1, 1, 1, 2] # The one that we could not know about came twice,
        assert len(set(again.accepted)) == 6                                      # with the same key and the same bytes
        assert all(key == digest(data) and data == canonical(json.loads(data)) for key, data in again.accepted)
        for _, data in again.accepted: check(json.loads(data))
        assert {path for path, _ in again.asked} == {"/api/v1/lineage"}
    finally: again.end()
    assert [e.leaf for e in book.ask(ledger.entries)] == before            # And no run knows of any of it


@pytest.mark.parametrize("mood", ["slow", "drips"])
def test_the_time_limit_is_for_the_whole_exchange(collector, mood):
    collector.mood = mood
    start = time.monotonic()
    with pytest.raises(openlineage.RetrainError, match="did not answer within 1 s"): openlineage.send({"a": 1}, collector.url, timeout=1.0)
    assert time.monotonic() - start < 2.5
    assert openlineage.TIMEOUT == 5.0


def test_an_event_that_is_not_wanted_holds_up_no_other(book, collector):
    collector.mood = "refuses the start"
    done = deliver(told_to(book, collector.url))
    assert (done["sent"], done["waiting"]) == (4, 2) and "refused an event with 422" in done["problem"]


def test_the_token_comes_from_the_environment_and_goes_only_where_it_should(book, collector, monkeypatch):
    book = told_to(book, collector.url + "/custom/path", "LINEAGE_TOKEN")
    assert "LINEAGE_TOKEN, which is not set" in deliver(book)["problem"]
    monkeypatch.setenv("LINEAGE_TOKEN", "s3cr3t")
    assert deliver(book)["sent"] == 6
    path, headers = collector.asked[0]
    assert (path, headers["Authorization"]) == ("/custom/path", "Bearer s3cr3t")
    assert not any(b"s3cr3t" in p.read_bytes() for p in book.root.rglob("*") if p.is_file())
    with pytest.raises(openlineage.SettingsError, match="in clear"): openlineage.send({}, "http://192.0.2.1:5000", "LINEAGE_TOKEN")


def test_a_backlog_keeps_nobody_waiting(book):
    assert deliver(book, budget=0.0)["sent"] == 0
    assert deliver(book)["sent"] == 6


def test_many_tell_at_once_and_each_is_noted_once(book):
    code = "import sys; from retrain_nb.services.openlineage import deliver; from retrain_nb.services.workbench import open_workbench; deliver(open_workbench(sys.argv[1]))"
    running = [subprocess.Popen([sys.executable, "-c", code, str(book.root)], env=dict(os.environ)) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert len(written(book)) == 6 and deliver(book)["sent"] == 0
