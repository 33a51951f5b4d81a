"The ledger under kill -9, many writers, full disks and repeated facts"
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transactions import undone

from retrain_nb.digest import canonical
from retrain_nb.merkle import leaf_hash, root
from retrain_nb.records import DataError, LockedError, RetrainError, UsageError
from retrain_nb.stores.database import journal_mode, open_database, reading
from retrain_nb.stores.ledger import append, entries, entry_leaf, find, find_key, table

AT = "2013-06-01T03:00:00Z"


def url(folder): # -> the address of a file, for what only a file can suffer
    return f"sqlite:///{folder}/ledger.db"


def check_whole(place):
    "Numbers without a gap, true hashes, a sound file; gives the keys"
    engine = open_database(place)
    with reading(engine) as c:
        kept = entries(c)
        if engine.dialect.name == "sqlite": assert c.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    engine.dispose()
    assert [e.seq for e in kept] == list(range(1, len(kept) + 1))
    assert [e.leaf for e in kept] == [entry_leaf(e.seq, e.kind, e.key, e.at, canonical(e.body).decode()) for e in kept]
    return [e.key for e in kept]


# Each writer is a process of its own that says which key is durable; `os.write` reaches the pipe even if the next thing is SIGKILL.
WRITERS = """
import os, random, signal, sys, time
from retrain_nb.stores.database import open_database
from retrain_nb.stores.ledger import append
address, mode, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
open_database(address).dispose()                           # Whatever is loaded and made late, is now
def write(who, count, tell=None):
    engine = open_database(address)
    for i in range(count):
        body = {"who": who, "i": i, "filler": "x"*3000}
        with engine.begin() as c: entry = append(c, "test.fact", f"{who}:{i}", body, "2013-06-01T03:00:00Z")
        os.write(1, f"{entry.key}\\n".encode())
        if tell and i < 3: os.write(tell, b".")
def child(who, count, tell=None):
    pid = os.fork()
    if pid == 0:
        try: write(who, count, tell)
        finally: os._exit(0)
    return pid
random.seed(7)
if mode == "kill":
    for trial in range(n):
        told, tell = os.pipe()
        pid = child(f"k{trial}", 100_000, tell)
        os.close(tell)
        if trial % 2:                                      # Half of them are in full swing, however slow the machine is
            for _ in range(3): os.read(told, 1)
        os.close(told)
        time.sleep(random.uniform(0.02, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
else:
    for pid in [child(f"w{w}", 25) for w in range(n)]: os.waitpid(pid, 0)
"""


def test_kill_9_at_30_random_moments_loses_no_acknowledged_entry(database_url):
    done = subprocess.run([sys.executable, "-c", WRITERS, database_url, "kill", "30"], capture_output=True, text=True, check=True)
    acknowledged, kept = done.stdout.split(), check_whole(database_url)
    assert set(acknowledged) <= set(kept)
    assert 0 <= len(kept) - len(acknowledged) <= 30       # At most one was durable and not yet said
    assert len(acknowledged) > 30


def test_8_writers_of_25_entries_at_once_lose_nothing(database_url):
    done = subprocess.run([sys.executable, "-c", WRITERS, database_url, "race", "8"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    acknowledged, kept = done.stdout.split(), check_whole(database_url)
    assert len(acknowledged) == 200 and sorted(acknowledged) == sorted(kept)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
PLAIN = st.none() | st.booleans() | st.integers(-2**53 + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)


@pytest.fixture
def opened(database_url):
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.dictionaries(st.sampled_from("xyz"), JSON, max_size=3)), max_size=12))
def test_any_facts_repeated_in_any_order_are_written_once(opened, facts):
    known = {}
    with undone(opened) as c:
        for key, body in facts:
            if key in known and json.dumps(known[key]) != json.dumps(body):
                try: entry = append(c, "test.fact", key, body, AT)
                except RetrainError as e: assert f"`{key}` and says something else" in str(e)
                else: assert entry.body == known[key]     # Equal as JSON: 1 and 1.0
                continue
            known.setdefault(key, body)
            entry = append(c, "test.fact", key, body, AT)
            assert append(c, "test.fact", key, body, "2014-01-01T00:00:00Z") == entry
            assert entry.body == body
        kept = entries(c)
    assert [e.key for e in kept] == list(known) and [e.seq for e in kept] == [*range(1, len(known) + 1)]


