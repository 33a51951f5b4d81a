"What it costs to hold rows to a drafted contract, against the same checks written by hand as polars expressions on the same frame, and the memory it takes"
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.table import made

NOW = datetime(2022, 9, 28, tzinfo=UTC)
SIZES = (500_000, 2_000_000, 5_000_000)


def by_hand(frame: Any, contract: Any) -> Any:
    "One polars query with all that the contract promises, the conversion of the frame included, as that is what both are given"
    import polars as pl
    key, due = pl.col(contract.table.key), pl.col(contract.table.time)
    asks = {"key": (key.is_duplicated() | key.is_null()).sum(), "time": (due.is_null() | (due > NOW)).sum(), "newest": due.filter(due <= NOW).max(),
            "week": (due > due.max() - timedelta(days=7)).sum(), "relation": (pl.col("known") < due).sum()}
    for name, rules in contract.columns.items():
        c = pl.col(name)
        if rules.max_missing < 1: asks[f"{name} missing"] = c.is_null().mean()
        if rules.kind == "number": asks[f"{name} range"] = (~c.is_between(rules.min, rules.max)).sum()
        if rules.kind == "flag": asks[f"{name} flag"] = (~c.cast(pl.Float64).is_in([0.0, 1.0])).sum()
        if rules.categories: asks[f"{name} categories"] = (~c.is_in(rules.categories)).sum()
        if rules.max_categories: asks[f"{name} most"] = c.n_unique()
        if rules.reference and rules.reference.categories: asks[f"{name} counts"] = c.value_counts().implode()
        for edge in (rules.reference and rules.reference.edges) or (): asks[f"{name} {edge}"] = (c <= edge).sum()
    return pl.from_pandas(frame).select(**asks)


def peak(reset: bool = False) -> tuple[float, float]:
    "Resident MB now and at most since the last reset, as Linux counts them"
    if reset: Path("/proc/self/clear_refs").write_text("5")
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(found[k].split()[0])/1024 for k in ("VmRSS", "VmHWM")) # type: ignore[return-value]


def measured(n: int, rounds: int = 5) -> dict[str, Any]:
    "Seconds of both ways in turn, and the memory of ours, in this process; the frame is as a snapshot gives it"
    from retrain_nb.promises import parse_contract
    from retrain_nb.stages.contract import check_contract
    from retrain_nb.stages.drafting import Names, draft_contract
    from retrain_nb.stores.snapshots import Snapshots
    check_contract(small := made(1000), parse_contract(text := draft_contract(small, Names(key="id", time="due", label="late", label_time="known"), NOW)), NOW) # Loads all
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        store = Snapshots(Path(folder))
        name = store.freeze(made(n), "due").digest
        frame = store.read(name)
    text = draft_contract(frame, Names(key="id", time="due", label="late", label_time="known"), NOW)
    contract, data = parse_contract(text), float(frame.memory_usage(deep=True).sum())/2**20
    start, _ = peak(reset=True)
    outcome = check_contract(frame, contract, NOW).verdict.outcome
    most = peak()[1]
    took: dict[str, list[float]] = {"ours": [], "hand": [], "ours_cpu": [], "hand_cpu": []}
    for i in range(rounds):
        for way, work in (("ours", lambda: check_contract(frame, contract, NOW)), ("hand", lambda: by_hand(frame, contract)))[::1 if i % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            took[way].append(time.perf_counter() - wall)
            took[f"{way}_cpu"].append(time.process_time() - cpu)
    return {**took, "outcome": outcome, "data": data, "added": most - start}


def contract(sizes: tuple[int, ...] = SIZES) -> list[dict]:
    "The rows of the table; each size in a process of its own, so that its memory is its own"
    rows = []
    for n in sizes:
        code = f"import json; from bench.contract import measured; print(json.dumps(measured({n})))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        if found["outcome"] != "PASS": raise SystemExit(f"{n} rows do not keep the contract that was drafted from them")
        for kind, words in (("", "wall"), ("_cpu", "CPU")):
            ours, hand = found[f"ours{kind}"], found[f"hand{kind}"]
            ratio = statistics.median(a/b for a, b in zip(ours, hand))
            rows.append({"name": f"contract of {n:,} rows x 20 columns ({words})", "seconds": round(statistics.median(ours), 3), "floor": round(statistics.median(hand), 3),
                         "ratio": round(ratio, 2), "against": "polars by hand", "limit": 1.5, "limit_seconds": None, "ok": ratio <= 1.5})
        total = found["data"] + found["added"] # The rows themselves, and what the check took beside them
        rows[-1] |= {"peak_mb": round(total), "peak_limit_mb": round(2*found["data"]), "ok": rows[-1]["ok"] and total <= 2*found["data"]}
    return rows


if __name__ == "__main__":
    for line in contract(): print(line)
