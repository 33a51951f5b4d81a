"One at a time, on one machine and on several; a worker that was replaced, and a server that fails: on SQLite and PostgreSQL"
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from retrain_nb.faces.cli import main
from retrain_nb.records import LockedError
from retrain_nb.services.workbench import open_workbench
from retrain_nb.statements import LostError
from retrain_nb.stores import catalog, ledger, turns
from retrain_nb.stores.database import open_database, reading
from retrain_nb.stores.keys import make_key

ROOT = Path(__file__).resolve().parent.parent
THREE = datetime(2013, 6, 1, 3, tzinfo=UTC)
COMMAND = "import sys; from retrain_nb.faces.cli import main; sys.exit(main())"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def made(folder, url):
    "A toy workbench on this database, without profile and mirror, which have tests of their own"
    assert main(["init", str(folder), "--demo", "toy"]) == 0
    text = (folder/"settings.ini").read_text().replace("mode = offline", "mode = disabled")
    assert "[workbench]\n" in text
    text = text.replace("[workbench]\n", f"[workbench]\ndatabase = {url}\n")
    shared = folder.parent/"ledger.key"                    # Machines that share a ledger sign it with one key
    if not shared.exists(): make_key(shared, "shared")
    (folder/"settings.ini").write_text(text + f"\n[run]\nprofile_rows = 0\n[ledger]\nkey = {shared}\n")
    shutil.rmtree(folder/".retrain")                       # Made by `init`, with a database of its own
    return folder


@pytest.fixture
def parcels(tmp_path, database_url): return made(tmp_path/"parcels", database_url)


@pytest.fixture
def neighbour(tmp_path, database_url): # The same workbench on another machine: another folder, the same database
    return made(tmp_path/"neighbour", database_url)


def keys(root): return [e.key for e in open_workbench(root).ask(ledger.entries) if e.kind != "ledger.key"]


# --- The lease ---

