"Keys handed over, leaked, lost and interrupted; a witness that remembers; a checkpoint that other tools can check"
import base64
import contextlib
import re
import shutil
import sqlite3
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from retrain_nb import auditor
from retrain_nb.loop import custody
from retrain_nb.loop.audit import verify
from retrain_nb.notes import check_note, parse_tlog_proof
from retrain_nb.records import LockedError, UsageError, VerificationError
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.stores import catalog, keys, ledger, turns

NOW = datetime(2024, 6, 1, tzinfo=UTC)


@pytest.fixture
def book(tmp_path):
    furnish(tmp_path/"book", "toy")
    found = open_workbench(tmp_path/"book")
    for i in range(5): note(found, i)
    return found


def note(book, i): return book.append("workbench.noted", f"note:{i}", {"text": f"number {i}"}, NOW)


def with_witness(book, where): return replace(book, settings=book.settings.model_copy(update={"ledger": book.settings.ledger.model_copy(update={"witness": str(where)})}))


def tamper(book, *statements): # As somebody would who owns the database
    book.engine.dispose()
    engine = sa.create_engine(f"sqlite:///{book.store}/ledger.db")
    with engine.begin() as c:
        for name in c.exec_driver_sql("SELECT name FROM sqlite_master WHERE type='trigger'").scalars().all(): c.exec_driver_sql(f"DROP TRIGGER {name}")
        for text in statements: c.exec_driver_sql(text)
    engine.dispose()


def test_what_a_retired_key_signed_before_stays_valid_and_what_it_signs_later_is_found(book):
    former = book.signer
    copied = {end: (book.key_path.parent/f"ledger{end}").read_bytes() for end in ("", ".pub")}
    custody.hand_over(book, NOW, reason="leaked")
    note(book, 5)
    assert verify(book.root)["verdict"] == "PASS"
    assert [s["vkey"] for s in verify(book.root)["signed_by"]] == [former.vkey, book.signer.vkey]
    for end, data in copied.items(): (book.key_path.parent/f"ledger{end}").write_bytes(data) # The thief has a copy
    thief = open_workbench(book.root)
    with pytest.raises(VerificationError, match="is another"): note(thief, 6)                # And our own code does not sign with it
    with thief.engine.begin() as c:                                                         # So he writes with his own
        ledger.append(c, "workbench.noted", "note:7", {"text": "his"}, "2024-06-01T00:00:00Z")
        ledger.seal(c, thief.checkpoint)
    found = verify(book.root)
    assert found["verdict"] == "FAIL" and found["first_bad"]["damage"] == "retired key"


def test_an_interrupted_handing_over_is_told_and_finished(book, monkeypatch):
    monkeypatch.setattr(custody, "_move_in", lambda *_: None) # Power fails here
    new = custody.hand_over(book, NOW)
    monkeypatch.undo()
    again = open_workbench(book.root)
    with pytest.raises(VerificationError, match="retrain-nb key"): note(again, 6)
    assert custody.finish(again) and again.signer.vkey == new
    note(again, 6)
    assert not custody.finish(again) and verify(book.root)["verdict"] == "PASS"


def test_a_lost_key_is_replaced_and_trusted_only_by_name(book):
    for path in book.key_path.parent.iterdir(): path.unlink()
    lost = open_workbench(book.root)
    with pytest.raises(UsageError, match="missing|no key|not there"): note(lost, 5)
    new = custody.replace_lost(lost, NOW)
    note(lost, 5)
    assert verify(book.root)["first_bad"]["damage"] == "untrusted key"
    assert verify(book.root, trusted=[new])["verdict"] == "PASS"


def state(book): # -> all that a handing over could touch: entries, signed heads, views, files of keys
    with book.engine.connect() as c: heads = c.execute(sa.select(ledger.heads)).all()
    files = {p.name: p.read_bytes() for p in book.key_path.parent.iterdir()}
    return book.ask(ledger.entries), heads, book.ask(catalog.dump), files


def hand_on(book): return custody.hand_over(book, NOW)


@pytest.mark.parametrize("change", [hand_on, lambda book: custody.replace_lost(book, NOW)], ids=["hand over", "go on without"])
def test_who_lost_his_turn_hands_nothing_over(book, tmp_path, database_url, change):
    furnish(tmp_path/"shared", "toy")
    book = open_workbench(tmp_path/"shared")
    book = replace(book, settings=book.settings.model_copy(update={"workbench": book.settings.workbench.model_copy(update={"database": database_url})}))
    note(book, 0)
    if change is not hand_on: book.key_path.rename(tmp_path/"gone")
    with book.lock():
        with book.engine.begin() as c: # Silent for an hour: the lease ran out, and another took it
            c.execute(turns.leases.update().values(until="2020-01-01T00:00:00Z"))
            assert turns.take(c, "work", "another", 3600, NOW) == book.held["fence"] + 1
        before = state(book)
        with pytest.raises(LockedError, match="another has taken over"): change(book)
        assert state(book) == before
        with book.engine.begin() as c: assert turns.release(c, "work", book.held["fence"] + 1)
    with book.lock(): new = change(book)                                     # In its own turn it may
    assert book.signer.vkey == new == book.ask(ledger.newest, "ledger.key").body["vkey"]
    book.engine.dispose()


