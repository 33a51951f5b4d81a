"The W&B mirror: a real client when it works, and nothing at all in the way of a run when it does not."
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from retrain_nb.digest import digest_file
from retrain_nb.records import DataError, RetrainError, VerificationError
from retrain_nb.services import tracking
from retrain_nb.services.tracking import check_mirror, describe, mirror, prepare, read_back, start_mirror

RUN = "retrain-0a1b2c3d4e5f"
SETTINGS = "class Settings:\n    def __init__(self, **k): pass\n" # Of a client that is not the real one
METRIC = {"value": 0.44, "low": 0.42, "high": 0.46}
GATES = {"name": "gates", "outcome": "FAIL", "reason": "auc", "parts": [
    {"name": "auc", "outcome": "FAIL", "reason": "worse by 0.02", "value": 0.02, "interval": [0.01, 0.03], "n": 900, "threshold": 0.01},
    {"name": "contract", "outcome": "PASS", "reason": "no value of passenger is missing"}]}
EVALUATION = {"candidate": {"log_loss": METRIC, "auc": METRIC}, "difference": {"auc": METRIC},
              "reliability": [{"n": 9, "score": 0.1, "rate": 0.2, "low": 0.1, "high": 0.3}],
              "by_day": [{"day": f"2013-05-{i:02}", "n": 9, "rate": 0.2, "candidate": 0.5, "rival": None} for i in range(1, 15)]}
RECIPE = {"as_of": "2013-06-01T00:00:00Z", "snapshot": "5f"*32, "seed": 3, "params": {"num_leaves": 31}}


@pytest.fixture
def bench(tmp_path):
    "A store, and the report folder of one finished run"
    store, folder = tmp_path/"store", tmp_path/"reports"/RUN
    for p in (store, folder): p.mkdir(parents=True)
    (store/"model.json").write_text('{"booster": "tree"}')
    (folder/"report.html").write_text("<h1>FAIL</h1>")
    told = describe({"run": RUN, "page": "retrain", "cycle": "cycle-77", "state": "ok", "as_of": RECIPE["as_of"]}, RECIPE, EVALUATION,
                    GATES, {"did": "kept", "sentence": "The champion stays."},
                    [{"name": "model", "kind": "model", "path": str(store/"model.json")},
                     {"name": "report", "kind": "report", "path": "report.html"}], personal=["passenger"])
    prepare(folder, told)
    return store, folder

def wait(until, seconds=30):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)

def stub(folder, text):
    "A package that calls itself wandb"
    (folder/"wandb").mkdir(parents=True)
    (folder/"wandb"/"__init__.py").write_text(text)
    return str(folder)

def family(pid):
    try: return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess: return []

def gone(processes): return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)

def timed_start(*args, **kwargs):
    before = time.perf_counter()
    pid = start_mirror(*args, **kwargs)
    assert time.perf_counter() - before < 0.5 # 5 ms on an idle machine; no client takes less than a second
    return pid


def test_an_offline_run_reads_back_whole(bench):
    store, folder = bench
    timed_start(folder, store, project="flights")
    wait((folder/"mirror.done.json").exists)
    done = json.loads((folder/"mirror.done.json").read_bytes())
    path, = (store/done["path"]).glob("*.wandb")
    found = read_back(path)
    assert (found["run"], found["group"], found["job"], found["exit"]) == (RUN, "cycle-77", "retrain", 0)
    assert set(found["tags"]) == {"FAIL", "kept", "retrain"}
    assert {name: found["config"][name] for name in RECIPE} == RECIPE
    assert found["metrics"] == {"log_loss": "min", "auc": "max", "difference.auc": "min"} and found["summary"]["outcome"] == "FAIL"
    assert {name: found["summary"][f"{name}.nrows"] for name in tracking.TABLES} == {"gates": 2, "calibration": 1, "days": 14}
    assert {"model", "report"} <= set(found["artifacts"]) and found["artifacts"]["model"]["digest"] == digest_file(store/"model.json")
    kinds = {r.WhichOneof("record_type") for r in tracking.records(path)}
    assert not kinds & {"output", "output_raw", "stats", "environment"} and not list((store/done["path"]).rglob("requirements.txt"))

def test_nothing_is_left_running_and_nothing_is_written_outside_the_store(bench, tmp_path, monkeypatch):
    store, folder = bench
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        (tmp_path/name).mkdir()
        monkeypatch.setenv(name, str(tmp_path/name))
    seen = family(start_mirror(folder, store))
    wait((folder/"mirror.done.json").exists)
    wait(lambda: gone(seen))
    stray = [p for p in psutil.process_iter(["cmdline"]) if str(store) in " ".join(p.info["cmdline"] or []) and not gone([p])]
    assert stray == [] and [p for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME",
                                           "XDG_CONFIG_HOME") for p in (tmp_path/name).rglob("*")] == []
    assert list((store/"wandb"/"data").rglob("staging/*"))

