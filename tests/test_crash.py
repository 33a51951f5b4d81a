"Killed at every system call that changes the disk: the old state or the new one is there, never one between, and the next turn carries on"
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from retrain_nb.digest import digest
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.stores import catalog, ledger

CHANGES = ("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "ftruncate",
           "mkdir", "mkdirat", "chmod", "fchmod")
NOW = datetime(2024, 6, 1, tzinfo=UTC)
MODEL = b'{"booster": "tree", "rows": "' + b"x"*20_000 + b'"}'
CROWN = {"model": digest(MODEL), "run": "retrain-1", "decision": "refresh", "verdict": {"outcome": "PASS"}, "previous": "", "by": "cycle", "reason": "passed"}


def first(book): book.append("workbench.created", "created", {"name": "crash"}, NOW)  # The key is made here
def append(book): book.append("workbench.noted", "noted", {"text": "one more"}, NOW)
def promote(book): book.append("champion.set", "cycle-1:champion", CROWN, NOW)
def put(book): book.artifacts.put(MODEL, "model")


OPERATIONS = {f.__name__: f for f in (first, append, promote, put)}
SCRIPT = """
import sys
from test_crash import OPERATIONS
from retrain_nb.services.workbench import open_workbench
book = open_workbench(sys.argv[2])
OPERATIONS[sys.argv[1]](book)
print("acknowledged", flush=True)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory): # A workbench with some entries and a champion, to be copied for each trial
    if not shutil.which("strace"): pytest.fail("strace is missing: apt-get install strace")
    root = tmp_path_factory.mktemp("base")/"book"
    furnish(root, "toy")
    book = open_workbench(root)
    first(book)
    book.append("champion.set", "cycle-0:champion", {**CROWN, "model": digest(b"before"), "decision": "bootstrap"}, NOW)
    book.engine.dispose()
    empty = root.parent/"empty"
    furnish(empty, "toy")
    return {"first": empty, "append": root, "promote": root, "put": root}


def run(root, operation, *strace):
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([*strace, sys.executable, "-c", SCRIPT, operation, str(root)], env=env, capture_output=True, text=True)


def state(book): # What a reader finds: entries, the head's size, all rows of all views, all artifacts
    with ledger.reading(book.engine) as c:
        told = ledger.entries(c)
        size, note = ledger.last_head(c) or (0, "")
        assert size == len(told) and [e.seq for e in told] == list(range(1, size + 1))
        assert not note or ledger.head(c, size) == ledger.parse_checkpoint(note.split("\n\n")[0] + "\n").root
        dumped = catalog.dump(c)
    with book.engine.begin() as c: # The views hold what the ledger says, no more and no less
        catalog.rebuild(c, told)
        assert catalog.dump(c) == dumped
    for name in book.artifacts.digests(): book.artifacts.get(name)
    return [(e.kind, "" if e.kind == "ledger.key" else e.key) for e in told], book.artifacts.digests() # Each workbench makes a key of its own


def trial(base, operation, tmp, name, n): # Kill at the n-th call of this name, look, and carry on
    root = tmp/f"{operation}-{name}-{n}"
    shutil.copytree(base, root)
    inject = f"inject={name}:signal=SIGKILL:when={n}"
    done = run(root, operation, "strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={name}", "-e", inject)
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    book = open_workbench(root)
    before = state(book)
    OPERATIONS[operation](book)
    after = state(book)
    book.engine.dispose()
    shutil.rmtree(root)
    return "acknowledged" in done.stdout, before, after, name, n


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_change_it_is_old_or_new(base, operation, tmp_path, record_property):
    source, plain = base[operation], tmp_path/"plain"
    shutil.copytree(source, plain)
    old = state(open_workbench(plain))
    shutil.rmtree(plain)
    shutil.copytree(source, plain)
    log = tmp_path/"calls"
    done = run(plain, operation, "strace", "-f", "--seccomp-bpf", "-o", str(log), "-e", f"trace={','.join(CHANGES)}")
    assert done.returncode == 0 and "acknowledged" in done.stdout, done.stderr
    new = state(open_workbench(plain))
    assert new != old
    counts = Counter(re.findall(rf"^\d+ +({'|'.join(CHANGES)})\(", log.read_text(), re.MULTILINE))
    points = [(name, n) for name, count in sorted(counts.items()) for n in range(1, count + 1)]
    assert len(points) >= 5
    with ThreadPoolExecutor(2) as pool: tried = list(pool.map(lambda point: trial(source, operation, tmp_path, *point), points))
    for acknowledged, before, after, name, n in tried:
        assert before in (old, new), f"killed at {name} {n}: neither old nor new"
        assert not acknowledged or before == new, f"killed at {name} {n}: acknowledged and lost"
        assert after == new, f"killed at {name} {n}: the next turn did not carry on"
    assert old in [before for _, before, *_ in tried] # Some were killed early enough to matter
    record_property("kills", len(points))
    print(f"{operation}: killed at {len(points)} points, {sum(before == old for _, before, *_ in tried)} old, {sum(before == new for _, before, *_ in tried)} new, 0 between")