def test_every_entry_of_a_key_is_projected_once_and_made_again_the_views_are_the_same(book, monkeypatch):
    shown = []
    monkeypatch.setitem(catalog.PROJECTIONS, "ledger.key", lambda c, seq, at, body: shown.append((seq, body["reason"])))
    note(book, 5)
    hand_on(book)
    book.key_path.unlink()
    vars(book).pop("signer", None)
    custody.replace_lost(book, NOW)
    assert shown == [(8, "rotated"), (9, "lost")]
    before = book.ask(catalog.dump)
    with book.engine.begin() as c: catalog.rebuild(c, ledger.entries(c))
    assert book.ask(catalog.dump) == before and shown[2:] == [(1, "first"), *shown[:2]] # From the ledger, the same


def test_the_first_key_is_projected_too(tmp_path, monkeypatch):
    furnish(tmp_path, "toy")
    shown = []
    monkeypatch.setitem(catalog.PROJECTIONS, "ledger.key", lambda c, seq, at, body: shown.append(seq))
    note(open_workbench(tmp_path), 0)
    assert shown == [1]


def test_there_is_one_door_to_the_ledger():
    package = Path(custody.__file__).parent.parent
    writers = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if re.search(r"ledger\.(append|seal|plant)\(", p.read_text())}
    assert writers == {"services/workbench.py"}


def test_a_handing_over_that_fails_at_its_entry_moves_no_key(book, monkeypatch):
    former = book.signer.vkey
    monkeypatch.setattr(ledger, "seal", lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): hand_on(book)
    monkeypatch.undo()
    assert (book.key_path.parent/"ledger.next").exists() and keys.load_key(book.key_path, book.signer.name).vkey == former
    assert note(book, 5).seq == 7 and custody.finish(book) is False          # The former key goes on
    made = keys.load_key(book.key_path.parent/"ledger.next", book.signer.name).vkey
    assert hand_on(book) == made and verify(book.root)["verdict"] == "PASS"  # And the one that was made is used


def test_a_persons_own_openssh_key_signs_the_ledger(book, tmp_path):
    own = tmp_path/"id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ana@desk", "-f", str(own)], check=True)
    custody.hand_over(book, NOW, to=own)
    mine = replace(book, settings=book.settings.model_copy(update={"ledger": book.settings.ledger.model_copy(update={"key": str(own)})}))
    note(mine, 5)
    assert verify(book.root)["verdict"] == "PASS" and keys.load_key(own, mine.signer.name).vkey == verify(book.root)["signed_by"][-1]["vkey"]


def test_ssh_keygen_checks_a_checkpoint_and_refuses_a_changed_one(book, tmp_path):
    given = custody.give(book, tmp_path/"k.note")
    words = ["ssh-keygen", "-Y", "verify", "-f", f"{given}.signers", "-I", book.signer.name, "-n", custody.NAMESPACE, "-s", f"{given}.sig"]
    assert subprocess.run(words, input=given.read_bytes(), capture_output=True).returncode == 0
    assert subprocess.run(words, input=given.read_bytes().replace(b"\n6\n", b"\n5\n"), capture_output=True).returncode != 0


def test_each_entry_is_proved_by_an_auditor_who_has_nothing_else(book):
    for entry in book.ask(ledger.entries):
        index, path, signed = parse_tlog_proof(custody.proof(book, entry.seq))
        point = custody.parse_checkpoint(check_note(signed, [book.signer.vkey])[0])
        assert index == entry.seq - 1
        assert custody.ledger.merkle.check_inclusion(bytes.fromhex(entry.leaf), index, point.size, path, point.root)
    for seq in (0, 7, -1):
        with pytest.raises(UsageError, match="no entry"): custody.proof(book, seq)


