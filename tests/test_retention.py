"What a ledger entry names is never removed; what nothing names goes only when it is old, ours, and inside the store"
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.digest import canonical, digest
from retrain_nb.durable import write_once
from retrain_nb.faces.cli import main
from retrain_nb.loop import retention
from retrain_nb.loop.audit import audit_book
from retrain_nb.loop.retention import collect, survey
from retrain_nb.mentions import ARTIFACTS, names
from retrain_nb.records import LockedError, RetrainError, UsageError, VerificationError, as_json
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.stores import ledger

LATER = timedelta(days=2)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    root = tmp_path_factory.mktemp("retention")/"toy"
    furnish(root, "toy")
    open_workbench(root).engine.dispose()
    return root


@pytest.fixture
def book(empty, tmp_path): return open_workbench(Path(shutil.copytree(empty, tmp_path/"toy")))


def now(): return datetime.now(UTC)


def rows(seed, months=3):
    times = pd.date_range("2024-01-01", periods=months*31, freq="D", tz="UTC")
    rng = random.Random(seed)
    return pd.DataFrame({"t": times, "x": [float(rng.randrange(2)) if t.month == seed % 3 + 1 else 0.0 for t in times]})


def furnished(book, seed):
    "Files of all kinds, some of them named by entries of many shapes; gives the digests that nothing names"
    rng, unnamed = random.Random(seed), set()
    for n in range(rng.randrange(4, 12)):
        name = book.artifacts.put(canonical({"n": n, "seed": seed}), "recipe")
        field = rng.choice([*ARTIFACTS, "", "code", "sha256"])
        body = {field or "nothing": rng.choice([name, [name], [[name]], name])}
        for _ in range(rng.randrange(3)): body = rng.choice([{"deep": body}, {"deep": [1, body, None]}])
        if field: book.append("note", f"{seed}:{n}", body, now())
        if field not in ARTIFACTS: unnamed.add(name)
    for n in range(rng.randrange(1, 4)):
        snapshot = book.snapshots.freeze(rows(rng.randrange(9)), "t")
        how = rng.choice(["frozen", "only planned", "not at all"])
        if how == "frozen": book.append("snapshot.frozen", f"s{seed}:{n}", {**as_json(snapshot), "snapshot": snapshot.digest, "source": {}}, now())
        if how == "only planned": book.append("run.planned", f"p{seed}:{n}", {"run": f"r{n}", "parameters": {"snapshot": snapshot.digest}}, now())
    return unnamed


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_after_cleaning_every_digest_that_the_ledger_names_reads_back(seed):
    book = open_workbench("")
    unnamed = furnished(book, seed)
    book.append("note", "anchor", {"recipe": book.artifacts.put(b"{}", "recipe")}, now()) # So that the ledger and the store belong together
    looked = collect(book, now=now() + LATER)
    done = collect(book, delete=True, now=now() + LATER)
    assert [h.path for h in looked["free"]] == [h.path for h in done["free"]] and done["bytes"] == sum(h.bytes for h in looked["free"])
    named = 0
    for entry in book.ask(ledger.entries):
        for name, role in names(entry.body):
            if role == "snapshot": assert len(book.snapshots.read(name)) == book.snapshots.describe(name).rows
            else: assert digest(book.artifacts.get(name)) == name
            named += 1
    assert named
    still = {h.path.rpartition("/")[2] for h in survey(book)}
    named_too = {name for entry in book.ask(ledger.entries) for name, _ in names(entry.body)}
    assert not (unnamed - named_too) & still                               # And what nothing names is gone: the check can fail
    assert {h.path for h in done["free"]} == {r["path"] for e in book.ask(ledger.entries, kind="store.cleaned") for r in e.body["removed"]}
    book.engine.dispose()


def anchored(book):
    "A store whose ledger names something, with one old file that nothing names"
    book.append("note", "anchor", {"recipe": book.artifacts.put(canonical({"kept": 1}), "recipe")}, now())
    return book.artifacts.path(book.artifacts.put(canonical({"unnamed": 1}), "recipe"))


