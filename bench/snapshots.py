"""What a snapshot costs to write, against one plain Parquet file that is written, synced and hashed, and what an increment of 1 % writes.

A snapshot is a file for each month, with sorted dictionaries and times; the plain file is one, in the frame's own order. Where `BENCH_PEERS`
names a Python that has `dvc` and `deltalake`, theirs are shown too, each against a plain file that was written by the same process."""
import hashlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.record import in_turn, row
from bench.table import made

SYNCED = """
import hashlib, os
def plain(frame, path):
    frame.to_parquet(path, compression="zstd", compression_level=1, index=False)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        hashlib.sha256(file.read()).hexdigest()
"""

PEERS = SYNCED + """
import json, shutil, statistics, sys, time
import pandas as pd
from deltalake import write_deltalake
from dvc.repo import Repo
frame = pd.read_parquet(sys.argv[1])
os.chdir(sys.argv[2])
repo, took = Repo.init(".", no_scm=True), {"plain": [], "DVC": [], "delta-rs": []}
def dvc(n):
    plain(frame, f"dvc-{n}.parquet")
    repo.add(f"dvc-{n}.parquet")
ways = {"plain": lambda n: plain(frame, f"plain-{n}.parquet"), "DVC": dvc, "delta-rs": lambda n: write_deltalake(f"delta-{n}", frame)}
for n in range(4):
    for name, way in ways.items():
        start = time.perf_counter()
        frame.iat[0, 0] = f"R-{n}" # Other bytes each time, or DVC would find them there
        way(n)
        took[name].append(time.perf_counter() - start)
print(json.dumps({name: statistics.median(a/b for a, b in list(zip(took[name], took["plain"]))[1:]) for name in ("DVC", "delta-rs")}))
"""


def plain(frame: Any, path: Path) -> None:
    "One file, durable and hashed"
    frame.to_parquet(path, compression="zstd", compression_level=1, index=False)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        hashlib.sha256(file.read()).hexdigest()


def written(n: int = 5_000_000, times: int = 5) -> list[dict]:
    "A freeze of rows that no store has yet: as the clock has it, and in CPU, which both cores together spend"
    from retrain_nb.stores.snapshots import Snapshots
    frame = made(n)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        at = Path(folder)
        def ours(i: int) -> None: Snapshots(at/f"{clock.__name__}-{i}").freeze(frame, "due")
        def least(i: int) -> None: plain(frame, at/f"{clock.__name__}-{i}.parquet")
        clock = time.perf_counter
        found = [row(f"snapshot of {n:,} rows x 20 columns (wall)", *in_turn(times, ours, least), "plain file + fsync + hash", limit=1.3)]
        clock = time.process_time
        cpu = row("  the same (CPU)", *in_turn(2, ours, least, clock), "plain file + fsync + hash", limit=1.3)
        return [*found, cpu, *peers(frame.iloc[:1_000_000], at)]


def peers(frame: Any, folder: Path) -> list[dict]:
    "DVC and delta-rs, where there are any"
    if not (python := os.environ.get("BENCH_PEERS")): return []
    frame.to_parquet(path := (folder/"rows.parquet").absolute())
    (room := (folder/"peers").absolute()).mkdir()
    done = subprocess.run([python, "-c", PEERS, str(path), str(room)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return [{"name": f"  {name}, {len(frame):,} rows", "seconds": 0.0, "floor": 0.0, "ratio": round(ratio, 2), "against": "its plain file", "limit": None,
             "limit_seconds": None, "ok": True} for name, ratio in found.items()]


def increment(n: int = 1_000_000) -> list[dict]:
    "Bytes that 1 % more rows write, of those of the whole: a month that begins, and days within a month that is there, which is written anew"
    from retrain_nb.stores.snapshots import Snapshots
    frame = made(n, days=3043) # A hundred calendar months
    found = []
    for words, cut, limit in (("a new month", "2028-04-01T00:00Z", 1.2), ("within a month", "2028-03-20T00:00Z", 1.2)):
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
            end = frame.due.max() if words == "a new month" else frame.due[frame.due >= cut].iloc[n//100]
            store, start = Snapshots(Path(folder)), time.perf_counter()
            before = {p.sha256 for p in store.freeze(frame[frame.due < cut], "due").parts}
            middle = time.perf_counter()
            after = store.freeze(frame[frame.due <= end], "due")
            took, fresh = time.perf_counter() - middle, sum(p.bytes for p in after.parts if p.sha256 not in before)
        share = 100*fresh/sum(p.bytes for p in after.parts)
        rows = 100*((frame.due >= cut) & (frame.due <= end)).sum()/after.rows
        found.append({"name": f"increment of {rows:.2f} % of the rows, {words}: % of the bytes", "seconds": round(took, 3), "floor": round(middle - start, 3), "ratio": round(share, 2),
                      "against": "the whole", "limit": limit, "limit_seconds": None, "ok": share <= limit})
    return found


def snapshots() -> list[dict]:
    "The rows of the table"
    return [*increment(), *written()]


if __name__ == "__main__":
    from bench.__main__ import show
    for line in snapshots(): show(line)