def test_the_same_key_under_another_kind_is_another_fact(database_url):
    engine = open_database(database_url)
    with engine.begin() as c: append(c, "run.planned", "k", {"run": "a"}, AT)
    with pytest.raises(RetrainError, match="`kind` was run.planned and would be run.started"), engine.begin() as c:
        append(c, "run.started", "k", {"run": "a"}, AT)


@pytest.mark.parametrize(("kind", "key", "body"), [
    ("Run Ended", "k", {}), ("run.ended", "", {}), ("run.ended", "k", []), ("run.ended", "k", {"n": 2**60}),
    ("run.ended", "k", {"n": float("inf")}), ("run.ended", "k", {1: 2}), ("run.ended", "k", {"n": object()})])
def test_what_cannot_be_an_entry_is_refused_and_leaves_no_trace(database_url, kind, key, body):
    engine = open_database(database_url)
    with pytest.raises((UsageError, DataError)), engine.begin() as c: append(c, kind, key, body, AT)
    assert check_whole(database_url) == []


def test_entries_by_number_kind_key_and_leaf(database_url):
    engine = open_database(database_url)
    with engine.begin() as c: written = [append(c, "run.ended" if i % 2 else "run.started", f"key_{i}", {"i": i}, AT) for i in range(6)]
    with reading(engine) as c:
        assert entries(c, after=4) == written[4:]
        assert entries(c, kind="run.ended") == written[1::2]
        assert find(c, "3") == [written[2]] and find(c, "key_3") == [written[3]] and find(c, written[0].leaf) == [written[0]]
        for nothing in ("key%", "key__", "0", "7", "", "%", "99999999999999999999"): assert find(c, nothing) == []


def test_a_clock_that_jumps_by_days_changes_nothing_about_order(database_url):
    engine, days = open_database(database_url), [2, 1, 3, 1, 2]
    with engine.begin() as c: written = [append(c, "test.fact", f"k{i}", {}, f"2013-06-0{day}T03:00:00Z") for i, day in enumerate(days)]
    with reading(engine) as c: assert entries(c) == written and [e.key for e in entries(c, after=2)] == ["k2", "k3", "k4"]
    assert [e.seq for e in written] == [1, 2, 3, 4, 5]


def test_changing_or_deleting_an_entry_is_refused(database_url):
    engine = open_database(database_url)
    with engine.begin() as c: append(c, "run.ended", "k", {}, AT)
    upsert = "INSERT INTO entries SELECT 1, kind, 'other', at, body, leaf FROM entries WHERE true ON CONFLICT (seq) DO UPDATE SET key='other'"
    changes = [sa.update(table).values(at="x"), sa.delete(table), sa.text(upsert)]
    if engine.dialect.name == "sqlite": changes.append(sa.text("REPLACE INTO entries SELECT 1, kind, 'other', at, body, leaf FROM entries"))
    for change in changes:
        with pytest.raises((RetrainError, sa.exc.IntegrityError)), engine.begin() as c: c.execute(change)
    assert check_whole(database_url) == ["k"]


def test_a_reader_does_not_wait_and_sees_one_state_while_another_writes(database_url):
    engine = open_database(database_url, wait=0.2)
    with engine.begin() as c: append(c, "run.ended", "a", {}, AT)
    with engine.begin() as writer:
        append(writer, "run.ended", "b", {}, AT)
        with reading(engine) as c: assert [e.key for e in entries(c)] == ["a"]
    with reading(engine) as c: assert [e.key for e in entries(c)] == ["a", "b"]
    with reading(engine) as c, pytest.raises(UsageError, match="only reads"): append(c, "run.ended", "c", {}, AT)


