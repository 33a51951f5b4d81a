"What a signed, durable entry costs over a bare commit of the same database; a proof; and a digest over the hash itself. Wall clock, in turn."
import hashlib
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.rows import row

NOW = datetime(2024, 6, 1, tzinfo=UTC)


def took(action: Any, *args: Any) -> float:
    start = time.perf_counter()
    action(*args)
    return time.perf_counter() - start


def grown(root: Path, entries: int) -> Any:
    "A toy workbench whose ledger has so many entries already"
    from retrain_nb.services.workbench import furnish, open_workbench
    from retrain_nb.stores import ledger
    furnish(root, "toy")
    book = open_workbench(root)
    book.append("workbench.created", "created", {"name": "bench"}, NOW)
    with book.engine.begin() as connection:
        for i in range(entries): ledger.append(connection, "run.noted", f"note:{i}", {"run": f"retrain-{i}", "text": "x"*200}, "2024-06-01T00:00:00Z")
        ledger.seal(connection, book.checkpoint)
    return book


def appends(book: Any, times: int) -> tuple[list[float], list[float]]:
    "Seconds of an entry with its projections, tree and signed head; and of a transaction that writes one row of the same size"
    import sqlalchemy as sa
    bare = sa.Table("bench_bare", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("body", sa.Text))
    with book.engine.begin() as connection: bare.create(connection)
    def commit(i: int) -> None:
        with book.engine.begin() as connection: connection.execute(bare.insert().values(id=i, body="x"*600))
    def append(i: int) -> None: book.append("run.noted", f"more:{i}", {"run": f"retrain-{i}", "text": "x"*200}, NOW)
    pairs = [(took(commit, i), took(append, i)) for i in range(times + 5)][5:]
    with book.engine.begin() as connection: bare.drop(connection)
    return [b for _, b in pairs], [a for a, _ in pairs]


def proofs(book: Any, times: int) -> float:
    "Seconds to make and check one inclusion proof"
    from retrain_nb import merkle
    from retrain_nb.stores import ledger
    from retrain_nb.stores.database import reading
    with reading(book.engine) as connection:
        size, root = (found := ledger.last_head(connection))[0], ledger.head(connection, found[0])
        leaves = {e.seq: bytes.fromhex(e.leaf) for e in ledger.entries(connection, size - times)}
        def one(seq: int) -> None: assert merkle.check_inclusion(leaves[seq], seq - 1, size, ledger.proof(connection, seq, size), root)
        return statistics.median(took(one, seq) for seq in leaves)


def hashing(folder: Path) -> list[tuple[float, float]]:
    "Seconds to digest 64 MB in memory against the bare hash, and a file of them against reading and hashing it"
    from retrain_nb.digest import digest, digest_file
    data, path = bytes(64 << 20), folder/"large"
    path.write_bytes(data)
    bare, read = (lambda: hashlib.sha256(data).hexdigest()), (lambda: hashlib.sha256(path.read_bytes()).hexdigest())
    rounds = [(took(digest, data), took(bare), took(digest_file, path), took(read)) for _ in range(8)][1:]
    ours, hashed, file, whole = map(statistics.median, zip(*rounds))
    return [(ours, hashed), (file, whole)]


def record(entries: int = 20_000, times: int = 200) -> list[dict]:
    "The rows of the table"
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        book = grown(Path(folder)/"book", entries)
        ours, bare = appends(book, times)
        proof, (memory, file) = proofs(book, times), hashing(Path(folder))
        book.engine.dispose()
    ratio = statistics.median(a/b for a, b in zip(ours, bare))
    entry = row(f"one entry, durable and signed, among {entries:,} (wall)", statistics.median(ours), statistics.median(bare), "bare commit", limit=1.5)
    return [{**entry, "ratio": round(ratio, 2), "ok": ratio <= 1.5}, row("inclusion proof, made and checked (wall)", proof, 1e-3, "1 ms", limit=1.0),
            row("digest of 64 MB in memory (wall)", *memory, "SHA-256", limit=1.2), row("digest of a file of 64 MB (wall)", *file, "read and SHA-256", limit=1.2)]


if __name__ == "__main__":
    for line in record(): print(line)
