"""What it costs to keep events, and to ask what was known: through the buffer, as a table, and a training set as of a moment.

`python -m bench.events 5000000` takes another number of predictions than a million."""
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.record import in_turn
from bench.record import row as pair

NOW = datetime(2014, 1, 1, tzinfo=UTC)
NUMBERS, TEXTS = 12, 4


def store(folder: Path) -> tuple[Any, Any, list]:
    "A store of events, its database, and a list that plays the ledger"
    from retrain_nb.stores.database import open_database
    from retrain_nb.stores.events import Events
    folder.mkdir(parents=True, exist_ok=True)
    named: list = []
    return Events(folder/"signals", lambda c: named), open_database(f"sqlite:///{folder}/ledger.db"), named


def tables(n: int) -> tuple[Any, Any]:
    "Predictions of a year with sixteen features, and their outcomes a few hours later, one in fifty of them corrected"
    import numpy as np
    import pyarrow as pa
    rng, zero = np.random.default_rng(0), 1356998400_000_000
    times = np.sort(rng.integers(0, 365*86400, n))*1_000_000 + zero
    moments = lambda t: pa.array(t, pa.int64()).cast(pa.timestamp("us", "UTC"))
    ids = np.char.add("flight-", np.char.zfill(rng.permutation(n).astype(str), 9))
    asked = {"id": pa.array(ids), "subject": pa.array(rng.choice(["EWR", "JFK", "LGA"], n)), "event_time": moments(times), "known_at": moments(times)}
    asked |= {f"features.x{i}": pa.array(rng.normal(size=n).round(3)) for i in range(NUMBERS)}
    asked |= {f"features.c{i}": pa.array(rng.choice(["UA", "DL", "B6", "AA", "WN"], n)) for i in range(TEXTS)}
    more = rng.choice(n, n//50, replace=False)
    which = np.r_[np.arange(n), more]
    told = times[which] + rng.integers(3600, 8*3600, len(which))*1_000_000 + np.r_[np.zeros(n, int), np.full(len(more), 86400_000_000)]
    names = np.char.add(ids[which], np.r_[np.full(n, ":1"), np.full(len(more), ":2")])
    came = {"id": pa.array(names), "subject": pa.array(ids[which]), "event_time": moments(told), "known_at": moments(told), "value": pa.array(rng.integers(0, 2, len(which)).astype(float))}
    return pa.table(asked), pa.table(came)


def buffered(batches: int = 20, size: int = 1000) -> dict:
    "Batches of predictions as JSON values, each parsed, looked up, inserted and durable, against the bare insert of the same rows, as durable"
    from retrain_nb.events import micros
    from retrain_nb.stores.events import INSERT, arrive
    table, _ = tables(2*(batches + 1)*size)
    sent = [{"kind": "prediction", "id": r["id"], "subject": r["subject"], "event_time": r["event_time"].isoformat(), "known_at": r["known_at"].isoformat(),
             "data": {"features": {k[9:]: v for k, v in r.items() if k.startswith("features.")}}} for r in table.to_pylist()]
    part = lambda n: sent[n*size:(n + 1)*size]
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        (events, engine, _), (_, plain, _) = store(Path(folder)/"ours"), store(Path(folder)/"plain")
        rows = [[(e.kind, e.id, e.subject, micros(e.event_time), micros(e.known_at), e.text) for e in (arrive(s, NOW).found for s in part(2*n + 1))] for n in range(batches + 1)]
        def ours(n: int) -> None:
            with engine.begin() as c: assert events.accept(c, [arrive(s, NOW) for s in part(2*n)], NOW).accepted == size
        def least(n: int) -> None:
            with plain.begin() as c: c.exec_driver_sql(INSERT["sqlite"], rows[n])
        cpu = time.process_time()
        took = in_turn(batches, ours, least)
        cpu = (time.process_time() - cpu)/(batches + 1)/size
        for e in (engine, plain): e.dispose()
    return pair(f"events through the buffer, batches of {size}", *took, "bare insert, as durable", limit=8.0, per_second=round(size/took[0]), cpu_us_each=round(1e6*cpu, 1))


def floor_write(path: Path, table: Any) -> None:
    "The least that a durable, content-addressed table can mean: write Parquet, hash it, wait for the disk"
    import pyarrow as pa
    import pyarrow.parquet as pq
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=1)
    data = sink.getvalue()
    hashlib.sha256(data).hexdigest()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def at_once(n: int = 200_000, times: int = 3) -> dict:
    "A table of predictions, checked row by row, looked up and sealed, against writing it as it is"
    table, _ = tables(2*(times + 1)*n)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        events, engine, named = store(Path(folder)/"ours")
        def ours(k: int) -> None:
            from retrain_nb.stores.database import reading
            with reading(engine) as c: sealing = events.gather_table(c, "prediction", table.slice(2*k*n, n), NOW)
            with engine.begin() as c: events.finish(c, sealing, NOW)
            named.extend(sealing.segments)
            assert sealing.receipt.accepted == n
        took = in_turn(times, ours, lambda k: floor_write(Path(folder)/f"{k}.parquet", table.slice((2*k + 1)*n, n)))
        engine.dispose()
    return pair(f"events as a table of {n:,}", *took, "bare Parquet + fsync + hash", limit=6.0, per_second=round(n/took[0]))


