"Killed at every system call that changes the disk: the old state or the new one is there, never one between, and the next turn carries on"
import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from retrain_nb.digest import digest
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.stores import catalog, ledger
from retrain_nb.stores.database import reading
from retrain_nb.stores.events import arrive, count_letters, hot

CHANGES = ("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "ftruncate",
           "mkdir", "mkdirat", "chmod", "fchmod")
NOW = datetime(2024, 6, 1, tzinfo=UTC)
MODEL = b'{"booster": "tree", "rows": "' + b"x"*20_000 + b'"}'
CROWN = {"model": digest(MODEL), "run": "retrain-1", "decision": "refresh", "verdict": {"outcome": "PASS"}, "previous": "", "by": "cycle", "reason": "passed"}


def first(book): book.append("workbench.created", "created", {"name": "crash"}, NOW)  # The key is made here
def append(book): book.append("workbench.noted", "noted", {"text": "one more"}, NOW)
def promote(book): book.append("champion.set", "cycle-1:champion", CROWN, NOW)
def put(book): book.artifacts.put(MODEL, "model")
def take(book): book.accept([arrive(seen(n), NOW) for n in range(20, 40)] + [arrive({"kind": "odd"}, NOW)], NOW) # And one for the dead letters
def seal(book): book.seal_events(NOW)


def seen(n): return {"kind": "interaction", "id": f"click {n}", "subject": "s", "event_time": f"2024-0{4 + n % 2}-01T00:00Z", "data": {"name": "click", "value": n}}


OPERATIONS = {f.__name__: f for f in (first, append, promote, put, take, seal)}


def traced(root, operation, *strace): # -> status of a child that opens the workbench and does it, traced from its first step
    gate, go = os.pipe()
    if not (child := os.fork()):
        ctypes.CDLL(None).prctl(0x59616D61, -1) # Let a sibling trace us, where that has to be allowed
        os.read(gate, 1)
        try: OPERATIONS[operation](open_workbench(root))
        except BaseException: os._exit(9)
        os._exit(0)
    tracer = subprocess.Popen(["strace", "-f", "-p", str(child), *strace], stderr=subprocess.DEVNULL)
    while "TracerPid:\t0\n" in open(f"/proc/{child}/status").read():
        if tracer.poll() is not None: pytest.fail("strace cannot attach to a child of ours here")
        time.sleep(.002)
    os.write(go, b"x")
    status = os.waitpid(child, 0)[1]
    tracer.wait()
    os.close(gate)
    os.close(go)
    return os.waitstatus_to_exitcode(status)


@pytest.fixture(scope="module")
def base(tmp_path_factory): # A workbench with some entries and a champion, to be copied for each trial
    if not shutil.which("strace") and not os.environ.get("CI"): pytest.skip("no strace here; `apt-get install strace` brings it, and CI always has it")
    root = tmp_path_factory.mktemp("base")/"book"
    furnish(root, "toy")
    book = open_workbench(root)
    first(book)
    book.append("champion.set", "cycle-0:champion", {**CROWN, "model": digest(b"before"), "decision": "bootstrap"}, NOW)
    book.accept([arrive(seen(n), NOW) for n in range(20)], NOW)
    book.engine.dispose()
    empty = root.parent/"empty"
    furnish(empty, "toy")
    return {"first": empty, "append": root, "promote": root, "put": root, "take": root, "seal": root}


def state(book): # What a reader finds: entries, the head's size, all rows of all views, all artifacts
    with reading(book.engine) as c:
        told = ledger.entries(c)
        size, note = ledger.last_head(c) or (0, "")
        assert size == len(told) and [e.seq for e in told] == list(range(1, size + 1))
        assert not note or ledger.head(c, size) == ledger.parse_checkpoint(note.split("\n\n")[0] + "\n").root
        dumped = catalog.dump(c)
    with book.engine.begin() as c: # The views hold what the ledger says, no more and no less
        catalog.rebuild(c, told)
        assert catalog.dump(c) == dumped
    for name in book.artifacts.digests(): book.artifacts.get(name)
    with reading(book.engine) as c: # Every event once, wherever it lies
        waiting, told_of = c.execute(sa.select(sa.func.count()).select_from(hot)).scalar(), count_letters(c)["letters"]
        events = book.events.read(c, "interaction", NOW, columns=["id"])["id"].tolist()
    assert len(events) == len(set(events))
    return [(e.kind, "" if e.kind == "ledger.key" else e.key) for e in told], book.artifacts.digests(), sorted(events), waiting, told_of # Each workbench makes a key of its own


def trial(base, operation, root, name, n): # Kill at the n-th call of this name, look, and carry on
    shutil.copytree(base, root)
    code = traced(root, operation, "-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={n}")
    book = open_workbench(root)
    before = state(book)
    OPERATIONS[operation](book)
    after = state(book)
    book.engine.dispose()
    shutil.rmtree(root)
    return code, before, after


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_change_it_is_old_or_new(base, operation, tmp_path, capsys):
    root, log = tmp_path/"book", tmp_path/"calls"
    shutil.copytree(base[operation], root)
    old = state(open_workbench(root))
    shutil.rmtree(root)
    shutil.copytree(base[operation], root)
    assert traced(root, operation, "-o", str(log), "-e", f"trace={','.join(CHANGES)}") == 0
    new = state(open_workbench(root))
    assert new != old
    shutil.rmtree(root)
    counts = Counter(re.findall(rf"^\d+ +({'|'.join(CHANGES)})\(", log.read_text(), re.MULTILINE))
    points = [(name, n) for name, count in sorted(counts.items()) for n in range(1, count + 1)]
    found = Counter()
    for point in points:
        code, before, after = trial(base[operation], operation, root, *point)
        assert code == -signal.SIGKILL, f"was not killed at {point}"
        assert before in (old, new), f"killed at {point}: neither old nor new"
        assert after == new, f"killed at {point}: the next turn did not carry on"
        found["old" if before == old else "new"] += 1
    assert len(points) >= 5 and found["old"] # Some were killed early enough to matter
    with capsys.disabled(): print(f"\n{operation}: killed at {len(points)} calls: {found['old']} times the old state, {found['new']} times the new one, 0 between")
