"""What the workbench costs, as ratios against a floor measured in the same run: `make bench` prints a table and writes bench/results.json."""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.backtest import folds
from bench.contract import contract
from bench.events import events
from bench.gates import gates, side_by_side
from bench.history import history
from bench.ingest import ingest
from bench.ledger import record
from bench.paired import paired
from bench.record import artifact_put, snapshot_check
from bench.rows import row
from bench.snapshots import snapshots
from bench.verify import verify_many

HERE = Path(__file__).parent
PYTHON, CLI = sys.executable, str(Path(sys.executable).parent/"retrain-nb")
NOW = "2013-06-01"


def spend(words: list[str], **environment: str) -> dict[str, Any]:
    "CPU and wall seconds of a command with all the processes it waited for, and what it printed"
    before, start = os.times(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        _, errors = process.communicate()
        out.seek(0)
        text = out.read()
    after, wall = os.times(), time.perf_counter() - start
    if process.returncode: raise SystemExit(f"{' '.join(words[:4])} … exited with {process.returncode}:\n{errors}{text}")
    return {"cpu": after.children_user + after.children_system - before.children_user - before.children_system, "wall": wall, "out": text}


def median(words: list[str], times: int = 5) -> float:
    "Median CPU seconds over several runs, after one that warms the disk"
    return statistics.median(spend(words)["cpu"] for _ in range(times + 1))


def quiet(root: Path) -> None:
    "Switch off what runs after the outcome: profile and mirror have rows of their own"
    path = root/"settings.ini"
    text = re.sub(r"profile_rows = \d+", "profile_rows = 0", path.read_text()).replace("mode = offline", "mode = disabled")
    path.write_text(text)


def starts() -> list[dict]:
    "Starting up: the import of the package and `--help`, against a bare interpreter"
    bare = median([PYTHON, "-c", "pass"])
    rows = [("import retrain_nb", [PYTHON, "-c", "import retrain_nb"], 0.15), ("retrain-nb --help", [CLI, "--help"], 0.5)]
    return [row(name, median(words), bare, "bare interpreter", limit_seconds=limit) for name, words, limit in rows]


def first_cycle(root: Path) -> dict:
    "The demo's first cycle, profile and report included, mirror spawned: wall clock and memory"
    spend([CLI, "init", str(root), "--demo", "flights"])
    start = time.perf_counter()
    process = subprocess.Popen([CLI, "cycle", "--now", NOW, "--root", str(root), "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, tree_mb(process.pid))
        time.sleep(0.05)
    wall = time.perf_counter() - start
    if process.returncode: raise SystemExit(f"the demo's first cycle exited with {process.returncode}")
    done = row("demo's first cycle (wall)", wall, 90, "the limit of 90 s", limit=1.0, peak_mb=round(peak), peak_limit_mb=2048)
    return {**done, "ok": done["ok"] and peak <= 2048}


def tree_mb(pid: int) -> float:
    "Resident memory of a process and all below it"
    import psutil
    try: family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error: return 0.0
    total = 0
    for member in family:
        try: total += member.memory_info().rss
        except psutil.Error: pass
    return total/2**20


def recorded_run(root: Path, times: int = 5) -> list[dict]:
    """A recorded run against the plain script that does the same reading, training and evaluating.

    The script runs as anybody would run it. On a machine with other work the threads of LightGBM and numpy then burn their cores
    while they wait for each other, ten times over; a recorded run has them sleep, and the second row gives the script the same."""
    from retrain_nb.services.execute import CALM
    quiet(root)
    status = json.loads(spend([CLI, "status", "--root", str(root), "--json"])["out"])
    shown = json.loads(spend([CLI, "show", status["champion"]["run"], "--root", str(root), "--json"])["out"])
    store, snapshot = root/".retrain", status["champion"]["snapshot"]
    record = json.loads((root/"reports"/shown["run"]/"record.json").read_text())
    columns = json.loads(spend([PYTHON, "-c", "import json; from retrain_nb.demo.flights_view import view; print(json.dumps({'numeric': view.numeric, 'categorical': view.categorical}))"])["out"])
    columns |= {"time": "event_time", "label": "disrupted", "label_time": "label_time"}
    plain, calm, recorded, kernel = [], [], [], []
    for seed in range(times + 1): # In turn, so that a machine that slows down slows all of them
        recipe = {**record["recipe"], "params": {**record["recipe"]["params"], "seed": 100 + seed}}
        script = [PYTHON, str(HERE/"plain.py"), str(store), snapshot, json.dumps(recipe), json.dumps(columns)]
        plain.append(spend(script)["cpu"])
        calm.append(spend(script, **CALM)["cpu"])
        done = spend([CLI, "run", "retrain", "--now", NOW, "-p", "snapshot", snapshot, "-p", "seed", str(100 + seed), "--root", str(root), "--json"])
        kernel.append(json.loads(done["out"])["kernel_start_cpu_seconds"])
        recorded.append(done["cpu"] - kernel[-1])
    took = statistics.median(recorded[1:])
    return [row("recorded run, kernel start excluded (CPU)", took, statistics.median(plain[1:]), "plain script", limit=1.35),
            row("  the same (CPU)", took, statistics.median(calm[1:]), "plain script, as calm"),
            row("  kernel start (CPU)", statistics.median(kernel[1:]), statistics.median(plain[1:]), "plain script")]


def idle_cycle(root: Path) -> list[dict]:
    "`cycle` when there is nothing to do: asked before, and asked anew with nothing new in the source"
    opened = median([CLI, "status", "--root", str(root)], 3)
    again = [CLI, "cycle", "--now", NOW, "--root", str(root)]
    read = median([PYTHON, "-c", "from retrain_nb.demo.flights import rows; rows()"], 3)
    first, second = (spend([CLI, "cycle", "--now", now, "--root", str(root)])["cpu"] for now in ("2014-01-02", "2014-01-02T01:00"))
    return [row("cycle, asked before (CPU)", median(again, 3), opened, "retrain-nb status"),
            row("cycle, nothing new in the source (CPU)", second, read, "reading the source"), row("cycle, a month's worth of news (CPU)", first, read, "reading the source")]


def runs() -> list[dict]:
    "What a cycle and a run cost, on the flights"
    root = Path(tempfile.mkdtemp(prefix="bench-"))
    try: return [first_cycle(root), *recorded_run(root), *idle_cycle(root)]
    finally: shutil.rmtree(root, ignore_errors=True)


def show(r: dict) -> None:
    "One line for a person, as soon as it is known"
    if "rate" in r:
        wanted = "" if r["most"] is None and r["least"] is None else f"at most {r['most']:.0%}" if r["least"] is None else f"at least {r['least']:.0%}"
        return print(f"{'ok  ' if r['ok'] else 'OVER'} {r['name']:<58}{r['rate']:>9.1%}    {wanted}", flush=True)
    limit = f"limit {r['limit']}" if r["limit"] else f"limit {r['limit_seconds']} s" if r["limit_seconds"] else ""
    more = f", peak {r['peak_mb']} MB of {r['peak_limit_mb']}" if "peak_mb" in r else ""
    print(f"{'ok  ' if r['ok'] else 'OVER'} {r['name']:<58}{r['seconds']:>9.4f} s  {r['ratio']:>6.2f} x {r['against']:<24}{limit}{more}", flush=True)


GROUPS = {"starts": starts, "runs": runs, "ledger": record, "artifacts": lambda: [*artifact_put(), *snapshot_check()], "history": history, "verify": verify_many, "events": events, "ingest": ingest, "contract": contract, "snapshots": snapshots, "paired": paired, "gates": gates, "backtest": folds}


def main() -> None:
    "All groups, or those that the command line names"
    wanted = sys.argv[1:] or list(GROUPS)
    if odd := set(wanted) - set(GROUPS): raise SystemExit(f"there is no group {', '.join(odd)}; there are {', '.join(GROUPS)}")
    rows = []
    for name in wanted:
        made = GROUPS[name]()
        for found in made: show(found)
        if name == "gates": print(side_by_side(made), flush=True)
        rows += made
    (HERE/"results.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__": main()