def test_a_second_writer_waits_and_then_says_locked(database_url):
    patient, hasty = open_database(database_url, wait=10), open_database(database_url, wait=0.05)
    first = patient.connect()
    append(first, "run.ended", "a", {}, AT)
    with pytest.raises(LockedError, match="another process has been writing"), hasty.begin() as c: append(c, "run.ended", "b", {}, AT)
    waiting = threading.Thread(target=second, args=(patient, got := []))
    waiting.start()
    time.sleep(0.2)
    assert got == []
    first.commit()
    waiting.join()
    assert got == [2]


def second(engine, got):
    with engine.begin() as c: got.append(append(c, "run.ended", "b", {}, AT).seq)


FULL_DISK = """
import resource, sys
from retrain_nb.records import RetrainError
from retrain_nb.stores.database import open_database
from retrain_nb.stores.ledger import append
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
engine = open_database(sys.argv[1])
try:
    for i in range(200):
        with engine.begin() as c: append(c, "test.fact", f"f{i}", {"filler": "x"*3000}, "2013-06-01T03:00:00Z")
        print(f"f{i}")
except RetrainError as e: print(e.exit_code, e, file=sys.stderr)
"""


def test_a_full_disk_is_named_and_what_was_acknowledged_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, url(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("1 database: there is no room for another entry") and "Free some space" in done.stderr
    assert check_whole(url(tmp_path)) == done.stdout.split() and len(done.stdout.split()) > 5
    engine = open_database(url(tmp_path))                  # Once there is room again
    with engine.begin() as c: append(c, "test.fact", "after", {}, AT)
    assert check_whole(url(tmp_path))[-1] == "after"


DENIED = """
import os, sys
from retrain_nb.records import RetrainError
from retrain_nb.stores.database import open_database, reading
from retrain_nb.stores.ledger import append, entries
with open_database("sqlite://").begin() as c: append(c, "test.fact", "a", {}, "")  # What is imported late is imported now, by whoever may
if os.geteuid() == 0: os.setuid(65534)                     # Root may write anywhere, so become somebody who may not
engine = open_database(sys.argv[1])
with reading(engine) as c: print([e.key for e in entries(c)])
try:
    with engine.begin() as c: append(c, "test.fact", "b", {}, "2013-06-01T03:00:00Z")
except RetrainError as e: print(e.exit_code, e)
"""


def test_who_may_only_read_can_read_and_is_told_what_is_missing():
    folder = Path(tempfile.mkdtemp())                      # Not `tmp_path`, which others may not even enter
    try:
        engine = open_database(url(folder))
        with engine.begin() as c: append(c, "test.fact", "a", {}, AT)
        engine.dispose()
        (folder/"ledger.db").chmod(0o444)
        folder.chmod(0o555)
        done = subprocess.run([sys.executable, "-c", DENIED, url(folder)], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("['a']\n1 database: this user may not write to it") and "Give this user the right" in done.stdout
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_the_connection_is_durable(tmp_path):
    engine = open_database(url(tmp_path))
    with reading(engine) as c: found = [c.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "synchronous", "foreign_keys")]
    assert found == [journal_mode(sqlite3.sqlite_version_info), 3, 1]   # 3 is EXTRA: FULL, and an fsync of the folder where a journal is deleted


def test_where_sqlite_keeps_the_journal_that_we_do_not_want_the_folder_is_made_durable_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("retrain_nb.stores.database.journal_mode", lambda version: "wal")
    engine = open_database(f"sqlite:///file:{tmp_path}/ledger.db?vfs=unix-dotfile&uri=true") # Has no shared memory, so no WAL either
    with reading(engine) as c: assert [c.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "synchronous")] == ["delete", 3]


