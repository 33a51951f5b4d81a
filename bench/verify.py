"What it costs to verify a ledger of 100,000 entries, every hash, body and head, against hashing the same entries once"
import json
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.rows import row
from retrain_nb.auditor import Tree, audit, entry_bytes, head_text, leaf_hash
from retrain_nb.notes import sign_note, ssh_public, vkey
from retrain_nb.stores.database import open_database

NAME = "retrain_nb/bench"


def sealed(path: Path, entries: int, per_head: int) -> list[tuple]:
    "A ledger of the house's present schema in a new file at `path`, with a signed head after every `per_head` entries; gives its entries"
    private = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public = private.public_key().public_bytes_raw()
    first = {"origin": NAME, "vkey": vkey(NAME, public), "ssh": ssh_public(public), "previous": "", "reason": "first"}
    tree, rows, nodes, heads = Tree(), [], [], []
    for seq in range(1, entries + 1):
        checks = [{"name": name, "outcome": "PASS", "value": 0.25} for name in ("rows", "key", "time")]
        fact = {"run": f"run-{seq:08d}", "state": "done", "seconds": 1.5 + seq/7, "verdict": {"outcome": "PASS", "n": 3580, "parts": checks}}
        body = json.dumps(first if seq == 1 else fact, sort_keys=True, separators=(",", ":"))
        parts = (seq, "ledger.key" if seq == 1 else "run.ended", f"run:{seq}", "2013-06-01T03:00:00Z", body)
        leaf = leaf_hash(entry_bytes(*parts))
        rows.append((*parts, leaf.hex()))
        nodes += [(level, number, node.hex()) for level, number, node in tree.add(leaf)]
        if seq % per_head == 0 or seq == entries: heads.append((seq, sign_note(head_text(NAME, seq, tree.root()), NAME, public, private.sign)))
    open_database(f"sqlite:///{path}").dispose()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany('INSERT INTO entries (seq, kind, "key", at, body, leaf) VALUES (?,?,?,?,?,?)', rows)
        connection.executemany("INSERT INTO nodes (level, idx, hash) VALUES (?,?,?)", nodes)
        connection.executemany("INSERT INTO heads (size, note) VALUES (?,?)", heads)
    return rows


def cpu(work: Callable[[], Any], times: int = 3) -> float:
    "Median CPU seconds, after one time that warms up"
    def once() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start
    return statistics.median([once() for _ in range(times + 1)][1:])


def verify_many(entries: int = 100_000) -> list[dict]:
    "A head for every entry, as the workbench writes them one by one, and one for every ten: there all signatures are checked"
    results = []
    for per_head in (1, 10):
        folder = Path(tempfile.mkdtemp(prefix="bench-verify-"))
        try:
            rows = sealed(folder/"ledger.db", entries, per_head)
            told = audit(folder)
            if told["verdict"] != "PASS": raise SystemExit(f"the ledger made here does not verify: {told['first_bad']}")
            floor = cpu(lambda rows=rows: [leaf_hash(entry_bytes(*parts[:5])) for parts in rows])
            name = f"verify {entries:,} entries, {told['checked']['signatures']:,} of {told['checked']['heads']:,} signatures (CPU)"
            results.append(row(name, cpu(lambda folder=folder: audit(folder)), floor, "hashing the entries", limit_seconds=5.0, bytes=sum(len(r[4]) for r in rows)))
        finally: shutil.rmtree(folder, ignore_errors=True)
    return results


if __name__ == "__main__": print(json.dumps(verify_many(), indent=2))
