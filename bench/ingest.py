"What it costs to take events in durably: over HTTP in batches, against bare inserts; from a Parquet file, against the least that could be written. Wall clock, in turn."
import hashlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.rows import row

NOW = datetime(2024, 6, 1, tzinfo=UTC)
COMMAND = "import sys; from retrain_nb.faces.cli import main; sys.exit(main())"


@contextmanager
def serving(root: Path) -> Iterator[tuple[int, str, int]]:
    "A server on this workbench, in a process of its own: its port, its token and its process"
    server = subprocess.Popen([sys.executable, "-c", COMMAND, "serve", "--root", str(root), "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr
        found = re.search(r":(\d+) takes events", line := server.stderr.readline())
        assert found, line
        yield int(found[1]), (root/".retrain"/"keys"/"http-token").read_text().strip(), server.pid
    finally:
        server.terminate()
        server.wait()


def sent(first: int, batches: int, size: int) -> list[bytes]:
    "Batches of predictions with five features, as JSON lines"
    def one(i: int) -> str:
        features = {"distance": i % 2500 + .5, "hour": i % 24, "carrier": "UA", "origin": "JFK", "month": i % 12}
        return json.dumps({"kind": "prediction", "id": f"f{i}", "subject": f"f{i}", "event_time": "2024-05-01T03:00:00Z", "data": {"features": features, "score": .25}})
    return ["\n".join(map(one, range(first + b*size, first + (b + 1)*size))).encode() for b in range(batches)]


def post(port: int, token: str, bodies: list[bytes], senders: int = 4) -> float:
    "Seconds until every batch was answered, with some senders at once"
    left, accepted, errors = list(bodies), [], []
    def send() -> None:
        connection, last = http.client.HTTPConnection("127.0.0.1", port), time.perf_counter()
        while True:
            try: body = left.pop()
            except IndexError: return connection.close()
            try:
                idle, begun = time.perf_counter() - last, time.perf_counter()
                connection.request("POST", "/v1/events", body, {"Authorization": f"Bearer {token}", "Content-Type": "application/x-ndjson"})
                answer = connection.getresponse()
                accepted.append(json.loads(answer.read())["accepted"])
            except Exception as e: # A thread that dies must not make a faster bench
                errors.append(f"{e!r} after {time.perf_counter() - begun:.2f} s, idle before {idle:.2f} s")
                return
            last = time.perf_counter()
    threads = [threading.Thread(target=send) for _ in range(senders)]
    start = time.perf_counter()
    for t in threads: t.start()
    for t in threads: t.join()
    took = time.perf_counter() - start
    assert not errors and sum(accepted) == sum(len(b.splitlines()) for b in bodies), (errors, sum(accepted))
    return took


def bare(folder: Path, bodies: list[bytes]) -> float:
    "Seconds to insert the same lines, one transaction for each batch, into a table with the same two indexes in a database that is as durable"
    import sqlalchemy as sa

    from retrain_nb.stores.database import open_database
    engine = open_database(f"sqlite:///{folder/'bare.db'}")
    with engine.begin() as c: c.exec_driver_sql("CREATE TABLE IF NOT EXISTS bare (seq INTEGER PRIMARY KEY, kind TEXT, id TEXT, data TEXT, UNIQUE (kind, id))")
    rows = [[("prediction", hashlib.sha1(line).hexdigest(), line.decode()) for line in body.splitlines()] for body in bodies]
    start = time.perf_counter()
    for batch in rows:
        with engine.begin() as c: c.exec_driver_sql("INSERT INTO bare (kind, id, data) VALUES (?, ?, ?)", batch)
    took = time.perf_counter() - start
    with engine.connect() as c: assert c.execute(sa.text("SELECT count(*) FROM bare")).scalar()
    engine.dispose()
    return took


def over_http(rounds: int = 5, batches: int = 20, size: int = 1000) -> list[dict]:
    """Events a second through a real server.

    On a machine with other work the wall clock says how busy that was; what the server itself needs is told by its CPU."""
    import psutil

    from retrain_nb.services.workbench import furnish
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder: # Beside the work, as /tmp may be in memory
        root = Path(folder)
        furnish(root, "toy")
        with serving(root) as (port, token, pid):
            pairs, spent, server = [], [], psutil.Process(pid)
            for r in range(rounds + 1):
                bodies, before = sent(r*batches*size, batches, size), server.cpu_times()
                pairs.append((post(port, token, bodies), bare(root, bodies)))
                spent.append(sum(server.cpu_times()[:2]) - sum(before[:2]))
        ours, floor = (statistics.median(x) for x in zip(*pairs[1:]))
        ratio, cpu = statistics.median(a/b for a, b in pairs[1:]), statistics.median(spent[1:])
    n = batches*size
    found = row(f"{n:,} events over HTTP, {size} at a time (wall)", ours, floor, "bare inserts", limit=HTTP)
    return [{**found, "ratio": round(ratio, 2), "ok": ratio <= HTTP, "per_second": round(n/ours)},
            row("  the same (CPU of the server)", cpu, n/20_000, "20,000 a second", limit=1.0, per_second=round(n/cpu))]


def least(path: Path, table: Any) -> None:
    "What any durable copy must do: read, sort by time, write, wait, hash"
    import pyarrow.parquet as pq
    found = pq.read_table(table).sort_by("due")
    pq.write_table(found, path, compression="zstd", compression_level=1)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        hashlib.sha256(file.read()).hexdigest()


def from_parquet(rounds: int = 5, n: int = 300_000) -> dict:
    "Events a second from Parquet files"
    import numpy as np
    import pandas as pd

    from retrain_nb.loop.ingest import file_source, take
    from retrain_nb.mapping import Columns
    from retrain_nb.services.workbench import furnish, open_workbench
    rng, declared, pairs = np.random.default_rng(0), Columns(kind="prediction", id="flight", event_time="due", features="*"), []
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        furnish(Path(folder), "toy")
        book = open_workbench(folder)
        for r in range(rounds + 1):
            frame = pd.DataFrame({"flight": [f"{r}-{i}" for i in range(n)], "due": pd.to_datetime("2013-01-01T00:00Z") + pd.to_timedelta(rng.integers(0, 90*24*60, n), unit="min"),
                                  **{f"x{i}": rng.normal(size=n) for i in range(5)}, "carrier": rng.choice(["UA", "DL", "B6"], n)})
            frame.to_parquet(path := Path(folder)/f"{r}.parquet")
            start = time.perf_counter()
            least(Path(folder)/f"bare-{r}.parquet", path)
            middle = time.perf_counter()
            taken = take(book, file_source(path, declared), declared, NOW)
            pairs.append((time.perf_counter() - middle, middle - start))
            assert taken.accepted == n, taken
        book.engine.dispose()
    ours, floor = (statistics.median(x) for x in zip(*pairs[1:]))
    ratio = statistics.median(a/b for a, b in pairs[1:])
    found = row(f"{n:,} events from a Parquet file (wall)", ours, floor, "read, sort, write, hash", limit=FILE)
    return {**found, "ratio": round(ratio, 2), "ok": ratio <= FILE, "per_second": round(n/ours)}


HTTP, FILE = 3.0, 6.0


def ingest() -> list[dict]:
    "The rows of the table"
    return [*over_http(), from_parquet()]


if __name__ == "__main__":
    for line in ingest(): print(line)
