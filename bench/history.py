"The questions about the past, at ten thousand models: `show`, `live` and search, on a database that is open, each with a limit of 50 ms"
import hashlib
import json
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

LIMIT = 0.05 # Seconds
START = datetime(2013, 1, 1, tzinfo=UTC)


def name(*what: Any) -> str: return hashlib.sha256(repr(what).encode()).hexdigest()


def nights(n: int) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    "What `n` nights would have written, one model each; two in three are refused"
    leaf = {"name": "log_loss", "outcome": "PASS", "reason": "0.3 at most 0.4", "value": 0.3, "interval": [0.2, 0.4], "n": 9000, "threshold": 0.4, "method": "t", "parts": []}
    verdict = {**leaf, "name": "refresh", "parts": [{**leaf, "name": f"check {i}"} for i in range(12)]}
    serving = ""
    for i in range(n):
        at, run, rows, model = (START + timedelta(hours=6*i)).isoformat().replace("+00:00", "Z"), f"retrain-{name('run', i)[:12]}", name("rows", i), name("model", i)
        yield "snapshot.frozen", f"snapshot:{i}", {"snapshot": rows, "as_of": at, "rows": i, "start": at, "end": at, "parts": [], "source": {"adapter": "parcels.feed:rows", "code": name("code")}}, at
        yield "run.planned", f"{run}:planned", {"run": run, "page": "retrain", "recipe": name("recipe", i), "as_of": at, "cycle": f"cycle-{i}", "code": name("page"),
                                                 "parameters": {"snapshot": rows, "champion": serving, "settings": name("settings", i//100), "seed": 0}}, at
        yield "run.started", f"{run}:started", {"run": run, "attempt": 1, "pid": 1, "host": "h", "lease_until": at}, at
        yield "run.ended", f"{run}:ended", {"run": run, "state": "ok", "outcome": "PASS", "verdict": verdict, "model": model, "metrics": {"auc": {"value": 0.7, "low": 0.6, "high": 0.8}},
                                             "notebook": name("notebook", i), "record": name("record", i), "report": f"reports/{run}/report.html"}, at
        told = {"run": run, "as_of": at, "verdict": verdict, "reason": "so it was decided", "by": "cron", "decision": "refresh", "snapshot": rows, "previous": serving}
        if i % 3: yield "champion.kept", f"cycle-{i}:champion", {**told, "model": serving}, at
        else:
            serving = model
            yield "champion.set", f"cycle-{i}:champion", {**told, "model": model}, at


def ask(question: Callable[[], Any], times: int = 15) -> float:
    "Median CPU seconds, after one that warms the cache: nothing here waits for anything but the processor"
    took = []
    for _ in range(times + 1):
        start = time.process_time()
        question()
        took.append(time.process_time() - start)
    return statistics.median(took[1:])


def floor(path: Path, model: str) -> float:
    "The least that any of these questions costs: one row by its key, asked of the same file by sqlite3 alone"
    connection = sqlite3.connect(path)
    try: return ask(lambda: connection.execute("SELECT * FROM models WHERE model = ?", (model,)).fetchone())
    finally: connection.close()


def history(row: Callable[..., dict[str, Any]], n: int = 10_000) -> list[dict[str, Any]]:
    "A row of the table for each question; `row` makes it"
    from retrain_nb.loop.history import lineage, live
    from retrain_nb.records import UsageError
    from retrain_nb.services.workbench import furnish, open_workbench
    from retrain_nb.stores import catalog, ledger
    root = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        furnish(root, "toy")
        book = open_workbench(root)
        with book.engine.begin() as connection: # Past the ledger's door, which hashes and signs: it is not what is measured here
            told = enumerate(nights(n), 1)
            connection.execute(ledger.table.insert(), [{"seq": seq, "kind": kind, "key": key, "at": at, "body": json.dumps(body, sort_keys=True), "leaf": name(seq)}
                                                       for seq, (kind, key, body, at) in told])
            catalog.rebuild(connection, ledger.entries(connection))
        middle, last, run = name("model", n//2), name("model", (n - 1)//3*3), f"retrain-{name('run', n//2)[:12]}"
        def misspelled() -> None:
            try: book.ask(catalog.find, "retrain-zzzz")
            except UsageError: pass
        least = floor(book.store/"ledger.db", middle)
        questions = {"show MODEL, with its lineage": lambda: (book.ask(catalog.find, middle[:12]), lineage(book, middle[:12])),
                     "show CHAMPION, with its lineage": lambda: (book.ask(catalog.find, last[:12]), lineage(book, last[:12])),
                     "show RUN, with its lineage": lambda: (book.ask(catalog.find, run), lineage(book, run)),
                     "show SOURCE, with the newest of all that came of it": lambda: lineage(book, "parcels.feed:rows"),
                     "live --at the middle": lambda: live(book, START + timedelta(hours=3*n)), "live --at the first night": lambda: live(book, START),
                     "search by eight digits": lambda: book.ask(catalog.find, middle[:8]), "search for what is not there": misspelled}
        return [row(f"{what} ({n:,} models, CPU)", ask(question), least, "one row by its key, sqlite3", limit_seconds=LIMIT) for what, question in questions.items()]
    finally: shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    from bench.__main__ import row
    for r in history(row): print(f"{'ok  ' if r['ok'] else 'OVER'} {r['name']:<70}{1000*r['seconds']:>8.1f} ms  {r['ratio']:>8.1f} x {r['against']}")