def test_what_is_young_stays_and_a_copy_is_as_young_as_its_copying(book):
    loose = anchored(book)
    assert collect(book, delete=True)["files"] == 0 and loose.exists()
    os.utime(loose, (0, 0))                                                # An old date on a file that came just now
    assert collect(book, delete=True)["files"] == 0 and loose.exists()
    assert collect(book, delete=True, now=now() + LATER)["files"] == 1 and not loose.exists()


def test_what_this_house_did_not_make_stays(book):
    anchored(book)
    odd = ["key", "notes.txt", "artifacts/readme", "artifacts/zz/" + "z"*64, "snapshots/files/ab/x.parquet", "wandb/run-1/run.wandb", "openlineage/1.json", "ledger.db-backup"]
    for name in odd:
        (book.store/name).parent.mkdir(parents=True, exist_ok=True)
        (book.store/name).write_text("mine")
    assert not {h.path for h in collect(book, delete=True, now=now() + LATER)["free"]} & set(odd)
    assert all((book.store/name).read_text() == "mine" for name in odd)


def test_nothing_outside_the_store_is_touched_through_a_link(book, tmp_path):
    anchored(book)
    outside = tmp_path/"outside"
    (outside/"ab").mkdir(parents=True)
    victim = outside/"ab"/("ab"*32)
    victim.write_text("precious")
    (book.store/"artifacts"/"ab").symlink_to(outside/"ab")                 # A whole folder that leads out
    (book.store/"artifacts"/"cd").mkdir()
    (book.store/"artifacts"/"cd"/("cd"*32)).symlink_to(victim)             # And a single file
    held = {h.path: h for h in collect(book, delete=True, now=now() + LATER)["kept"]}
    assert victim.read_text() == "precious" and "not followed" in held["artifacts/ab"].why and "not followed" in held[f"artifacts/cd/{'cd'*32}"].why


def test_a_folder_that_becomes_a_link_between_looking_and_removing_is_found(book, tmp_path):
    loose = anchored(book)
    held = next(h for h in survey(book, now() + LATER) if not h.keep)
    outside = tmp_path/"elsewhere"
    shutil.move(loose.parent, outside)
    loose.parent.symlink_to(outside)
    with pytest.raises(RetrainError, match="leads out of the store"): retention._remove(book, held, now().timestamp())
    assert (outside/loose.name).exists()


def test_a_manifest_that_cannot_be_read_keeps_every_month(book):
    anchored(book)
    snapshots = [book.snapshots.freeze(rows(seed), "t") for seed in (0, 1)]
    book.append("run.planned", "p", {"run": "r", "parameters": {"snapshot": snapshots[0].digest}}, now())
    path = book.store/"snapshots"/"manifests"/f"{snapshots[0].digest}.json"
    text = path.read_bytes()
    path.write_bytes(text.replace(b"2024-01", b"2024-09"))
    free = [h.path for h in collect(book, now=now() + LATER)["free"]]
    assert not any(p.endswith(".parquet") for p in free) and f"snapshots/manifests/{snapshots[1].digest}.json" in free
    path.write_bytes(text)
    assert any(p.endswith(".parquet") for p in [h.path for h in collect(book, now=now() + LATER)["free"]])


def test_the_catalog_is_not_believed(book):
    "Somebody takes a row out of the view; the entry is still there, and so is the file"
    anchored(book)
    with book.engine.begin() as c: c.exec_driver_sql("DELETE FROM mentions")
    assert collect(book, delete=True, now=now() + LATER)["files"] == 1
    entry = book.ask(ledger.entries)[1] # The first is the key
    assert book.artifacts.has(entry.body["recipe"])


def test_the_ledger_of_another_workbench_cleans_nothing(book):
    for n in range(3): book.artifacts.put(canonical({"n": n}), "recipe")
    with pytest.raises(UsageError, match="hardly belong together"): collect(book, delete=True, now=now() + LATER)
    assert len(book.artifacts.digests()) == 3