def training(n: int = 1_000_000, times: int = 3) -> dict:
    "A training set as of the middle of the year against the bare read of a file that holds its rows; CPU seconds and peak memory, each in a process of its own"
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        root = Path(folder)
        for where, many in ((root, n), (root/"few", 10_000)): subprocess.run([sys.executable, "-m", "bench.events", "make", str(where), str(many)], check=True)
        found: dict[str, list[dict]] = {"ours": [], "bare": []}
        for k in range(times + 1):
            for way in ("ours", "bare")[::1 if k % 2 else -1]:
                done = subprocess.run([sys.executable, "-m", "bench.events", way, folder], check=True, capture_output=True, text=True)
                found[way].append(dict(zip(("cpu", "wall", "peak", "result", "rows"), map(float, done.stdout.split()))))
        size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    ours, bare = (sorted(f["cpu"] for f in found[w][1:])[times//2] for w in ("ours", "bare"))
    ratio = sorted(a["cpu"]/b["cpu"] for a, b in zip(found["ours"][1:], found["bare"][1:]))[times//2]
    peak = max(f["peak"]/f["result"] for f in found["ours"])
    made = pair(f"training set as of T, {int(found['ours'][0]['rows']):,} of {n:,} rows (CPU)", ours, bare, ratio, "bare read of those rows", limit=2.0,
                peak_mb=round(max(f["peak"] for f in found["ours"])/2**20), peak_limit_mb=round(2*found["ours"][0]["result"]/2**20), peak_over_result=round(peak, 2), mb=round(size/1e6))
    return {**made, "ok": made["ok"] and peak <= 2}


MIDDLE = datetime(2013, 9, 1, tzinfo=UTC)


def make(folder: Path, n: int) -> None:
    "A store with `n` predictions and their outcomes, and beside it a file with the rows of the training set"
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    from retrain_nb.records import as_json
    from retrain_nb.stores.database import reading
    events, engine, named = store(folder)
    for kind, table in zip(("prediction", "outcome"), tables(n)):
        with reading(engine) as c: sealing = events.gather_table(c, kind, table, NOW)
        with engine.begin() as c: events.finish(c, sealing, NOW)
        named.extend(sealing.segments)
    (folder/"named.json").write_text(json.dumps(as_json(named)))
    frame = frame_of(folder)
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), folder/"bare.parquet", compression="zstd", compression_level=1)


def frame_of(folder: Path) -> Any:
    "The training set"
    import json

    from retrain_nb.records import from_json
    from retrain_nb.stages import signals
    from retrain_nb.stores.database import reading
    from retrain_nb.stores.events import Segment
    events, engine, named = store(folder)
    named += [from_json(Segment, s) for s in json.loads((folder/"named.json").read_text())]
    with reading(engine) as c:
        asked = events.read(c, "prediction", MIDDLE, end=MIDDLE, columns=["id", "event_time", "known_at", "features.*"])
        came = events.read(c, "outcome", MIDDLE, columns=["subject", "event_time", "known_at", "value"])
    return signals.training_frame(asked, came, MIDDLE, "flight", "due", "late", "told")


def bare_of(folder: Path) -> Any:
    "The same rows, as anybody would read them"
    import pyarrow.parquet as pq
    return pq.read_table(folder/"bare.parquet").to_pandas()


def measure(read: Any, folder: Path) -> None:
    "CPU and wall seconds, bytes of memory at the peak above the start, bytes of the result, rows"
    read(folder/"few") # Libraries load a part of themselves, 40 MB, when they are first used; that is not what a row costs
    def highest() -> int: return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])*1024
    before = highest()
    cpu, start = time.process_time(), time.perf_counter()
    frame = read(folder)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    print(cpu, wall, highest() - before, int(frame.memory_usage(deep=True).sum()), len(frame))


def events(n: int = 1_000_000) -> list[dict]:
    "All of them"
    return [buffered(), at_once(), training(n)]


if __name__ == "__main__":
    what = sys.argv[1:] or ["1000000"]
    if what[0] == "make": make(Path(what[1]), int(what[2]))
    elif what[0] in ("ours", "bare"): measure({"ours": frame_of, "bare": bare_of}[what[0]], Path(what[1]))
    else:
        from bench.__main__ import show
        for found in events(int(what[0])): show(found)