def test_a_wal_file_from_a_newer_library_is_taken_back(tmp_path):
    plain = sqlite3.connect(tmp_path/"ledger.db")
    plain.execute("PRAGMA journal_mode=wal")
    plain.execute("CREATE TABLE other (x)")
    plain.close()
    engine = open_database(url(tmp_path))
    with reading(engine) as c: assert c.exec_driver_sql("PRAGMA journal_mode").scalar() == journal_mode(sqlite3.sqlite_version_info)


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=40), st.data())
def test_the_head_changes_with_any_leaf_and_with_their_order(data, draw):
    leaves = [leaf_hash(d) for d in data]
    i = draw.draw(st.integers(0, len(leaves) - 1))
    assert root(leaves) != root([*leaves[:i], leaf_hash(b"other" + data[i]), *leaves[i+1:]])
    assert root(leaves) != root(leaves[:i] + leaves[i+1:])
    shuffled = random.Random(0).sample(leaves, len(leaves))
    assert (root(shuffled) == root(leaves)) == (shuffled == leaves)


@pytest.mark.parametrize(("kind", "key", "said"), [
    ("test.fact", "a\0b", r"the key 'a\\x00b' of a `test.fact` is not plain text"), ("test.fact", "a\nb", r"'a\\nb' of a `test.fact` is not plain text"),
    ("test.fact", "\x7f", "not plain text"), ("test.fact", "a\x9b2J", "not plain text"), ("test.fact", "a\ud800", "not plain text"), ("test.fact", "", "without a key"),
    ("test\0fact", "a", r"'test\\x00fact' cannot be a name"), ("test.fact\n", "a", r"'test.fact\\n' cannot be a name")])
def test_no_database_is_asked_to_keep_a_control_character_in_a_kind_or_a_key(database_url, kind, key, said):
    engine = open_database(database_url)
    with pytest.raises(UsageError, match=f"^(the key |a `test.fact` )?.*{said}") as e, engine.begin() as c: append(c, kind, key, {}, AT)
    assert "database" not in str(e.value)                                  # The ledger's own words, the same on both
    with engine.begin() as c: assert append(c, "test.fact", "Zürich \N{SNOWMAN}", {}, AT).seq == 1
    engine.dispose()


def test_a_key_with_a_control_character_that_an_older_version_let_in_is_still_found(tmp_path):
    engine = open_database(url(tmp_path))
    with engine.begin() as c: c.execute(table.insert().values(seq=1, kind="test.fact", key="a\nb", at=AT, body="{}", leaf=entry_leaf(1, "test.fact", "a\nb", AT, "{}")))
    with reading(engine) as c: assert [e.key for e in find(c, "1")] == [find_key(c, "a\nb").key] == ["a\nb"]
    engine.dispose()


@pytest.mark.parametrize("at", [None, 7, b"2013", ["2013"], "\ud800", "a\0b", "noon\n", "2013-06-01T03:00:00Z" + " "*21])
def test_a_time_that_is_no_label_is_refused_in_our_words_on_any_database(database_url, at):
    engine = open_database(database_url)
    with pytest.raises(UsageError, match=r"the time .* of a `test.fact` is no plain text of at most 40 characters. Give it as text, such as") as e, engine.begin() as c:
        append(c, "test.fact", "a", {}, at)
    str(e.value).encode()                                  # What is printed and kept in turn is text
    assert check_whole(database_url) == []
    engine.dispose()


@pytest.mark.parametrize("body", [{"a": "\ud800"}, {"\udc00": 1}, {"a": [{"b": "x\udfff"}]}])
def test_half_of_a_pair_in_a_body_is_refused_in_our_words(tmp_path, body):
    engine = open_database(url(tmp_path))
    with pytest.raises(DataError, match="half of a surrogate pair, which is no character") as e, engine.begin() as c: append(c, "test.fact", "a", body, AT)
    str(e.value).encode()
    assert check_whole(url(tmp_path)) == []
    engine.dispose()