def test_nothing_is_cleaned_while_a_run_is_at_work(book):
    loose = anchored(book)
    with book.lock(), pytest.raises(LockedError): collect(open_workbench(book.root), delete=True, now=now() + LATER)
    assert loose.exists()


def test_killed_after_the_entry_the_next_cleaning_does_the_rest(book):
    loose = anchored(book)
    code = ("import os, sys; from datetime import UTC, datetime, timedelta; from retrain_nb.loop import retention; from retrain_nb.services.workbench import open_workbench\n"
            "retention._remove = lambda *_: os._exit(9)\nretention.collect(open_workbench(sys.argv[1]), delete=True, now=datetime.now(UTC) + timedelta(days=2))")
    assert subprocess.run([sys.executable, "-c", code, str(book.root)]).returncode == 9
    assert loose.exists() and len(book.ask(ledger.entries, kind="store.cleaned")) == 1
    assert collect(book, delete=True, now=now() + LATER)["files"] == 1 and not loose.exists()
    assert len(book.ask(ledger.entries, kind="store.cleaned")) == 2


def test_many_files_are_written_down_in_parts(book, monkeypatch):
    monkeypatch.setattr(retention, "BATCH", 2)
    anchored(book)
    for n in range(4): book.artifacts.put(canonical({"n": n}), "recipe")
    done = collect(book, delete=True, now=now() + LATER)
    assert (done["files"], len(done["entries"])) == (5, 3)