def test_of_many_who_ask_at_once_one_gets_the_lease(database_url):
    engine, got, gate = open_database(database_url), [], threading.Barrier(6)
    def ask(who):
        gate.wait()
        with engine.begin() as c: got.append(turns.take(c, "work", who, 60, THREE))
    threads = [threading.Thread(target=ask, args=(f"w{i}",)) for i in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(got, key=str) == [1, *[None]*5]
    engine.dispose()


def test_a_holder_whose_name_has_spaces_is_known_to_be_dead(tmp_path):
    for before, me in (([], "Ana on nyc"), (["Ana on nyc"], "Ben"), (["Ana on nyc", "Ben"], "Cid")):
        with turns.hold(tmp_path/"lock") as f: assert turns.sign_in(f, me) == before


def test_two_kinds_of_work_do_not_wait_for_each_other(database_url):
    with open_database(database_url).begin() as c:
        assert [turns.take(c, name, "w", 60, THREE) for name in ("work", "mail", "work")] == [1, 1, 2]


@pytest.mark.parametrize("skew", [-86400, 86400])
def test_a_clock_that_is_a_day_off_never_lets_two_write(database_url, skew):
    engine = open_database(database_url)
    with engine.begin() as c: ours = turns.take(c, "work", "nyc", 3600, THREE)
    with engine.begin() as c: theirs = turns.take(c, "work", "lga", 3600, THREE + timedelta(seconds=skew))
    with engine.begin() as c: writers = [f for f in (ours, theirs) if f and turns.holds(c, "work", f)]
    assert writers == ([ours] if skew < 0 else [theirs])
    engine.dispose()


def test_whoever_is_about_to_write_is_waited_for(database_url):
    "`holds` is true until the transaction ends: nobody takes the lease between the question and the commit"
    engine, hasty = open_database(database_url), open_database(database_url, wait=0.2)
    with engine.begin() as c: fence = turns.take(c, "work", "nyc", 1, THREE)
    with engine.begin() as c:
        assert turns.holds(c, "work", fence)
        with pytest.raises(LockedError), hasty.begin() as other: turns.take(other, "work", "lga", 60, THREE + timedelta(days=1))
    with hasty.begin() as other: assert turns.take(other, "work", "lga", 60, THREE + timedelta(days=1)) == fence + 1
    for e in (engine, hasty): e.dispose()


# --- A workbench, one at a time ---

WORKER = """
import os, sys
from datetime import UTC, datetime
from retrain_nb.records import RetrainError
from retrain_nb.services.workbench import open_workbench
book = open_workbench(sys.argv[1])
try:
    with book.lock():
        print("mine", flush=True)
        for line in sys.stdin: print(book.append("test.fact", line.strip(), {"by": sys.argv[2]}, datetime.now(UTC)).seq - 1, flush=True) # After the key, which is the first entry
except RetrainError as e:
    print(e, flush=True)
    sys.exit(e.exit_code)
"""


class Worker:
    "A process that takes its turn and writes when it is told"
    def __init__(self, root, name):
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, root, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)
        self.said = self.process.stdout.readline().strip()
    def write(self, key):
        self.process.stdin.write(f"{key}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()
    def end(self, how=None):
        if how: self.process.send_signal(how)
        self.process.communicate()
        return self.process.returncode


def test_a_killed_worker_is_followed_at_once_on_its_own_machine_and_in_time_on_another(parcels, neighbour, database_url):
    first = Worker(parcels, "first")
    assert first.said == "mine" and first.write("a") == "1"
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    refused = Worker(neighbour, "other")                   # Nobody there can know that it is dead
    assert f":{first.process.pid}:" in refused.said and "at work" in refused.said and "ends at" in refused.said and refused.end() == 75
    second = Worker(parcels, "second")                     # Here its lock was free
    assert second.said == "mine" and second.write("b") == "2"
    second.end(signal.SIGKILL)
    with open_database(database_url).begin() as c: c.execute(turns.leases.update().values(until="2013-06-01T03:00:00Z")) # Time passes
    third = Worker(neighbour, "third")
    assert third.said == "mine" and third.write("c") == "3" and third.end() == 0
    fourth = Worker(parcels, "fourth")                     # Given back: free at once, everywhere
    assert fourth.said == "mine" and fourth.end() == 0
    assert keys(parcels) == ["a", "b", "c"]


def test_a_worker_that_slept_through_its_turn_can_write_nothing_more(parcels, neighbour, database_url):
    sleeper = Worker(parcels, "sleeper")
    assert sleeper.write("a") == "1"
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    with open_database(database_url).begin() as c: c.execute(turns.leases.update().values(until="2013-06-01T03:00:00Z"))
    heir = Worker(neighbour, "heir")
    assert heir.said == "mine" and heir.write("b") == "2"
    os.kill(sleeper.process.pid, signal.SIGCONT)
    assert "the entry was not written" in sleeper.write("late") and sleeper.end() == 75
    assert heir.write("c") == "3" and heir.end() == 0      # And its leaving did not take the lease away from the heir
    assert keys(parcels) == ["a", "b", "c"]


def test_a_lease_that_ran_out_is_good_until_somebody_takes_it(parcels, database_url):
    worker = Worker(parcels, "slow")
    with open_database(database_url).begin() as c: c.execute(turns.leases.update().values(until="2013-06-01T03:00:00Z"))
    assert worker.write("a") == "1" and worker.end() == 0


def cycle(root, now, **kwargs): return subprocess.Popen([sys.executable, "-c", COMMAND, "cycle", "--now", now, "--root", root, "--json"], env=ENV, text=True, **kwargs)


def test_of_two_overlapping_cycles_the_second_leaves_in_under_a_second(parcels, neighbour):
    first = cycle(parcels, "2024-03-01", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while "run.started" not in {e.kind for e in open_workbench(parcels).ask(ledger.entries)}:
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.05)
    for root in (parcels, neighbour):                      # Beside it, and on another machine
        second = cycle(root, "2024-03-22", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        done = os.wait4(second.pid, 0)
        second.returncode = os.waitstatus_to_exitcode(done[1])
        assert second.returncode == 75, second.stderr.read()
        # It waits for nothing, so what it takes is what it computes; a clock on the wall also counts what other programs do
        assert done[2].ru_utime + done[2].ru_stime < 1
    answer = json.loads(first.communicate()[0])
    assert first.returncode == 0 and answer["did"] == "bootstrap"
    before = keys(parcels)
    again = cycle(parcels, "2024-03-01", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert json.loads(again.communicate()[0])["new"] is False and keys(parcels) == before # Idle: no entry


def test_cycles_on_either_kind_of_database(parcels, capsys):
    def call(*words):
        capsys.readouterr()
        return main([*words, "--root", str(parcels), "--json"]), json.loads(capsys.readouterr().out)
    code, first = call("cycle", "--now", "2024-03-01")
    assert (code, first["did"], first["verdict"]) == (0, "bootstrap", "PASS")
    code, second = call("cycle", "--now", "2024-03-22")
    assert code in (0, 3, 4) and second["state"] == "ok"
    book = open_workbench(parcels)
    kept = book.ask(ledger.entries)
    assert [e.seq for e in kept] == list(range(1, len(kept) + 1))
    before = book.ask(catalog.dump)
    with book.engine.begin() as c: catalog.rebuild(c, ledger.entries(c))
    assert book.ask(catalog.dump) == before and len(before["cycles"]) == 2
    assert call("show", first["run"])[1]["model"] == call("status")[1]["champion"]["model"] or second["did"] == "refresh"
    assert call("doctor")[0] == 0


# --- A server that fails ---

only_postgresql = pytest.mark.parametrize("new_database", ["postgresql"], indirect=True) # SQLite's crashes are in test_ledger


@pytest.fixture
def server(new_database, request): return request.getfixturevalue("postgres_server") # Asked for late: it may be left untested


def backends(url): # -> a connection of its own, and the query that ends all others of ours on this database
    text = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname=current_database() AND application_name='retrain_nb'"
    return sa.create_engine(url, isolation_level="AUTOCOMMIT"), sa.text(text)


@only_postgresql
def test_a_connection_killed_in_mid_transaction_is_named_and_leaves_nothing(server, database_url):
    engine, (admin, kill) = open_database(database_url), backends(database_url)
    with pytest.raises(LostError, match="connection was lost.*Run it again"), engine.begin() as c:
        ledger.append(c, "test.fact", "a", {}, "")
        with admin.connect() as a: assert a.execute(kill).scalar() >= 1
        ledger.append(c, "test.fact", "b", {}, "")
    with reading(engine) as c: assert ledger.entries(c) == []
    with engine.begin() as c: assert [ledger.append(c, "test.fact", k, {}, "").seq for k in "ab"] == [1, 2]
    for e in (engine, admin): e.dispose()


@only_postgresql
def test_a_connection_that_died_while_nobody_used_it_is_replaced_without_a_word(server, database_url):
    engine, (admin, kill) = open_database(database_url), backends(database_url)
    with engine.begin() as c: ledger.append(c, "test.fact", "a", {}, "")
    for n, key in enumerate("bcd", 2):                     # The pool holds a connection, and does not know that its other end is gone
        with admin.connect() as a: assert a.execute(kill).scalar() >= 1
        with engine.begin() as c: assert ledger.append(c, "test.fact", key, {}, "").seq == n
        with admin.connect() as a: assert a.execute(kill).scalar() >= 1
        with reading(engine) as c: assert len(ledger.entries(c)) == n
    for e in (engine, admin): e.dispose()


@only_postgresql
def test_40_appends_each_with_its_connection_killed_have_one_effect_each(server, parcels, database_url):
    book, (admin, kill), now = open_workbench(parcels), backends(database_url), datetime.now(UTC)
    rng, written, killed = random.Random(7), [], []
    def disturb():
        with admin.connect() as a:
            while len(written) < 40:
                n = len(written)
                time.sleep(rng.uniform(0, 0.03))           # Anywhere in a transaction, its commit included
                killed.append(a.execute(kill).scalar())
                while len(written) == n: time.sleep(0.001)
    with book.lock():
        thread = threading.Thread(target=disturb)
        thread.start()
        for i in range(40): written.append(book.append("run.planned", f"r{i}:planned", {"run": f"r{i}", "page": "retrain"}, now).seq)
        thread.join()
    assert sum(killed) > 10 and written == list(range(2, 42)) # The first entry is the key
    assert keys(parcels) == [f"r{i}:planned" for i in range(40)]
    assert [r["run"] for r in book.ask(catalog.runs, 200)] == [f"r{i}" for i in range(39, -1, -1)]
    admin.dispose()


def test_a_decision_whose_connection_breaks_is_tried_again_and_is_there_once_and_whole(parcels, monkeypatch):
    from retrain_nb.loop import cycle
    from retrain_nb.services import workbench
    book, real, left = open_workbench(parcels), workbench._Pen.enter, []
    def enter(pen, kind, key, body):
        if kind == "cycle.ended" and left: raise left.pop()     # Its first half is written, and taken back
        return real(pen, kind, key, body)
    monkeypatch.setattr(workbench._Pen, "enter", enter)
    monkeypatch.setattr(workbench, "PAUSES", (0, 0))
    def decide(key, times):
        left[:] = [LostError("the connection was lost.", "Run it again.")]*times
        body = {"run": "r", "as_of": "2024-03-01T00:00:00Z", "verdict": None, "model": "", "reason": "no"}
        cycle._settle(book, key, {"champion.kept": body, "cycle.ended": {**body, "cycle": key, "outcome": "FAIL", "champion": "", "did": "kept", "sentence": "no"}})
    decide("cycle-a", 2)
    with pytest.raises(LostError): decide("cycle-b", 3)
    assert keys(parcels) == ["cycle-a:champion", "cycle-a:ended"] and not left


@only_postgresql
def test_a_server_that_crashes_3_times_loses_nothing_acknowledged(server, parcels):
    book, acknowledged, over = open_workbench(parcels), [], threading.Event()
    def write():
        while not over.is_set():
            n = len(acknowledged)
            try: acknowledged.append((book.append("test.fact", f"k{n}", {"n": n}, datetime.now(UTC)).seq, f"k{n}"))
            except LostError: time.sleep(0.1)              # A start that takes longer than all our attempts: run it again, as we are told
    thread = threading.Thread(target=write)
    thread.start()
    for n in range(3):
        while thread.is_alive() and len(acknowledged) < 20*(n + 1): time.sleep(0.01)
        server.crash()
        server.start()
    over.set()
    thread.join()
    kept = [(e.seq, e.key) for e in open_workbench(parcels).ask(ledger.entries) if e.kind != "ledger.key"]
    assert kept[:len(acknowledged)] == acknowledged and len(acknowledged) >= 60
    assert len(kept) == len(acknowledged)                  # What was not acknowledged was tried again until it was
