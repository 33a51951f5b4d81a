"""Runs that end badly, each in real processes with a real kernel: the account must say what happened, and nothing may be left over."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from retrain_nb.records import RetrainError, UsageError
from retrain_nb.services.execute import MARK, Execution, execute, progress

PAGES = Path(__file__).parent/"notebooks"
ROOT = Path(__file__).parents[1]
FINE = ("good", "imports_from_the_workbench", "leaves_grandchild", "prints_much", "hangs_at_exit", "hangs_after_last_cell",
        "says_goodbye")
FAULTS = ("raises", "refuses", "exits_zero", "quits", "os_exit", "hangs", "kills_its_parent", "stops_its_parent", "no_record",
          "torn_record", "empty_record", "tolerates_errors", "skips_a_cell", "shows_an_error", "prints_events")


def run(name: str, cwd: Path, folder: str = "", limit: float = 45, on_event: Callable[[dict], Any] | None = None, **more: Any) -> Execution:
    "The page `name` of the fixtures, run in a folder named after it"
    folder = folder or name
    return execute(PAGES/f"{name}.ipynb", {"folder": folder, **more}, cwd/folder, cwd, limit, on_event)


def marked(mark: str, value: str) -> list[psutil.Process]:
    "Living processes whose environment holds `mark`"
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(mark) == value and process.status() != psutil.STATUS_ZOMBIE: found.append(process)
        except psutil.Error: pass
    return found


def eventually(check: Callable[[], Any], seconds: float = 20) -> Any:
    "The first true answer of `check`, or the last one"
    until = time.monotonic() + seconds
    while not (answer := check()) and time.monotonic() < until: time.sleep(.05)
    return answer


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A workbench with a module of the user's"
    cwd = tmp_path_factory.mktemp("bench")
    (cwd/"user_module.py").write_text("answer = 42\n")
    return cwd


@pytest.fixture(scope="module")
def runs(bench: Path) -> dict[str, Execution]:
    "Every fault once, two at a time"
    limits = {"hangs": 5.0}
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_BENCH", str(bench))
        return dict(zip(FINE + FAULTS, pool.map(lambda name: run(name, bench, limit=limits.get(name, 45)), FINE + FAULTS), strict=True))


def outputs(folder: Path) -> str:
    "All that the executed page shows, as text"
    page, = folder.glob("*.ipynb")
    return "".join("".join(o.get("text", "")) for c in json.loads(page.read_text())["cells"] for o in c.get("outputs", []))


# What became of it

@pytest.mark.parametrize("name", FINE)
def test_a_page_that_did_all_its_work_is_ok(runs: dict[str, Execution], name: str) -> None:
    done = runs[name]
    assert (done.state, done.cause, done.exit_code, done.cell, done.section, done.refused) == ("ok", "", 0, None, "", False)
    assert done.ran == done.cells > 0
    assert done.seconds < 30


@pytest.mark.parametrize("name, state, code, section, words", [
    ("raises", "failed", 1, "Work", "cell [4] (Work) raised ZeroDivisionError: division by zero"),
    ("refuses", "failed", 1, "Contract", "contract says FAIL: 3 rows have no carrier"),
    ("exits_zero", "failed", 1, "Work", "cell [3] (Work) left the page with SystemExit"),
    ("quits", "failed", 1, "Work", "cell [3] (Work) left the page with quit()"),
    ("os_exit", "failed", 1, "Work", "the kernel ended by itself with exit code 0 in cell [3] (Work)"),
    ("hangs", "killed", 124, "Work", "the time limit of 5 s was reached in cell [3] (Work)"),
    ("kills_its_parent", "killed", 137, "Work", "the process that ran the page was killed by SIGKILL in cell [4] (Work)"),
    ("stops_its_parent", "killed", 143, "Work", "the run was stopped by SIGTERM in cell [3] (Work)"),
    ("no_record", "failed", 1, "", "every cell ran, but the page left no record.json"),
    ("torn_record", "failed", 1, "", "every cell ran, but the record.json it left is not whole"),
    ("empty_record", "failed", 1, "", "every cell ran, but the record.json it left says nothing"),
    ("tolerates_errors", "failed", 1, "Work", "cell [3] (Work) raised ZeroDivisionError"),
    ("skips_a_cell", "failed", 1, "Work", "cell [3] (Work) raised SystemError: this ran"),
    ("shows_an_error", "failed", 1, "", "cell [3] shows an error"),
    ("prints_events", "failed", 1, "Work", "cell [4] (Work) raised ZeroDivisionError"),
])
def test_an_ending_is_called_by_its_name(runs: dict[str, Execution], name: str, state: str, code: int, section: str, words: str) -> None:
    done = runs[name]
    assert (done.state, done.exit_code, done.section) == (state, code, section), done
    assert words in done.cause
    assert done.refused == (name == "refuses")


def test_no_fault_is_ever_taken_for_success(runs: dict[str, Execution]) -> None:
    assert [name for name, done in runs.items() if done.state == "ok"] == list(FINE)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_kernel_is_found_in_every_cell_even_after_the_record(bench: Path, at: int) -> None:
    done = run("kernel_killed", bench, folder=f"killed-{at}", at=at)
    where = {1: "cell [3] (One)", 2: "cell [4] (Two)", 3: "cell [6] (After)"}[at]
    assert (done.state, done.exit_code, done.ran) == ("killed", 137, done.cell - 1 if done.cell else None)
    assert f"the kernel was killed by SIGKILL in {where}" in done.cause
    cells = json.loads(Path(done.notebook).read_text())["cells"]
    statuses = [c["metadata"]["papermill"]["status"] for c in cells if c["cell_type"] == "code"]
    assert statuses == ["completed"]*done.ran + ["failed"] + ["pending"]*(done.cells - done.ran - 1)


# What is left

def test_what_ran_is_kept(runs: dict[str, Execution], bench: Path) -> None:
    for name in FINE + FAULTS: assert runs[name].notebook == str(bench/name/f"{name}.ipynb"), name
    for name in ("hangs", "stops_its_parent", "kills_its_parent"): assert "so far" in outputs(bench/name), name


def test_a_page_has_its_own_farewell_and_sees_nothing_of_ours(runs: dict[str, Execution], bench: Path) -> None:
    assert (bench/"says_goodbye"/"goodbye").read_text() == "and thank you"
    house = {"In", "Out", "exit", "get_ipython", "open", "quit"} # IPython's own
    assert set(json.loads((bench/"says_goodbye"/"record.json").read_text())["shown"]) - house == {"atexit", "folder", "json", "pathlib"}


def test_no_process_outlives_its_run(runs: dict[str, Execution], bench: Path) -> None:
    pids = json.loads((bench/"leaves_grandchild"/"record.json").read_text())["pids"]
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert marked("TEST_BENCH", str(bench)) == []
    assert psutil.Process().children() == []


def test_no_temporary_folder_is_left(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run("good", bench, folder="clean").state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_the_cost_is_that_of_all_processes(runs: dict[str, Execution]) -> None:
    good = runs["good"]
    assert 0 < good.kernel_start_cpu_seconds < good.cpu_seconds < 30
    assert good.peak_mb > 20


def test_the_record_of_another_run_cannot_vouch_for_this_one(runs: dict[str, Execution], bench: Path) -> None:
    before = (bench/"good"/"good.ipynb").read_bytes()
    with pytest.raises(UsageError, match="record.json of another run"): run("good", bench)
    assert (bench/"good"/"good.ipynb").read_bytes() == before


def test_events_come_cell_by_cell_with_their_section(bench: Path) -> None:
    heard: list[dict] = []
    run("good", bench, folder="heard", on_event=heard.append)
    assert [progress(e) for e in heard if e["event"] == "start"] == ["1/4 Good", "2/4 Good", "3/4 Work", "4/4 Record"]
    assert [e["event"] for e in heard] == ["start", "done"]*4


def test_an_error_of_the_listener_ends_the_run_too(bench: Path) -> None:
    def deaf(event: dict) -> None: raise BrokenPipeError
    with pytest.raises(BrokenPipeError): run("hangs", bench, folder="deaf", on_event=deaf)
    assert psutil.Process().children() == []


def test_any_json_serialisable_account(runs: dict[str, Execution]) -> None:
    for done in runs.values(): json.dumps(dataclasses.asdict(done), allow_nan=False)


# Callers of their own, in a process that can be limited and killed

CALLER = """
import dataclasses, json, sys
from pathlib import Path
from retrain_nb.services.execute import execute
page, cwd = Path(sys.argv[1]), Path(sys.argv[2])
exec(sys.argv[3])
done = execute(page, {"folder": "out"}, cwd/"out", cwd, 60, lambda event: print("event", flush=True))
print(json.dumps(dataclasses.asdict(done)))
"""


def caller(name: str, cwd: Path, first: str = "", env: dict[str, str] | None = None) -> subprocess.Popen:
    "Another process that executes the page `name`"
    words = [sys.executable, "-c", CALLER, str(PAGES/f"{name}.ipynb"), str(cwd), first]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TEST_CALLER": str(cwd)} if env is None else env
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd)


def account(process: subprocess.Popen) -> dict[str, Any]:
    "What the caller was told"
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def test_cron_has_no_path_no_home_and_no_terminal(tmp_path: Path) -> None:
    process = caller("good", tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert account(process)["state"] == "ok"


def test_a_full_disk_is_named_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"prints_much.ipynb").write_text("what an earlier attempt left")
    done = account(caller("prints_much", tmp_path, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"))
    assert (done["state"], done["exit_code"]) == ("failed", 1)
    assert "no room for" in done["cause"]
    assert [p.name for p in (tmp_path/"out").iterdir() if p.suffix != ".json"] == ["prints_much.ipynb"]
    assert (tmp_path/"out"/"prints_much.ipynb").read_text() == "what an earlier attempt left"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_caller_that_is_asked_to_stop_can_still_account_for_its_run(tmp_path: Path, number: signal.Signals, code: int) -> None:
    # Started with `nohup` or `&` it would ignore SIGINT, as these tests may be; ignored stays ignored
    process = caller("leaves_grandchild_and_hangs", tmp_path, "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)")
    assert eventually((tmp_path/"out"/"pid").exists)
    process.send_signal(number)
    done = account(process)
    assert (done["state"], done["exit_code"]) == ("killed", code)
    assert done["cause"] == f"stopped by {number.name} in cell [3] (Work)"
    assert not marked("TEST_CALLER", str(tmp_path))


@pytest.mark.parametrize("victim", ["caller", "warden", "runner"])
def test_whoever_is_killed_nothing_is_left_behind(tmp_path: Path, victim: str) -> None:
    process = caller("leaves_grandchild_and_hangs", tmp_path)
    assert eventually((tmp_path/"out"/"pid").exists)
    tree = {"caller": psutil.Process(process.pid)}
    tree["warden"], = tree["caller"].children()
    tree["runner"] = next(p for p in tree["warden"].children() if p.children())
    tree[victim].kill()
    if victim == "caller": process.communicate(timeout=30)
    else: assert account(process)["state"] == "killed"
    assert eventually(lambda: not marked("TEST_CALLER", str(tmp_path)), 10)


# Refused before anything starts


def test_a_required_parameter_must_be_given(tmp_path: Path) -> None:
    page = PAGES/"required_parameter.ipynb"
    with pytest.raises(UsageError, match="no value for `seed`"): execute(page, {}, tmp_path/"out", tmp_path, 60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [0, -1])
def test_a_run_needs_some_time(bench: Path, limit: float) -> None:
    with pytest.raises(UsageError, match="leaves no time"): run("good", bench, folder="timeless", limit=limit)


def test_a_page_does_not_overwrite_itself(bench: Path) -> None:
    with pytest.raises(UsageError, match="its own output"): execute(PAGES/"good.ipynb", {}, PAGES, bench, 60)


def test_a_folder_that_cannot_be_is_named(bench: Path) -> None:
    page = PAGES/"good.ipynb"
    with pytest.raises(RetrainError, match="cannot make the folder"): execute(page, {}, bench/"user_module.py"/"out", bench, 60)
    with pytest.raises(UsageError, match="there is no folder"): execute(page, {}, bench/"out", bench/"gone", 60)


def test_every_process_of_a_run_carries_its_mark(bench: Path) -> None:
    heard: list[str] = []
    def look(event: dict) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.ZombieProcess, psutil.NoSuchProcess): # It ended while we looked
                if process.cmdline(): heard.append(process.environ()[MARK])
    run("good", bench, folder="mark", on_event=look)
    assert len(set(heard)) == 1 and len(heard) >= 3
    assert MARK not in os.environ