def test_the_command_looks_and_removes_only_when_told(book, capsys):
    loose = anchored(book)
    os.utime(loose, (0, 0))
    capsys.readouterr()
    assert main(["gc", "--root", str(book.root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["deleted"], told["files"]) == (False, 0) and any("so young" in h["why"] for h in told["kept"]) and any("named by entry 2" in h["why"] for h in told["kept"])
    assert main(["gc", "--delete", "--root", str(book.root)]) == 0 and loose.exists()
    assert "nothing may go" in capsys.readouterr().out


# --- In a bucket, under the knife, and with a ledger that lies ---

@pytest.fixture
def far(empty, tmp_path):
    "The same workbench with its artifacts in a bucket"
    root = Path(shutil.copytree(empty, tmp_path/"far"))
    text = (root/"settings.ini").read_text()
    (root/"settings.ini").write_text(text.replace("[workbench]\n", f"[workbench]\nartifacts = memory://{digest(str(tmp_path))[:12]}\n"))
    return open_workbench(root)


def mixed(book):
    "Two named artifacts and a named snapshot; two artifacts, two snapshots, a month and half a file that nothing names"
    names_ = [book.artifacts.put(canonical({"n": n}), "recipe") for n in range(4)]
    frozen = [book.snapshots.freeze(rows(seed), "t").digest for seed in range(3)]
    month = b"of a freeze that was killed"
    write_once(book.snapshots.folder/"files"/digest(month)[:2]/f"{digest(month)}.parquet", month)
    (book.store/"snapshots"/f".x.json.{'0f'*8}.tmp").write_bytes(b"half")
    book.append("note", "mixed", {"recipe": names_[0], "deep": [{"source_code": [names_[1]]}], "parameters": {"snapshot": frozen[0]}}, now())
    return names_, frozen


def named(book): return {pair for e in book.ask(ledger.entries) for pair in names(e.body)}


def assert_all_that_is_named_is_whole(book):
    for name, role in named(book):
        if role == "snapshot": assert len(book.snapshots.read(name)) == book.snapshots.describe(name).rows
        else: assert digest(book.artifacts.get(name)) == name
    for name in book.snapshots.digests(): assert len(book.snapshots.read(name)) # No manifest without its months, named or not
    assert audit_book(book)["verdict"] == "PASS"


def assert_nothing_else_is_left(book):
    left = {h.path for h in survey(book, now() + LATER) if not h.keep}
    assert left == set() and set(book.artifacts.digests()) == {n for n, role in named(book) if role != "snapshot"}
    assert set(book.snapshots.digests()) == {n for n, role in named(book) if role == "snapshot"}


def test_a_bucket_is_cleaned_like_a_folder(far):
    names_, frozen = mixed(far)
    assert collect(far)["files"] == 0 and all("so young" in h.why for h in collect(far)["kept"] if names_[3] in h.path)
    looked = collect(far, now=now() + LATER)
    assert {far.artifacts.locate(n) for n in names_[2:]} <= {h.path for h in looked["free"]} and set(far.artifacts.digests()) == set(names_)
    done = collect(far, delete=True, now=now() + LATER)
    assert (done["files"], done["bytes"]) == (looked["files"], looked["bytes"]) and set(far.artifacts.digests()) == set(names_[:2])
    assert_all_that_is_named_is_whole(far)
    assert_nothing_else_is_left(far)


def test_a_bucket_that_does_not_say_how_old_things_are_keeps_them(far):
    from fsspec.implementations.memory import MemoryFileSystem
    class Timeless(MemoryFileSystem):
        def modified(self, path): raise NotImplementedError
    names_, _ = mixed(far)
    far.artifacts.shelf.__dict__["_at"] = (Timeless(skip_instance_cache=True), far.artifacts.shelf._at[1])
    collect(far, delete=True, now=now() + LATER)
    assert set(far.artifacts.digests()) == set(names_)
    assert {h.first for h in survey(far, now() + LATER) if "does not say how old" in h.why} == {None}


def killed_at(root, n):
    "A cleaning in a process of its own, killed right after its n-th removal; gives the signal, 0 if it came to its end"
    if (child := os.fork()) == 0:
        remove, left = retention._remove, [n]
        def and_die(*args):
            remove(*args)
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        retention._remove = and_die
        try: collect(open_workbench(root), delete=True, now=now() + LATER)
        finally: os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_killed_after_each_of_9_removals_it_leaves_what_is_named_whole_and_the_next_one_finishes(empty, tmp_path):
    made, deaths = open_workbench(Path(shutil.copytree(empty, tmp_path/"made"))), 0
    mixed(made)
    made.engine.dispose()
    for n in range(1, 11):
        root = Path(shutil.copytree(tmp_path/"made", tmp_path/str(n)))
        died, book = killed_at(root, n), open_workbench(root)
        deaths += died == signal.SIGKILL
        assert_all_that_is_named_is_whole(book)
        assert collect(book, delete=True, now=now() + LATER)["files"] == (9 - n if died else 0)
        assert_all_that_is_named_is_whole(book)
        assert_nothing_else_is_left(book)
        book.engine.dispose()
    assert deaths == 9


LIES = {"an entry cut out": "DELETE FROM entries WHERE seq = 2", "an entry that names nothing any more": "UPDATE entries SET body = '{}' WHERE seq = 2", "no JSON": "UPDATE entries SET body = 'x' WHERE seq = 2",
        "the end cut off": "DELETE FROM entries WHERE seq = 3", "no tree": "DELETE FROM nodes", "no newest head": "DELETE FROM heads WHERE size = 3", "another kind": "UPDATE entries SET kind = 'other' WHERE seq = 2"}


@pytest.mark.parametrize("lie", LIES)
def test_a_ledger_that_lies_has_nothing_removed(book, lie, capsys):
    mixed(book)
    book.append("note", "last", {"n": 1}, now())
    with book.engine.begin() as c:
        for trigger in c.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'").scalars().all(): c.exec_driver_sql(f"DROP TRIGGER {trigger}")
        c.exec_driver_sql(LIES[lie])
    before = {p: p.read_bytes() for folder in ("artifacts", "snapshots") for p in (book.store/folder).rglob("*") if p.is_file()}
    for delete in (False, True):
        with pytest.raises(VerificationError, match="the ledger does not verify.*othing was removed"): collect(book, delete=delete, now=now() + LATER)
    assert {p: p.read_bytes() for folder in ("artifacts", "snapshots") for p in (book.store/folder).rglob("*") if p.is_file()} == before
    assert main(["gc", "--delete", "--root", str(book.root)]) == 6 and "retrain-nb verify" in capsys.readouterr().err


def test_a_ledger_that_nobody_signed_is_cleaned_too(empty, tmp_path):
    root = Path(shutil.copytree(empty, tmp_path/"old"))
    shutil.rmtree(root/".retrain")
    shutil.copytree(Path(__file__).parent/"fixtures"/"format1", root/".retrain")
    book = open_workbench(root)
    before, orphan = {*book.artifacts.digests(), *book.snapshots.digests()}, book.artifacts.put(b'{"n": 1}', "record")
    assert len(before) == 14 and [h.path for h in collect(book, delete=True, now=now() + LATER)["free"]] == [f"artifacts/{orphan}"]
    assert {*book.artifacts.digests(), *book.snapshots.digests()} == before
    assert_all_that_is_named_is_whole(book)


def test_a_manifest_that_is_gone_keeps_every_month_too(book):
    anchored(book)
    snapshots = [book.snapshots.freeze(rows(seed), "t") for seed in (0, 1)]
    book.append("run.planned", "p", {"run": "r", "parameters": {"snapshot": snapshots[0].digest}}, now())
    path = book.store/"snapshots"/"manifests"/f"{snapshots[0].digest}.json"
    text = path.read_bytes()
    path.unlink()
    done = collect(book, delete=True, now=now() + LATER)
    assert not any(h.path.endswith(".parquet") for h in done["free"]) and done["files"] == 2
    path.write_bytes(text)                                                 # Put back from a copy
    assert len(book.snapshots.read(snapshots[0].digest)) == snapshots[0].rows


def while_it_works(monkeypatch, act):
    "Do something in the middle of a cleaning: a page run by hand holds no lock"
    remove, done = retention._remove, []
    def and_act(*args):
        if not done: done.append(act())
        return remove(*args)
    monkeypatch.setattr(retention, "_remove", and_act)
    monkeypatch.setattr(retention, "BATCH", 1)


def test_what_is_named_while_it_works_stays(book, monkeypatch):
    names_, frozen = mixed(book)
    monkeypatch.setattr(retention, "GRACE", timedelta(0))
    while_it_works(monkeypatch, lambda: open_workbench(book.root).append("note", "by hand", {"snapshot": frozen[2], "recipe": max(names_[2:])}, now()))
    collect(book, delete=True, now=now() + LATER)
    assert frozen[2] in book.snapshots.digests() and book.artifacts.has(max(names_[2:]))
    assert_all_that_is_named_is_whole(book)


def test_what_is_asked_for_while_it_works_stays(book, monkeypatch):
    names_, frozen = mixed(book)
    time.sleep(1.1)
    until = now() + timedelta(days=1) - timedelta(seconds=.5)              # All of it is just old enough
    def by_hand():
        book.snapshots.freeze(rows(2), "t")                                # Finds everything there, and is about to name it
        book.artifacts.put(book.artifacts.get(max(names_[2:])), "recipe")
    while_it_works(monkeypatch, by_hand)
    assert len([h for h in survey(book, until) if not h.keep]) == 9
    collect(book, delete=True, now=until)
    assert frozen[1] not in book.snapshots.digests() and len(book.snapshots.read(frozen[2])) and book.artifacts.has(max(names_[2:]))


def test_it_stops_when_another_has_taken_over(book, monkeypatch):
    mixed(book)
    def taken_over():
        with book.engine.begin() as c: c.exec_driver_sql("UPDATE leases SET fence = fence + 1, holder = 'other'")
    while_it_works(monkeypatch, taken_over)
    with pytest.raises(LockedError, match="taken over its work"): collect(book, delete=True, now=now() + LATER)
    assert len([h for h in survey(book, now() + LATER) if not h.keep]) == 8
