"What a durable, checked record costs, as ratios against a floor measured in the same run: artifacts put, snapshots read"
import hashlib
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def row(name: str, seconds: float, floor: float, ratio: float, against: str, limit: float, **more: Any) -> dict:
    "One line of the table, as in `bench.__main__`, with a ratio that was measured pair by pair"
    return {"name": name, "seconds": round(seconds, 5), "floor": round(floor, 5), "ratio": round(ratio, 2), "against": against, "limit": limit,
            "limit_seconds": None, "ok": ratio <= limit, **more}


def in_turn(times: int, ours: Callable[[int], Any], least: Callable[[int], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, float, float]:
    """Median seconds of both ways, and the median of the ratios within each round.

    A disk that others use is ten times slower from one second to the next; within a round both meet the same one. Their order
    changes each time, and the first round is not counted."""
    took: tuple[list[float], list[float]] = ([], [])
    for n in range(times + 1):
        for way, seconds in ((ours, took[0]), (least, took[1]))[::1 if n % 2 else -1]:
            start = clock()
            way(n)
            seconds.append(clock() - start)
    a, b = (seconds[1:] for seconds in took)
    return statistics.median(a), statistics.median(b), statistics.median(x/y for x, y in zip(a, b))


def floor_put(folder: Path, name: str, data: bytes) -> None:
    "The least that durable and content-addressed can mean: hash the bytes, write them, wait for them, wait for their name"
    hashlib.sha256(data).hexdigest()
    with (folder/name).open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try: os.fsync(fd)
    finally: os.close(fd)


def put_of(size: int, times: int) -> tuple[float, float, float]:
    "A put of `size` bytes, in a store that was empty at the start, and its floor"
    from retrain_nb.stores.artifacts import Artifacts
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder: # Beside the work, as /tmp may be in memory
        store, plain = Artifacts(Path(folder)/"store"), Path(folder)/"plain"
        plain.mkdir()
        fresh = [b'{"x": "%s' % secrets.token_hex(8).encode() + b"0"*(size - 25) + b'"}' for _ in range(2*(times + 1))]
        return in_turn(times, lambda n: store.put(fresh[2*n], "record"), lambda n: floor_put(plain, str(n), fresh[2*n + 1]))


def artifact_put(times: int = 300) -> list[dict]:
    "`Artifacts.put` against write + fsync of file and folder + SHA-256 of the same bytes"
    sizes = {"200 kB": (200_000, times), "5 MB": (5_000_000, times//10)}
    return [row(f"artifact put, {words}", *put_of(*what), "write + fsync + hash", limit=1.3) for words, what in sizes.items()]


def snapshot_check(times: int = 15) -> list[dict]:
    "CPU of reading a snapshot with the digest of every file checked, against the same reading without"
    import numpy as np
    import pandas as pd

    from retrain_nb.stores import snapshots
    rng, n = np.random.default_rng(0), 300_000
    due = pd.Series(pd.to_datetime("2013-01-01T00:00Z") + pd.to_timedelta(rng.integers(0, 365*24*60, n), unit="min")).dt.as_unit("us")
    frame = pd.DataFrame({"key": [f"F{i}" for i in range(n)], "due": due, "carrier": pd.Categorical(rng.choice(["UA", "DL", "B6"], n)),
                          **{f"x{i}": rng.normal(size=n).round(3) for i in range(8)}, "late": rng.random(n) < .2})
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        store, checked = snapshots.Snapshots(Path(folder)), snapshots.read_checked
        name = store.freeze(frame, "due").digest
        def without(_: int) -> None:
            snapshots.read_checked = lambda path, expected: Path(path).read_bytes()
            try: store.read(name)
            finally: snapshots.read_checked = checked
        took = in_turn(times, lambda _: store.read(name), without, clock=time.process_time)
        size = sum(p.bytes for p in store.describe(name).parts)
    return [row("snapshot read, every file checked (CPU)", *took, "the same, unchecked", limit=1.10, mb=round(size/1e6, 1))]


if __name__ == "__main__":
    from bench.__main__ import show
    for found in [*artifact_put(), *snapshot_check()]: show(found)
