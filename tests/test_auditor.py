"""The auditor against people who own the database, rotten disks and rows that nobody wrote.

The ledgers here are sealed by a small writer of its own: hashes by the recursive definition of RFC 6962, JSON by `rfc8785`, notes by hand.
Nothing of the auditor is used to make what it has to judge."""
import ast
import base64
import hashlib
import html
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from retrain_nb import auditor, notes
from retrain_nb.auditor import DAMAGE, AuditError, audit, check_ledger, parse_vkey
from retrain_nb.mentions import names
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.stores.database import SCHEMA

ALONE = Path(auditor.__file__)
FORMAT1 = Path(__file__).parent/"fixtures"/"format1"
ORIGIN, AT = "retrain_nb/toy", "2013-06-01T03:00:00Z"
TABLES = {"entries": 'seq BIGINT NOT NULL, kind VARCHAR(64) NOT NULL, "key" TEXT NOT NULL, at VARCHAR(40) NOT NULL, body TEXT NOT NULL, '
                     'leaf VARCHAR(64) NOT NULL, PRIMARY KEY (seq), UNIQUE ("key")',
          "nodes": "level INTEGER NOT NULL, idx BIGINT NOT NULL, hash VARCHAR(64) NOT NULL, PRIMARY KEY (level, idx)",
          "heads": "size BIGINT NOT NULL, note TEXT NOT NULL, PRIMARY KEY (size)"}


# --- A writer of its own ---

def sha(*parts): return hashlib.sha256(b"".join(parts)).digest()


def b64(data): return base64.b64encode(data).decode()


def mth(leaves): # Merkle tree hash, word for word as RFC 6962 defines it
    if len(leaves) <= 1: return leaves[0] if leaves else sha()
    k = 1
    while k*2 < len(leaves): k *= 2
    return sha(b"\x01", mth(leaves[:k]), mth(leaves[k:]))


class Signer:
    def __init__(self, seed, name=ORIGIN):
        self.private = Ed25519PrivateKey.from_private_bytes(sha(b"a key for tests", bytes([seed])))
        self.public, self.name = self.private.public_key().public_bytes_raw(), name
        self.id = sha(name.encode(), b"\n\x01", self.public)[:4]
        self.vkey = f"{name}+{self.id.hex()}+{b64(b'%c' % 1 + self.public)}"

    def fact(self, previous=None, reason="first"):
        ssh = "ssh-ed25519 " + b64(b"".join(len(part).to_bytes(4, "big") + part for part in (b"ssh-ed25519", self.public)))
        return "ledger.key", {"origin": self.name, "vkey": self.vkey, "ssh": ssh, "previous": previous.vkey if previous else "", "reason": reason}

    def head(self, leaves, sign=None):
        text = f"{self.name}\n{len(leaves)}\n{b64(mth(leaves))}\n"
        return f"{text}\n— {self.name} {b64(self.id + (sign or self.private.sign)(text.encode()))}\n"


OURS, NEXT, THEIRS = Signer(1), Signer(2), Signer(3)


def leaf_of(seq, kind, key, at, body): # Through a JSON library, as an object: not by joining texts
    return sha(b"\x00", rfc8785.dumps({"seq": seq, "kind": kind, "key": key, "at": at, "body": json.loads(body)}))


def hashed(rows): # -> rows with their right numbers and leaf hashes
    parts = [(seq, *row[1:5]) for seq, row in enumerate(rows, 1)]
    return [(*part, leaf_of(*part).hex()) for part in parts]


def leaves_of(rows): return [bytes.fromhex(row[5]) for row in rows]


def nodes_of(rows):
    leaves, found = leaves_of(rows), []
    for level in range(1, len(leaves).bit_length()):
        found += [(level, i, mth(leaves[i << level:(i + 1) << level]).hex()) for i in range(len(leaves) >> level)]
    return found


def facts_of(rng, n): # -> as a workbench would write them: text of all sorts, numbers of all sorts, nesting
    def value(depth=2):
        plain = [None, True, rng.randrange(10**9), rng.uniform(-1, 1), 1e-7, 2.5e21, 5e-6, "ü €", 'a "quoted" \\ text\n', "", "😀"]
        if depth == 0 or rng.random() < .6: return rng.choice(plain)
        return {f"name{i}": value(depth - 1) for i in range(3)} if rng.random() < .5 else [value(depth - 1) for _ in range(2)]
    return [(rng.choice(["run.ended", "run.started", "champion.set"]), {"run": f"r{i}", "loss": rng.random(), "more": value()}) for i in range(n)]


def rows_of(facts, name="fact"): return hashed([(0, kind, f"{name}:{i}", AT, rfc8785.dumps(body).decode(), "") for i, (kind, body) in enumerate(facts, 1)])


def ends_of(rng, n): # -> the sizes at which transactions of one to three entries end
    ends = [1]
    while ends[-1] < n: ends.append(min(n, ends[-1] + rng.randint(1, 3)))
    return ends


def heads_of(rows, ends, signer=OURS):
    return [(size, (signer(size) if callable(signer) else signer).head(leaves_of(rows[:size]))) for size in ends]


def write(path, rows, nodes, heads, tables=TABLES):
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as c:
        c.execute("PRAGMA synchronous=OFF")
        c.execute("BEGIN")
        for (name, columns), those in zip(tables.items(), (rows, nodes, heads)):
            c.execute(f"CREATE TABLE {name} ({columns})")
            if those: c.executemany(f"INSERT INTO {name} VALUES ({','.join('?'*len(those[0]))})", those)
        c.execute("COMMIT")
    return path.parent


def overwrite(path, *tables): # As the owner of the database can: triggers are no obstacle to him
    with closing(sqlite3.connect(path, isolation_level=None)) as c:
        c.execute("BEGIN")
        for trigger, in c.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall(): c.execute(f"DROP TRIGGER {trigger}")
        for name, rows in zip(TABLES, tables):
            c.execute(f"DELETE FROM {name}")
            c.executemany(f"INSERT INTO {name} ({', '.join(auditor.COLUMNS[name])}) VALUES ({','.join('?'*len(auditor.COLUMNS[name]))})", rows)
        c.execute("COMMIT")