@pytest.mark.parametrize("where", ["file", "git"])
def test_a_witness_is_renewed_and_finds_a_truncated_and_signed_ledger(book, tmp_path, where):
    if where == "git": subprocess.run(["git", "init", "-q", str(book.root)], check=True)
    if where == "git": subprocess.run(["git", "-C", str(book.root), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    watched = with_witness(book, "git" if where == "git" else tmp_path/"kept.note")
    assert custody.testify(watched) == custody.testify(watched) == 6
    note(watched, 5)
    assert custody.testify(watched) == 7
    held = custody.held(watched)
    shutil.copytree(book.root, tmp_path/"before")
    tamper(book, "DELETE FROM entries WHERE seq > 5", "DELETE FROM nodes WHERE level=1 AND idx > 1 OR level=2 AND idx > 0", "DELETE FROM heads WHERE size > 5")
    forger = with_witness(open_workbench(book.root), watched.settings.ledger.witness)
    for i in range(10, 14): note(forger, i)                         # With the key, the other past is signed
    assert verify(book.root)["verdict"] == "PASS"                   # And nobody can tell
    with pytest.raises(VerificationError, match="witness"): custody.testify(forger)
    assert custody.held(forger) == held                             # The witness keeps what it had
    found = verify(book.root, [held])
    assert found["verdict"] == "FAIL" and found["first_bad"]["damage"] in ("truncated", "forked")
    assert verify(tmp_path/"before", [held])["verdict"] == "PASS"


def test_a_witness_that_cannot_be_reached_says_so(book, tmp_path):
    with pytest.raises(Exception, match="git repository"): custody.testify(with_witness(book, "git"))


def test_the_tag_of_a_checkpoint_goes_into_the_workbenchs_own_repository_whoever_called(book, tmp_path, monkeypatch):
    for root in (book.root, other := tmp_path/"other"):
        subprocess.run(["git", "init", "-q", str(root)], check=True)
        subprocess.run(["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    monkeypatch.setenv("GIT_DIR", str(other/".git"))       # As a hook of another repository has it
    custody.testify(watched := with_witness(book, "git"))
    assert custody.recall(watched)
    monkeypatch.delenv("GIT_DIR")
    tags = [subprocess.run(["git", "-C", str(root), "tag"], check=True, capture_output=True, text=True).stdout for root in (book.root, other)]
    assert tags[0].startswith("ledger/checkpoint/") and tags[1] == ""
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(Exception, match="in the way|cannot be a folder"): custody.testify(with_witness(book, tmp_path/"file"/"kept.note"))
    (tmp_path/"odd.note").write_text("nothing signed here")
    with pytest.raises(UsageError, match="checkpoint"): custody.testify(with_witness(book, tmp_path/"odd.note"))


def test_nothing_is_signed_over_a_changed_past(book):
    tamper(book, "UPDATE nodes SET hash='" + "0"*64 + "' WHERE level=2 AND idx=0")
    with pytest.raises(VerificationError, match="not those that were signed"): note(open_workbench(book.root), 9)
    tamper(book, "DELETE FROM heads")
    with pytest.raises(VerificationError, match="heads of the ledger are gone"): note(open_workbench(book.root), 9)


def test_an_export_passes_without_the_original_and_holds_no_private_key(book, tmp_path):
    model = book.artifacts.put(b'{"booster": "tree"}', "model")
    book.append("champion.set", "first", {"model": model, "run": "r", "decision": "bootstrap", "verdict": None, "by": "t", "reason": "t"}, NOW)
    custody.export(book, tmp_path/"out")
    shutil.rmtree(book.root)
    assert auditor.audit(tmp_path/"out")["verdict"] == "PASS"
    assert not [p for p in Path(tmp_path/"out").rglob("*") if p.is_file() and b"PRIVATE KEY" in p.read_bytes()]
    (tmp_path/"out"/"artifacts"/model).write_bytes(b'{"booster": "free"}')
    assert auditor.audit(tmp_path/"out")["first_bad"]["damage"] == "changed file"


def test_a_ledger_of_the_first_format_is_adopted_once_and_its_entries_stay_as_they_were(tmp_path):
    root = tmp_path/"old"
    furnish(root, "toy")
    shutil.copytree(Path(__file__).parent/"fixtures"/"format1", root/".retrain")
    assert verify(root)["verdict"] == "INSUFFICIENT"                         # Sound, and signed by nobody
    before = auditor.audit(root)["entries"]
    book = open_workbench(root)
    told = book.ask(ledger.entries)
    assert len(told) == before and book.ask(ledger.last_head) is None        # Looking signs nothing
    note(book, 1)
    after = book.ask(ledger.entries)
    assert after[:before] == told and [e.kind for e in after[before:]] == ["ledger.key", "workbench.noted"]
    assert verify(root)["verdict"] == "PASS"
    tamper(book, "DELETE FROM heads", "DELETE FROM nodes", f"DELETE FROM entries WHERE seq > {before}", "UPDATE entries SET body='{}' WHERE seq=2")
    assert verify(root)["first_bad"]["seq"] == 2


@pytest.mark.parametrize(("kind", "key"), [("workbench.noted", "a\0b"), ("workbench\0noted", "ab")])
def test_a_control_character_in_a_name_is_refused_in_the_same_words_on_both_databases_and_makes_no_key(tmp_path, database_url, kind, key):
    furnish(tmp_path/"book", "toy")
    book = open_workbench(tmp_path/"book")
    book = replace(book, settings=book.settings.model_copy(update={"workbench": book.settings.workbench.model_copy(update={"database": database_url})}))
    with pytest.raises(UsageError, match=r"^(the key 'a\\x00b' of a `workbench.noted` is not plain text|'workbench\\x00noted' cannot be a name)"): book.append(kind, key, {}, NOW)
    assert book.ask(ledger.entries) == [] and not book.key_path.exists()
    book.engine.dispose()


def test_one_of_a_thing_is_told_in_the_singular(book, tmp_path):
    lines = auditor.told_to_people(verify(book.root, [custody.checkpoint(book)]))
    assert ", 1 checkpoint, " in lines and lines.startswith("PASS: 6 entries, ") and "1 checkpoints" not in lines
    furnish(tmp_path/"young", "toy")
    young = open_workbench(tmp_path/"young")
    with young.writing(NOW) as pen: pen.vouch()                              # Its key, and nothing else
    said = auditor.told_to_people(verify(young.root, [custody.checkpoint(young)]))
    assert said.startswith("PASS: 1 entry, 1 head, 1 signature, 1 checkpoint, 1 vouched")
    with pytest.raises(UsageError, match="The ledger has 1 entry[.]"): custody.proof(young, 2)


# --- Nobody gets a forged past signed by writing to the database alone ---

def forged(root, heads):
    "One body changed, all hashes made again, and the heads that the forger would like"
    book = open_workbench(root)
    book.engine.dispose()
    with contextlib.closing(sqlite3.connect(book.store/"ledger.db", isolation_level=None)) as c:
        triggers = c.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers: c.execute(f"DROP TRIGGER {name}")
        tree = auditor.Tree()
        c.execute("DELETE FROM nodes")
        for seq, kind, key, at, body in c.execute("SELECT seq, kind, key, at, body FROM entries ORDER BY seq").fetchall():
            body = body.replace('"loss":1', '"loss":9')
            leaf = auditor.leaf_hash(auditor.entry_bytes(seq, kind, key, at, body))
            c.execute("UPDATE entries SET body = ?, leaf = ? WHERE seq = ?", (body, leaf.hex(), seq))
            for level, number, node in tree.add(leaf): c.execute("INSERT INTO nodes VALUES (?, ?, ?)", (level, number, node.hex()))
        heads(c, tree.root())
        for _, sql in triggers: c.execute(sql)


def put_a_root_under_the_old_signature(c, root):
    size, note = c.execute("SELECT size, note FROM heads ORDER BY size DESC LIMIT 1").fetchone()
    lines = note.split("\n")
    c.execute("UPDATE heads SET note = ? WHERE size = ?", ("\n".join([lines[0], lines[1], base64.b64encode(root).decode(), *lines[3:]]), size))


def drop_all_heads_but_the_first(c, root): c.execute("DELETE FROM heads WHERE size > (SELECT MIN(size) FROM heads)")


@pytest.mark.parametrize("heads", [put_a_root_under_the_old_signature, drop_all_heads_but_the_first])
def test_a_forged_past_is_not_signed_by_the_next_entry(tmp_path, heads):
    furnish(tmp_path, "toy")
    book = open_workbench(tmp_path)
    for i in range(5): book.append("note.made", f"note:{i}", {"loss": i}, datetime(2013, 6, 1, tzinfo=UTC))
    forged(tmp_path, heads)
    book = open_workbench(tmp_path)
    before = book.ask(ledger.last_head)
    with pytest.raises(VerificationError, match="newest signed head"): book.append("note.made", "next", {"loss": 7}, datetime(2013, 6, 2, tzinfo=UTC))
    assert book.ask(ledger.last_head) == before and auditor.audit(tmp_path)["verdict"] == "FAIL"


def test_verifying_a_database_in_wal_mode_leaves_nothing_beside_it(book):
    book.engine.dispose()
    with contextlib.closing(sqlite3.connect(book.store/"ledger.db")) as c: c.execute("PRAGMA journal_mode = wal")
    before = {p.name: p.read_bytes() for p in book.store.iterdir() if p.is_file()}
    assert verify(book.root)["verdict"] == "PASS" and {p.name: p.read_bytes() for p in book.store.iterdir() if p.is_file()} == before