def test_offline_never_uses_a_key_or_a_server_that_lies_around(bench, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k"*40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert not {"WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"} & set(tracking._environment(bench[0], "offline"))

def test_disabled_starts_nothing(bench):
    store, folder = bench
    assert start_mirror(folder, store, mode="disabled") == 0 and not (store/"wandb").exists()

def test_a_missing_client_costs_nothing_and_the_mirror_can_be_made_later(bench, tmp_path, monkeypatch):
    store, folder = bench
    monkeypatch.setenv("PYTHONPATH", stub(tmp_path/"missing", "raise ImportError('no wandb here')"))
    seen = family(timed_start(folder, store))
    wait(lambda: gone(seen))
    assert not (folder/"mirror.done.json").exists() and "no wandb here" in (store/"wandb"/"mirror.log").read_text()
    monkeypatch.delenv("PYTHONPATH")
    start_mirror(folder, store)
    wait((folder/"mirror.done.json").exists)

def test_a_hanging_client_is_ended_with_all_it_started(bench, tmp_path, monkeypatch):
    store, folder = bench
    hang = (f"import subprocess, time\n{SETTINGS}def init(**k):\n"
            "    subprocess.Popen(['sleep', '611'], start_new_session=True)\n    time.sleep(611)\n")
    monkeypatch.setenv("PYTHONPATH", stub(tmp_path/"hang", hang))
    pid = timed_start(folder, store, timeout_s=3)
    wait(lambda: len(family(pid)) == 3)
    seen = family(pid)
    wait(lambda: gone(seen), 10)
    assert not (folder/"mirror.done.json").exists() and "took longer than 3 s" in (store/"wandb"/"mirror.log").read_text()

def test_a_mirror_killed_midway_leaves_no_mark_and_repeats(bench):
    store, folder = bench
    pid = start_mirror(folder, store)
    wait(lambda: list((store/"wandb").glob("offline-run-*")))
    for p in family(pid):
        try: p.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    assert not (folder/"mirror.done.json").exists()
    time.sleep(0.2)
    start_mirror(folder, store)
    wait((folder/"mirror.done.json").exists)
    assert len(list((store/"wandb").glob("offline-run-*"))) == 1 # The dead attempt is not left to be sent

def test_a_second_mirror_does_nothing_unless_it_is_forced(bench, monkeypatch):
    store, folder = bench
    (folder/"mirror.done.json").write_text('{"run": "x"}')
    monkeypatch.setattr(tracking, "_open", lambda *args: pytest.fail("the client was asked"))
    assert mirror(folder, store) == {"run": "x"}
    with pytest.raises(pytest.fail.Exception): mirror(folder, store, force=True)
    assert not (folder/"mirror.done.json").exists()

def test_two_at_once_do_not_write_over_each_other(bench):
    import fcntl
    store, folder = bench
    (store/"wandb").mkdir()
    with (store/"wandb"/f"{RUN}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RetrainError, match="being mirrored already"): mirror(folder, store)

def test_a_client_that_keeps_nothing_is_not_believed(bench, monkeypatch):
    store, folder = bench
    class Forgetful:
        dir = str(store/"wandb"/"offline-run-1"/"files")
        def finish(self, exit_code):
            Path(self.dir).mkdir(parents=True)
            (Path(self.dir).parent/"run.wandb").write_bytes(b":W&B\x00\x00\x00")
    monkeypatch.setattr(tracking, "_open", lambda *args: Forgetful())
    monkeypatch.setattr(tracking, "_fill", lambda *args: None)
    with pytest.raises(VerificationError, match="did not keep"): mirror(folder, store)
    assert not (folder/"mirror.done.json").exists()

def test_a_client_that_writes_elsewhere_is_refused(bench, tmp_path, monkeypatch):
    store, folder = bench
    text = f"{SETTINGS}class Run:\n    dir = {str(tmp_path)!r}\n    def finish(self, exit_code): pass\ndef init(**k): return Run()\n"
    monkeypatch.setenv("PYTHONPATH", stub(tmp_path/"elsewhere", text))
    seen = family(start_mirror(folder, store))
    wait(lambda: gone(seen))
    assert "not below" in (store/"wandb"/"mirror.log").read_text() and not (folder/"mirror.done.json").exists()

def test_a_store_that_cannot_be_written_to_is_no_error(bench, tmp_path):
    (tmp_path/"file").write_text("in the way")
    assert start_mirror(bench[1], tmp_path/"file") == 0

@pytest.mark.parametrize("change", [{"rows": [1]}, {"config": {"passenger": 1}},
                                    {"tables": {"gates": {"columns": ["passenger"], "rows": [["A. Person"]]}}},
                                    {"tables": {"days": {"columns": list(tracking.TABLES["days"]), "rows": [[0]*5]*1001}}},
                                    {"tables": {"rows": {"columns": ["x"], "rows": []}}}])
def test_rows_and_unknown_columns_have_no_place_in_a_mirror(bench, change):
    told = json.loads((bench[1]/"mirror.json").read_bytes())
    with pytest.raises(DataError, match="may hold"): check_mirror({**told, **change})

def test_a_reason_that_speaks_of_a_personal_column_stays_at_home(bench):
    assert "passenger" not in (bench[1]/"mirror.json").read_text()

def test_a_run_that_failed_early_can_be_mirrored_too(tmp_path):
    told = describe({"run": RUN, "page": "retrain", "cycle": None, "state": "killed", "as_of": None}, {}, {}, None, {},
                    [{"name": "model", "kind": "model", "path": "gone.json"}])
    assert json.loads(prepare(tmp_path, told).read_bytes())["files"] == [] and told["outcome"] == "KILLED" and told["tables"] == {}

def test_a_torn_file_reads_as_far_as_it_is_whole(bench, tmp_path):
    store, folder = bench
    path, = (store/mirror(folder, store)["path"]).glob("*.wandb")
    whole = list(tracking.records(path))
    for size in (0, 3, 7, 100, path.stat().st_size//2, path.stat().st_size - 1):
        (tmp_path/"torn.wandb").write_bytes(path.read_bytes()[:size])
        part = list(tracking.records(tmp_path/"torn.wandb"))
        assert part == whole[:len(part)] and len(part) < len(whole)

def test_importing_the_room_does_not_load_the_client():
    import subprocess
    program = "import sys, retrain_nb.services.tracking; print('wandb' in sys.modules, 'psutil' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env=os.environ).stdout.split() == ["False", "False"]