class World: # An honest ledger, and what an auditor wrote down about it
    def __init__(self, seed, rows=None, heads=None, signer=OURS):
        self.rng, self.signer = random.Random(seed), signer
        self.rows = rows or rows_of([signer.fact(), *facts_of(self.rng, self.rng.randint(11, 39))])
        self.heads = heads or heads_of(self.rows, ends_of(self.rng, len(self.rows)))
        self.ends = [size for size, _ in self.heads]
        self.first = next(row[0] for row in self.rows if row[1] == "ledger.key") + 1
        held = self.rng.randrange(len(self.ends)//2, len(self.ends))
        self.held, self.note = self.heads[held]                      # What an attack stays below, so that it concerns what is vouched for
        self.earlier, self.earlier_note = self.heads[self.rng.randrange(held)]

    def changed(self, s): # -> the fact of entry s, not as it was
        fact = json.loads(self.rows[s - 1][4])
        return (*self.rows[s - 1][:4], rfc8785.dumps({**fact, "loss": self.rng.random()}).decode(), "")

    def transaction(self, s): # -> first and last entry of the one that entry s was written in
        end = next(e for e in self.ends if e >= s)
        return max((e for e in self.ends if e < s), default=0) + 1, end


# --- Eight attacks by the owner of the database; each gives what the auditor must say: kind of damage, and between which entries ---

def pick(w): return w.rng.randint(w.first, w.held) # An entry after the one that names the key; what becomes of that one is asked further down


def edit(w): # One field of one entry, its hash left alone
    s, field = pick(w), w.rng.randint(1, 4)
    row = list(w.rows[s - 1])
    row[field] = w.changed(s)[4] if field == 4 else row[field] + "x"
    return [*w.rows[:s - 1], tuple(row), *w.rows[s:]], nodes_of(w.rows), w.heads, ("edited", s, s)


def delete(w): # One entry, the others numbered anew or not
    s = w.rng.randint(w.first, min(w.held, len(w.rows) - 1))
    rest = [*w.rows[:s - 1], *w.rows[s:]]
    if w.rng.random() < .5: rest = [(seq, *row[1:]) for seq, row in enumerate(rest, 1)]
    return rest, nodes_of(w.rows), w.heads, ("deleted", s, s)


def reorder(w): # Two entries, hashes and all
    a = w.rng.randint(w.first, min(w.held, len(w.rows) - 1))
    b = w.rng.randint(a + 1, len(w.rows))
    rows = list(w.rows)
    rows[a - 1], rows[b - 1] = (a, *rows[b - 1][1:]), (b, *rows[a - 1][1:])
    return rows, nodes_of(w.rows), w.heads, ("reordered", a, a)


def insert(w): # One entry, with its right hash or with another's
    s = pick(w)
    new = (s, "run.ended", "a new fact", AT, '{"loss":0}')
    leaf = leaf_of(*new).hex() if w.rng.random() < .5 else w.rows[s - 1][5]
    rows = [*w.rows[:s - 1], (*new, leaf), *[(row[0] + 1, *row[1:]) for row in w.rows[s - 1:]]]
    return rows, nodes_of(w.rows), w.heads, ("inserted", s, s)


def rechain(w): # Make every hash anew, without the key: heads as they were, or with signatures that are none
    s = pick(w)
    rows = hashed([*w.rows[:s - 1], w.changed(s), *w.rows[s:]])
    heads = w.heads
    if w.rng.random() < .5: heads = [h if h[0] < s else (h[0], w.signer.head(leaves_of(rows[:h[0]]), lambda text: w.rng.randbytes(64))) for h in heads]
    return rows, nodes_of(rows), heads, ("rewritten", *w.transaction(s))


def cut(w): return w.rng.randint(w.earlier, w.held - 1) # How many entries stay: some that were vouched for are gone


def truncate(w): # To an earlier state that was signed, with everything that goes with it
    m = w.rng.choice([e for e in w.ends if w.earlier <= e < w.held])
    rows = w.rows[:m]
    return rows, nodes_of(rows), [h for h in w.heads if h[0] <= m], ("truncated", m + 1, w.held)


def truncate_and_sign(w): # To any state, and go on from there with the key
    m, more = cut(w), w.rng.choice([0, 0, 1, 5, 40])
    rows = hashed([*w.rows[:m], *rows_of(facts_of(w.rng, more), "again")])
    ends = [e for e in w.ends if e < m] + [m, *range(m + 1, m + more + 1)]
    what = ("forked", w.earlier + 1, w.held) if len(rows) >= w.held else ("truncated", len(rows) + 1, w.held)
    return rows, nodes_of(rows), heads_of(rows, ends, w.signer), what


def rewrite_and_sign(w): # Another past, with the key
    s = w.rng.randint(max(w.first, w.earlier + 1), w.held)
    rows = hashed([*w.rows[:s - 1], w.changed(s), *w.rows[s:]])
    return rows, nodes_of(rows), heads_of(rows, w.ends, w.signer), ("forked", w.earlier + 1, w.held)


ATTACKS = [edit, delete, reorder, insert, rechain, truncate, truncate_and_sign, rewrite_and_sign]
NEED_A_WITNESS = {truncate, truncate_and_sign, rewrite_and_sign}
TRIALS = 60


def alone(tmp_path, *words): # -> exit code and verdict of the one file, copied to where nothing of ours is
    place = tmp_path/"alone"
    place.mkdir(exist_ok=True)
    shutil.copy(ALONE, place/"auditor.py")
    done = subprocess.run([sys.executable, "-I", "auditor.py", *map(str, words), "--json"], cwd=place, capture_output=True, text=True)
    assert done.stderr == "" and "Traceback" not in done.stdout
    return done.returncode, json.loads(done.stdout)


def must_be_named(folder, w, what): # -> what the auditor says of the attacked ledger, which must be `what`
    told, (damage, first, last) = audit(folder, [w.earlier_note, w.note]), what
    bad = told["first_bad"]
    assert told["verdict"] == "FAIL"
    assert (bad["damage"], bad["seq"], bad["upto"] or bad["seq"]) == (damage, first, last), told["findings"]
    assert bad["what"] and bad["cure"] == DAMAGE[damage]
    return told


def must_be_named_alone(tmp_path, folder, w, told): # The same by the one file
    (tmp_path/"held.txt").write_text(w.earlier_note + "\nand later\n\n" + w.note)
    assert alone(tmp_path, folder, "--checkpoint", tmp_path/"held.txt") == (6, told)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_sixty_attacks_of_a_kind_are_all_found_and_named_given_a_checkpoint(attack, tmp_path):
    found_without = 0
    for seed in range(TRIALS):
        w = World(seed)
        write(tmp_path/"ledger.db", w.rows, nodes_of(w.rows), w.heads)
        assert audit(tmp_path, [w.earlier_note, w.note])["verdict"] == "PASS"
        *tables, what = attack(w)
        write(tmp_path/"ledger.db", *tables)
        told = must_be_named(tmp_path, w, what)
        found_without += audit(tmp_path)["verdict"] == "FAIL"
        if seed % 30 == 0: must_be_named_alone(tmp_path, tmp_path, w, told)
    assert found_without == (0 if attack in NEED_A_WITNESS else TRIALS) # As the lesson says


@pytest.fixture(scope="module")
def workbench(tmp_path_factory): # -> a workbench in which thirty facts were appended and signed by the house itself, and its signer
    root = tmp_path_factory.mktemp("workbench")
    furnish(root, "toy")
    book = open_workbench(root)
    rng = random.Random(0)
    for i, (_, body) in enumerate(facts_of(rng, 30)): book.append("test.fact", f"fact:{i}", body, datetime(2013, 6, 1, 3, i, tzinfo=UTC))
    book.engine.dispose()
    signer = Signer(0, book.signer.name)
    signer.public, signer.id, signer.vkey = book.signer.public, parse_vkey(book.signer.vkey).id, book.signer.vkey
    signer.private = book.signer # Only its `sign` is used
    return root, signer


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_attacks_on_a_ledger_of_the_house_are_found_and_named(attack, workbench, tmp_path):
    root, signer = workbench
    store = shutil.copytree(root/".retrain", tmp_path/"store")
    with closing(sqlite3.connect(store/"ledger.db")) as c:
        rows, nodes, heads = (c.execute(f"SELECT {', '.join(auditor.COLUMNS[name])} FROM {name} ORDER BY 1, 2").fetchall() for name in TABLES)
    assert len(rows) == 31 and hashed(rows) == rows and sorted(nodes_of(rows)) == nodes    # Two writers, one format
    assert heads == heads_of(rows, [size for size, _ in heads], signer)
    assert audit(store, [heads[9][1]], [signer.vkey])["verdict"] == audit(root)["verdict"] == "PASS"
    for seed in range(8):
        w = World(seed, rows, heads, signer)
        *tables, what = attack(w)
        overwrite(store/"ledger.db", *tables)
        told = must_be_named(store, w, what)
    must_be_named_alone(tmp_path, store, w, told)


def test_the_file_alone_passes_what_is_sound_and_says_so_with_its_exit_code(tmp_path):
    w = World(0)
    write(tmp_path/"ledger.db", w.rows, nodes_of(w.rows), w.heads)
    (tmp_path/"page.html").write_text(f"<html><pre>{html.escape(w.note)}</pre></html>")
    code, told = alone(tmp_path, tmp_path, "--checkpoint", tmp_path/"page.html", "--key", OURS.vkey)
    assert (code, told["verdict"], told["first_bad"], told["findings"]) == (0, "PASS", None, [])
    assert told["checked"]["vouched"] == w.held and told["checked"]["signatures"] == len(w.heads)
    assert told["signed_by"] == [{"vkey": OURS.vkey, "first": 1, "last": len(w.rows)}]
    assert alone(tmp_path, tmp_path, "--key", THEIRS.vkey)[0] == 6
    for words, said in (([], "whoever can write to this folder"), (["--key", OURS.vkey], "whoever has the key"), (["--checkpoint", tmp_path/"page.html"], None)):
        told = alone(tmp_path, tmp_path, *words)[1] # What PASS does not say
        assert told["verdict"] == "PASS" and ("note" not in told if said is None else said in told["note"])
    (tmp_path/"none.txt").write_text("no checkpoint here")
    for words in ([], [tmp_path/"nowhere"], [tmp_path, "--checkpoint", tmp_path/"none.txt"], [tmp_path, "--checkpoint", tmp_path/"gone"],
                  [tmp_path, "--key", "nonsense"], [tmp_path, "--dance"]):
        done = subprocess.run([sys.executable, "-I", ALONE, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_the_file_needs_the_standard_library_and_cryptography_and_nothing_else():
    tree = ast.walk(ast.parse(ALONE.read_text()))
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    tree = ast.walk(ast.parse(ALONE.read_text()))
    names |= {"."*node.level + (node.module or "") for node in tree if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"cryptography"}


def test_every_word_for_damage_is_used_and_no_other():
    texts = Counter(node.value for node in ast.walk(ast.parse(ALONE.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    assert {word for word in DAMAGE if texts[word] < 2} == {"changed view"} # Once is in the list itself; views are the workbench's own business
    with pytest.raises(KeyError): auditor.Finding(damage="odd", seq=1, what="").cure # noqa: B018


def test_the_auditor_knows_the_present_version_of_the_database():
    assert SCHEMA in auditor.SCHEMAS # Whoever adds a step decides what it means to an auditor


# --- Bytes that changed by themselves ---

def content(folder): # -> what the three tables say, or nothing if they cannot be read
    try:
        with closing(sqlite3.connect(f"file:{folder}/ledger.db?mode=ro", uri=True)) as c:
            return [c.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in TABLES]
    except sqlite3.Error: return None


def test_a_flipped_bit_of_the_database_is_found_or_changes_nothing(tmp_path):
    w, rng, harmless = World(5), random.Random(0), 0
    write(tmp_path/"ledger.db", w.rows, nodes_of(w.rows), w.heads)
    sound, before = (tmp_path/"ledger.db").read_bytes(), content(tmp_path)
    used = [place for place, byte in enumerate(sound) if byte] # Most zeros are room that nobody uses
    for trial in range(300):
        data, place = bytearray(sound), rng.randrange(400) if trial < 50 else rng.choice(used) # Some where the file says how it is to be read
        data[place] ^= 1 << rng.randrange(8)
        (tmp_path/"ledger.db").write_bytes(data)
        if audit(tmp_path)["verdict"] == "PASS":
            harmless += 1
            assert content(tmp_path) == before, place
    assert harmless < 60 # Most of them where the file counts its own changes, or keeps room that it used before


def test_a_database_cut_short_or_of_another_kind_is_a_finding(tmp_path):
    w = World(5)
    write(tmp_path/"ledger.db", w.rows, nodes_of(w.rows), w.heads)
    sound = (tmp_path/"ledger.db").read_bytes()
    for data in (b"", b"hello", sound[:100], sound[:5000], sound[:len(sound)//2], sound[:-4096], os.urandom(8192), b"\0"*len(sound)):
        (tmp_path/"ledger.db").write_bytes(data)
        told = audit(tmp_path)
        assert told["verdict"] == "FAIL" and "damaged database" in {f["damage"] for f in told["findings"]}, len(data)


# --- Rows that nobody wrote ---

LOOSE = {"entries": "seq, kind, key, at, body, leaf", "nodes": "level, idx, hash", "heads": "size, note"} # Whoever owns a file can drop its constraints


@pytest.mark.parametrize("statement, damage, seq", [
    ("UPDATE entries SET body='{\"run\":' WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET body='[1]' WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET body=replace(body, ':', ': ') WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET body='{\"a\":NaN}' WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET body=CAST(x'7b22ff223a317d' AS TEXT) WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET kind=CAST(x'72756eff' AS TEXT) WHERE seq=4", "malformed", 4),
    ("UPDATE heads SET note=CAST(x'ff0a' AS TEXT) || note WHERE size=6", "bad signature", 6),
    ("UPDATE heads SET note=note || CAST(x'ff0a' AS TEXT) WHERE size=12", "rewritten", 12),
    ("UPDATE entries SET body=printf('%.200000c', '[') WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET body=x'7b7d' WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET body=NULL WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET key=1.5 WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET leaf='' WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET leaf=upper(leaf) WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET leaf=(SELECT leaf FROM entries WHERE seq=5) WHERE seq=4", "edited", 4),
    ("UPDATE entries SET seq='four' WHERE seq=4", "deleted", 4),
    ("UPDATE entries SET seq=4.5 WHERE seq=4", "malformed", 4),
    ("UPDATE entries SET seq=-3 WHERE seq=4", "inserted", -3),
    ("UPDATE entries SET seq=9223372036854775807 WHERE seq=4", "deleted", 4),
    ("INSERT INTO entries SELECT * FROM entries WHERE seq=4", "inserted", 4),
    ("UPDATE entries SET key=(SELECT key FROM entries WHERE seq=3) WHERE seq=4", "malformed", 4),
    ("DELETE FROM entries", "truncated", 1),
    ("UPDATE nodes SET hash=upper(hash) WHERE level=1 AND idx=3", "broken index", 8),
    ("UPDATE nodes SET hash=NULL WHERE level=2 AND idx=0", "broken index", 4),
    ("DELETE FROM nodes WHERE level=1 AND idx=0", "broken index", 2),
    ("DELETE FROM nodes", "broken index", 2),
    ("INSERT INTO nodes VALUES (9, 9, 'x')", "broken index", 12),
    ("INSERT INTO nodes SELECT * FROM nodes WHERE level=2", "broken index", None),
    ("DELETE FROM heads", "unsigned", 1),
    ("DELETE FROM heads WHERE size=12", "unsigned", 12),
    ("UPDATE heads SET note='hello' WHERE size=6", "bad signature", 6),
    ("UPDATE heads SET note=NULL WHERE size=6", "malformed", None),
    ("UPDATE heads SET size='six' WHERE size=6", "malformed", None),
    ("UPDATE heads SET size=99 WHERE size=6", "bad signature", 13),
    ("UPDATE heads SET note=(SELECT note FROM heads WHERE size=5) WHERE size=6", "bad signature", 6),
    ("UPDATE heads SET note=replace(note, '=', '') WHERE size=6", "bad signature", 6),
    ("UPDATE heads SET note=replace(note, 'toy', 'boy') WHERE size=6", "wrong key", 6),
    ("ALTER TABLE entries ADD COLUMN colour", "newer format", None),
    ("ALTER TABLE heads DROP COLUMN note", "unsigned", 1),
    ("DROP TABLE entries", "truncated", 1),
    ("CREATE TABLE alembic_version AS SELECT '0099' AS version_num", "newer format", None),
])
def test_a_row_that_nobody_wrote_is_a_finding_and_never_a_crash(tmp_path, statement, damage, seq):
    rows = rows_of([OURS.fact(), *facts_of(random.Random(1), 11)])
    write(tmp_path/"ledger.db", rows, nodes_of(rows), heads_of(rows, range(1, 13)), LOOSE)
    assert audit(tmp_path)["verdict"] == "PASS"
    with closing(sqlite3.connect(tmp_path/"ledger.db")) as c, c: c.execute(statement)
    told = audit(tmp_path)
    assert told["verdict"] == "FAIL"
    assert (told["first_bad"]["damage"], told["first_bad"]["seq"]) == (damage, seq), told["findings"]
    if "COLUMN note" in statement or "DROP TABLE" in statement: assert "damaged database" in {f["damage"] for f in told["findings"]}
    (json.dumps(told, ensure_ascii=False) + auditor.told_to_people(told)).encode()
    if seq is None or "seq=" in statement:
        assert audit(tmp_path, [OURS.head(leaves_of(rows))])["verdict"] == "FAIL"


def test_numbers_that_python_spells_otherwise_are_canonical_as_rfc_8785_has_them():
    rng = random.Random(0)
    for _ in range(3000):
        value = rng.choice([rng.uniform(-1, 1)*10.0**rng.randint(-30, 30), rng.randrange(-2**53 + 1, 2**53), float(rng.randrange(2**60)), 0.0, -0.0, 1e21, 1e-6, 1e-7])
        text = rfc8785.dumps({"v": value, "\ufb33": 1, "\U0001f600": "e-1"}).decode()
        assert auditor.parse_canonical(text) == json.loads(text)
        loose = json.dumps({"v": value, "\U0001f600": "e-1", "\ufb33": 1}, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
        if loose != text:
            with pytest.raises(ValueError, match="canonical"): auditor.parse_canonical(loose)


# --- Keys ---

def turned(reason, since, n=10, k=5): # -> rows and heads of a ledger in which entry k changes the key
    facts = facts_of(random.Random(2), n)
    rows = rows_of([OURS.fact(), *facts[1:k - 1], NEXT.fact(OURS, reason), *facts[k:]])
    return rows, heads_of(rows, range(1, n + 1), lambda size: NEXT if size >= since else OURS)


def found(rows, heads, **more): return [(f.damage, f.seq) for f in check_ledger(rows, nodes_of(rows), heads, **more).findings]


def test_a_rotated_key_signs_from_the_next_head_on_and_the_old_one_never_again():
    rows, heads = turned("rotated", 6)
    assert found(rows, heads) == [] and found(rows, heads, trusted=[OURS.vkey]) == [] and found(rows, heads, trusted=[NEXT.vkey]) == []
    assert found(rows, heads, held=[heads[2][1], heads[8][1]]) == []
    assert found(rows, heads, trusted=[THEIRS.vkey]) == [("wrong key", 1)]
    late = [*heads[:7], (8, OURS.head(leaves_of(rows[:8]))), *heads[8:]]
    assert found(rows, late) == [("retired key", 8)]
    assert found(rows, heads, held=[late[7][1]]) == [("retired key", 8)]
    assert found(rows, turned("rotated", 5)[1]) == [("retired key", 5)] # The new key seals its own arrival
    assert found(rows, heads[:4] + heads[5:]) == [("wrong key", 5)]     # Nobody sealed it


def test_a_key_in_place_of_a_lost_one_counts_only_if_the_auditor_says_so():
    rows, heads = turned("lost", 5)
    assert found(rows, heads) == [("untrusted key", 5)] and found(rows, heads, trusted=[OURS.vkey]) == [("untrusted key", 5)]
    assert found(rows, heads, trusted=[NEXT.vkey]) == []
    assert found(rows, turned("lost", 6)[1], trusted=[NEXT.vkey]) == [("retired key", 5)]


def test_another_key_for_the_whole_history_is_found_by_a_pin_or_by_a_checkpoint_only(tmp_path):
    w = World(3)
    rows = hashed([rows_of([THEIRS.fact()])[0], *w.rows[1:]])
    heads = heads_of(rows, w.ends, THEIRS)
    assert found(rows, heads) == []
    assert found(rows, heads, trusted=[OURS.vkey]) == [("wrong key", 1)]
    assert found(rows, heads, held=[w.note]) == [("wrong key", 1)]
    assert found(rows, heads_of(rows, w.ends, OURS)) == [("wrong key", 1)]


@pytest.mark.parametrize("change", [{"vkey": "x"}, {"vkey": None}, {"previous": "x"}, {"reason": "rotated"}, {"origin": "other"}, {"ssh": "x"},
                                    {"ssh": THEIRS.fact()[1]["ssh"]}, {"vkey": THEIRS.vkey}])
def test_a_key_entry_that_does_not_add_up_is_found(change):
    kind, body = OURS.fact()
    rows = rows_of([(kind, {**body, **change}), *facts_of(random.Random(1), 4)])
    assert ("wrong key", 1) in found(rows, heads_of(rows, range(1, 6)))


def test_a_pinned_key_and_a_held_checkpoint_refuse_a_ledger_stripped_of_all_signatures():
    rows = rows_of(facts_of(random.Random(1), 6))
    assert found(rows, []) != []      # Nodes without heads: somebody took the heads away, or never sealed it
    assert [f.damage for f in check_ledger(rows, [], []).findings] == []
    assert [f.damage for f in check_ledger(rows, [], [], trusted=[OURS.vkey]).findings] == ["wrong key"]
    assert [f.damage for f in check_ledger(rows, [], [], held=[OURS.head(leaves_of(rows))]).findings] == ["wrong key"]


def test_with_very_many_heads_the_rest_are_checked_as_soon_as_something_is_wrong(monkeypatch):
    monkeypatch.setattr(auditor, "MANY", 10)
    w = World(7)
    ends = range(1, len(w.rows) + 1)
    heads, nodes = heads_of(w.rows, ends), nodes_of(w.rows)
    ledger = check_ledger(w.rows, nodes, heads)
    assert ledger.findings == [] and ledger.checked["signatures"] == 2 < ledger.checked["heads"]
    rotten = [*heads[:4], (5, OURS.head(leaves_of(w.rows[:5]), lambda text: bytes(64))), *heads[5:]]
    assert check_ledger(w.rows, nodes, rotten).findings == []  # The tree is vouched for all the same
    assert [(f.damage, f.seq) for f in check_ledger(w.rows, nodes, rotten, every=True).findings] == [("bad signature", 5)]
    forged = hashed([*w.rows[:4], w.changed(5), *w.rows[5:]])
    unsigned = heads[:4] + [(size, OURS.head(leaves_of(forged[:size]), lambda text: bytes(64))) for size in ends[4:]]
    assert [(f.damage, f.seq) for f in check_ledger(forged, nodes_of(forged), unsigned).findings] == [("rewritten", 5)]


# --- Files ---

@pytest.fixture
def format1(tmp_path):
    return shutil.copytree(FORMAT1, tmp_path/"store")


def test_a_ledger_of_the_first_format_is_sound_and_unsigned(format1, tmp_path):
    told = audit(format1)
    assert (told["verdict"], told["entries"], told["findings"], told["signed_by"]) == ("INSUFFICIENT", 19, [], [])
    assert told["checked"]["files"] == sum(p.is_file() for p in format1.rglob("*")) - 1
    assert alone(tmp_path, format1) == (4, told)


def test_a_changed_character_in_a_ledger_of_the_first_format_is_found(format1):
    rng = random.Random(0)
    for seq in range(1, 20):
        shutil.copy(FORMAT1/"ledger.db", format1)
        with closing(sqlite3.connect(format1/"ledger.db")) as c, c:
            c.execute("DROP TRIGGER entries_keep_UPDATE")
            field = rng.choice(["kind", "key", "at", "body", "leaf"])
            text = c.execute(f"SELECT {field} FROM entries WHERE seq=?", (seq,)).fetchone()[0]
            place = rng.randrange(len(text))
            c.execute(f"UPDATE entries SET {field}=? WHERE seq=?", (text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1:], seq))
        told = audit(format1)
        assert told["verdict"] == "FAIL" and told["first_bad"]["seq"] == seq and told["first_bad"]["damage"] in ("edited", "malformed")


def test_a_ledger_of_the_first_format_can_be_adopted(format1):
    with closing(sqlite3.connect(format1/"ledger.db")) as c: old = c.execute("SELECT * FROM entries ORDER BY seq").fetchall()
    kind, body = OURS.fact()
    rows = hashed([*old, (20, kind, "ledger.key:1", AT, rfc8785.dumps(body).decode(), ""), (21, "run.ended", "more", AT, "{}", "")])
    assert rows[:19] == old
    write(format1/"ledger.db", rows, nodes_of(rows), heads_of(rows, [20, 21]))
    assert audit(format1, trusted=[OURS.vkey])["verdict"] == "PASS"
    rows[6] = (*rows[6][:3], "2013", *rows[6][4:])
    rows = hashed(rows)
    write(format1/"ledger.db", rows, nodes_of(rows), heads_of(rows, [20, 21], THEIRS))
    assert audit(format1)["first_bad"]["damage"] == "wrong key"


def test_a_flipped_bit_of_any_kept_file_is_found(format1):
    rng = random.Random(0)
    files = sorted(p for p in format1.rglob("*") if p.is_file() and p.name != "ledger.db")
    for path in files:
        sound = path.read_bytes()
        for place in [0, len(sound) - 1, *rng.sample(range(len(sound)), 3)]:
            data = bytearray(sound)
            data[place] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            told = audit(format1)
            assert told["verdict"] == "FAIL" and told["first_bad"]["damage"] == "changed file" and path.stem in told["first_bad"]["what"]
        path.write_bytes(sound)
    assert audit(format1)["findings"] == []


def test_a_missing_swapped_or_replaced_file_is_found_with_the_entry_that_names_it(format1):
    files = sorted(p for p in format1.rglob("*") if p.is_file() and p.name != "ledger.db")
    with closing(sqlite3.connect(format1/"ledger.db")) as c: bodies = dict(c.execute("SELECT seq, body FROM entries"))
    for path in files:
        path.rename(path.with_suffix(".away"))
        bad = audit(format1)["first_bad"]
        assert bad["damage"] == "missing file" and path.stem in bad["what"]
        if path.suffix != ".parquet": assert path.stem in bodies[bad["seq"]] and not any(path.stem in bodies[s] for s in range(1, bad["seq"]))
        path.mkdir()
        assert audit(format1)["first_bad"]["damage"] == "changed file"
        path.rmdir()
        path.with_suffix(".away").rename(path)
    one, two = (p.read_bytes() for p in files[:2])
    files[0].write_bytes(two)
    files[1].write_bytes(one)
    assert [f["damage"] for f in audit(format1)["findings"]] == ["changed file"]*2


def test_a_manifest_that_says_nothing_or_points_elsewhere_is_a_finding(tmp_path):
    for data in (b"[]", b"{}", b"\xff", b'{"parts":[{"sha256":"../../../etc/passwd"}]}', b'{"parts":[{"sha256":7}]}', b"["*100_000):
        digest = hashlib.sha256(data).hexdigest()
        (tmp_path/"snapshots"/"manifests").mkdir(parents=True, exist_ok=True)
        (tmp_path/"snapshots"/"manifests"/f"{digest}.json").write_bytes(data)
        rows = rows_of([OURS.fact(), ("snapshot.frozen", {"snapshot": digest})])
        write(tmp_path/"ledger.db", rows, nodes_of(rows), heads_of(rows, [2]))
        assert [(f["damage"], f["seq"]) for f in audit(tmp_path)["findings"]] == [("malformed", 2)]


def test_a_pipe_or_a_device_in_the_place_of_a_file_is_named_and_not_waited_for(tmp_path):
    model, provenance = "a"*64, "b"*64
    rows = rows_of([OURS.fact(), ("run.ended", {"model": model, "provenance": provenance})])
    write(tmp_path/"ledger.db", rows, nodes_of(rows), heads_of(rows, [2]))
    (tmp_path/"artifacts").mkdir()
    os.mkfifo(tmp_path/"artifacts"/model)
    (tmp_path/"artifacts"/provenance).symlink_to("/dev/zero")
    done = subprocess.run([sys.executable, ALONE, tmp_path, "--json"], capture_output=True, text=True, timeout=20)
    found = json.loads(done.stdout)["findings"]
    assert [f["damage"] for f in found] == ["changed file"]*2 and all("no plain file" in f["what"] for f in found)


NAMES = st.sampled_from(["model", "previous", "snapshot", "run", "x"])
DIGESTS = st.sampled_from(["a"*64, "b"*64, "A"*64, "c"*63, ""])
BODIES = st.dictionaries(NAMES, st.recursive(DIGESTS | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=12))


@given(BODIES)
def test_the_auditor_finds_the_files_that_the_house_finds(body):
    assert {(digest, name) for name, digest in auditor.named_in(body)} == set(names(body))


# --- What our own writer makes ---

def test_notes_and_envelopes_of_the_house_pass_and_any_changed_byte_of_a_provenance_is_found(tmp_path):
    model = hashlib.sha256(b"a model").hexdigest()
    statement = {"_type": auditor.STATEMENT, "predicateType": auditor.SLSA, "predicate": {}, "subject": [{"name": "model", "digest": {"sha256": model}}]}

    def keep(data):
        path = tmp_path/"artifacts"/hashlib.sha256(data).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path.name

    def told(data):
        rows = rows_of([OURS.fact(), ("run.ended", {"model": keep(b"a model"), "provenance": keep(data)})])
        heads = [(size, notes.sign_note(f"{ORIGIN}\n{size}\n{b64(mth(leaves_of(rows[:size])))}\n", ORIGIN, OURS.public, OURS.private.sign)) for size in (1, 2)]
        write(tmp_path/"ledger.db", rows, nodes_of(rows), heads)
        return [(f["damage"], f["seq"]) for f in audit(tmp_path, trusted=[notes.vkey(ORIGIN, OURS.public)])["findings"]]

    payload = rfc8785.dumps(statement)
    envelope = notes.sign_envelope(payload, auditor.INTOTO, OURS.public, OURS.private.sign)
    assert told(rfc8785.dumps(envelope)) == []
    for wrong in ({**envelope, "payload": b64(payload.replace(b"model", b"madel"))}, {**envelope, "payloadType": "text/plain"},
                  {**envelope, "signatures": []}, {**envelope, "signatures": [{"sig": 7}]}, [envelope], "x", {**envelope, "payload": None},
                  notes.sign_envelope(payload, auditor.INTOTO, OURS.public, THEIRS.private.sign),
                  notes.sign_envelope(payload.replace(model.encode(), b"0a"*32), auditor.INTOTO, OURS.public, OURS.private.sign),
                  notes.sign_envelope(rfc8785.dumps({**statement, "subject": [{"digest": {"sha256": []}}]}), auditor.INTOTO, OURS.public, OURS.private.sign)):
        assert told(rfc8785.dumps(wrong)) == [("bad provenance", 2)], wrong


def test_a_checkpoint_is_found_in_whatever_people_keep():
    note = World(0).note
    tag = "object 1f2e\ntype commit\ntag v1\ntagger A <a@b.example> 1\n\n    Checkpoint of tonight:\n\n" + "".join(f"    {line}\n" for line in note.splitlines())
    for text in (note, tag, note.replace("\n", "\r\n"), f"<p>&lt;b&gt;</p><pre>{html.escape(note)}</pre>", f"<pre>{note.replace('—', '&#8212;')}</pre>"):
        assert auditor.find_checkpoints(text) == [note]
    assert auditor.find_checkpoints("x"*2_000_000 + "\n" + note) == [note] # In no time, however long the line
    for text in (note.replace("—", "-"), note[:40], note.replace("=\n\n", "\n\n"), ""):
        with pytest.raises(AuditError, match="no signed checkpoint"): check_ledger([], [], [], held=[text])
    for text in (note[:-6] + "\n", note + note[:-6] + "\n"): # Cut short in the signature, alone or beside a whole one
        assert auditor.find_checkpoints(text)
        with pytest.raises(AuditError, match="damaged one"): check_ledger([], [], [], held=[text])
    for vkey in ("abc", "abc+12345678+!!!", "", "a+b+c+d"):
        with pytest.raises(AuditError, match="is no Ed25519 verifier key. Give it whole"): check_ledger([], [], [], trusted=[vkey])


# --- A file that somebody else writes to, or wrote to ---

CUT_OFF = """
import os, sqlite3, sys
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.execute(f"PRAGMA journal_mode={sys.argv[2]}")
c.execute("PRAGMA cache_size=1")
c.execute("PRAGMA synchronous=OFF")
if sys.argv[2] == "wal":
    c.execute("UPDATE heads SET note='x' || note")
    c.execute("UPDATE heads SET note=substr(note, 2)")
else:
    c.execute("BEGIN IMMEDIATE")
    c.execute("UPDATE entries SET at='2000' || at")
    c.execute("CREATE TABLE filler AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<3000) SELECT i, hex(randomblob(200)) FROM n")
os._exit(0)
"""


@pytest.mark.parametrize("mode, beside", [("delete", "-journal"), ("wal", "-wal")])
def test_a_copy_taken_in_the_middle_of_a_write_is_read_as_it_was_and_stays_as_it_is(tmp_path, mode, beside):
    w = World(4)
    write(tmp_path/"ledger.db", w.rows, nodes_of(w.rows), w.heads)
    subprocess.run([sys.executable, "-c", CUT_OFF, tmp_path/"ledger.db", mode], check=True)
    assert (tmp_path/f"ledger.db{beside}").stat().st_size > 0
    if mode == "delete": assert b"2000201" in (tmp_path/"ledger.db").read_bytes() # The unfinished write has reached the file
    before = {name: (tmp_path/name).read_bytes() for name in ("ledger.db", f"ledger.db{beside}")}
    assert audit(tmp_path, [w.note])["verdict"] == "PASS"
    assert {name: (tmp_path/name).read_bytes() for name in before} == before


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_an_audit_leaves_nothing_beside_a_database_at_rest(mode, tmp_path):
    w = World(4)
    write(tmp_path/"ledger.db", w.rows, nodes_of(w.rows), w.heads)
    with closing(sqlite3.connect(tmp_path/"ledger.db")) as c: c.execute(f"PRAGMA journal_mode={mode}")
    before = (tmp_path/"ledger.db").read_bytes()
    assert audit(tmp_path, [w.note])["verdict"] == "PASS"
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.db"] and (tmp_path/"ledger.db").read_bytes() == before # No -shm of the auditor's, which the owner may not write


def test_a_database_that_changes_while_it_is_copied_is_not_judged(tmp_path, monkeypatch):
    w = World(4)
    write(tmp_path/"ledger.db", w.rows, nodes_of(w.rows), w.heads)
    with closing(sqlite3.connect(tmp_path/"ledger.db")) as c: c.execute("PRAGMA journal_mode=wal")
    copy = shutil.copyfile

    def meanwhile(here, there):
        with closing(sqlite3.connect(tmp_path/"ledger.db")) as c: c.execute(f"CREATE TABLE more_{here.suffix[1:]} (x)")
        return copy(here, there)
    monkeypatch.setattr(shutil, "copyfile", meanwhile)
    with pytest.raises(AuditError, match="being written to"): audit(tmp_path, [w.note])


READ_ONLY = """
import os, sys
sys.path.insert(0, sys.argv[2])
import cryptography.hazmat.primitives.asymmetric.ed25519
import auditor
"".encode("utf-16-be")                                     # What is imported late is imported now, by whoever may
if os.geteuid() == 0: os.setuid(65534)
print(auditor.audit(sys.argv[1])["verdict"])
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_who_may_only_read_can_audit(mode, tmp_path):
    import tempfile
    with tempfile.TemporaryDirectory() as name:            # Not `tmp_path`, which others may not even enter
        folder, w = Path(name), World(4)
        write(folder/"ledger.db", w.rows, nodes_of(w.rows), w.heads)
        with closing(sqlite3.connect(folder/"ledger.db")) as c: c.execute(f"PRAGMA journal_mode={mode}")
        (folder/"code").mkdir()
        shutil.copy(ALONE, folder/"code"/"auditor.py")
        (folder/"ledger.db").chmod(0o444)
        folder.chmod(0o555)
        done = subprocess.run([sys.executable, "-c", READ_ONLY, folder, folder/"code"], capture_output=True, text=True)
        assert done.stdout == "PASS\n", done.stderr
        assert sorted(p.name for p in folder.iterdir()) == ["code", "ledger.db"]
        folder.chmod(0o755)


# --- Heads and keys taken away ---

def stripped(rows): return hashed([row for row in rows if row[1] != "ledger.key"])


LATER = [("report.published", {"run": "r", "report": "0"*64}), ("signals.sealed", {"segments": []}), ("signals.taken", {"rows": 1}), ("store.cleaned", {"files": 1}),
         ("run.planned", {"run": "r", "source_code": []}), ("run.planned", {"run": "r", "locks": {}}), ("run.planned", {"run": "r", "diff": ""}), ("run.ended", {"run": "r", "provenance": ""})]


@pytest.mark.parametrize("fact", LATER)
@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_ledger_without_heads_and_keys_that_holds_a_later_entry_was_stripped(tmp_path, fact, at):
    rows = rows_of([OURS.fact(), *facts_of(random.Random(at), 8)])
    rows = hashed([*rows[:at], (0, fact[0], "later", AT, rfc8785.dumps(fact[1]).decode(), ""), *rows[at:]])
    assert [f.damage for f in check_ledger(rows, nodes_of(rows), heads_of(rows, [1, 10])).findings] == []
    write(tmp_path/"ledger.db", stripped(rows), [], [])
    told = audit(tmp_path)
    assert told["verdict"] == "FAIL" and [(f["damage"], f["seq"]) for f in told["findings"] if "file" not in f["damage"]] == [("stripped", at)]
    assert alone(tmp_path, tmp_path) == (6, told)
    adopted = hashed([*stripped(rows), (0, *THEIRS.fact()[:1], "k", AT, rfc8785.dumps(THEIRS.fact()[1]).decode(), "")]) # And signed anew
    assert ("stripped", at) in [(f.damage, f.seq) for f in check_ledger(adopted, nodes_of(adopted), heads_of(adopted, [10], THEIRS)).findings]


def test_a_real_ledger_of_today_that_was_stripped_fails_and_one_of_the_first_format_says_what_is_missing(first_night, format1, tmp_path):
    with closing(sqlite3.connect(first_night/".retrain"/"ledger.db")) as c: rows = c.execute("SELECT seq, kind, key, at, body, leaf FROM entries ORDER BY seq").fetchall()
    copy = Path(shutil.copytree(first_night/".retrain", tmp_path/"copy"))
    write(copy/"ledger.db", stripped(rows), [], [])
    told = audit(copy)
    assert told["verdict"] == "FAIL" and "stripped" in {f["damage"] for f in told["findings"]}
    told = audit(format1)
    assert told["verdict"] == "INSUFFICIENT" and "there is no head, and no entry names a key" in told["cause"] and "--checkpoint" in told["cure"]
    said = auditor.told_to_people(told)
    assert told["cause"] in said and told["cure"] in said
    assert "cause" not in audit(first_night) and audit(first_night)["verdict"] == "PASS"
