"Opening a database: new, old, newer, foreign, half-migrated, by many at once; on SQLite and PostgreSQL"
import base64
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from retrain_nb.digest import canonical
from retrain_nb.records import RetrainError, UsageError, VerificationError
from retrain_nb.statements import MARK, LostError, straight
from retrain_nb.stores import database, events, ledger, turns
from retrain_nb.stores.database import SCHEMA, open_database, reading, schema_version

STEPS = Path(database.__file__).parent/"migrations"
AT = "2013-06-01T03:00:00Z"
FORMAT_1 = { # What the package made before there were steps, word for word
    "sqlite": ["CREATE TABLE entries (seq BIGINT NOT NULL, kind VARCHAR(64) NOT NULL, key TEXT NOT NULL, at VARCHAR(40) NOT NULL, "
               "body TEXT NOT NULL, leaf VARCHAR(64) NOT NULL, PRIMARY KEY (seq), UNIQUE (key))",
               *[f"CREATE TRIGGER entries_keep_{what} BEFORE {what} ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
                 for what in ("UPDATE", "DELETE")]],
    "postgresql": ["CREATE TABLE entries (seq BIGINT NOT NULL, kind VARCHAR(64) NOT NULL, key TEXT NOT NULL, at VARCHAR(40) NOT NULL, "
                   "body TEXT NOT NULL, leaf VARCHAR(64) NOT NULL, PRIMARY KEY (seq), UNIQUE (key))",
                   "CREATE FUNCTION entries_keep() RETURNS trigger AS $$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$ LANGUAGE plpgsql",
                   *[f"CREATE TRIGGER entries_keep_{what} BEFORE {what} ON entries FOR EACH STATEMENT EXECUTE FUNCTION entries_keep()"
                     for what in ("UPDATE", "DELETE")]]}


def run(url, *statements):
    engine = sa.create_engine(url)
    with engine.begin() as c:
        for s in statements: c.exec_driver_sql(s)
    engine.dispose()


def format_1(url):
    "A database as the first version left it, with two entries; gives these as plain rows"
    run(url, *FORMAT_1[url.partition(":")[0].partition("+")[0]])
    engine = database._engine(url, 1)
    written = []
    for seq in (1, 2):
        key, body = f"k{seq - 1}", {"i": seq - 1}
        leaf = ledger.entry_leaf(seq, "test.fact", key, AT, canonical(body).decode())
        with engine.begin() as c: c.execute(ledger.table.insert().values(seq=seq, kind="test.fact", key=key, at=AT, body=canonical(body).decode(), leaf=leaf))
        written.append(ledger.Entry(seq=seq, kind="test.fact", key=key, at=AT, body=body, leaf=leaf))
    engine.dispose()
    return written


def look(url): # -> (names of the tables, version)
    engine = sa.create_engine(url)
    with engine.connect() as c: found = set(sa.inspect(c).get_table_names()), schema_version(c)
    engine.dispose()
    return found


def differences(engine, *definitions):
    "What Alembic would have to do to make the database equal to the definitions"
    whole = sa.MetaData()
    for metadata in definitions:
        for table in metadata.tables.values(): table.to_metadata(whole)
    with engine.connect() as c: return compare_metadata(MigrationContext.configure(c, opts={"compare_type": True}), whole)


def test_the_steps_make_what_the_definitions_say(database_url):
    engine = open_database(database_url)
    assert differences(engine, ledger.metadata, turns.metadata, database.metadata, events.metadata) == []
    wrong = sa.MetaData()
    sa.Table("entries", wrong, sa.Column("seq", sa.BigInteger, primary_key=True), sa.Column("kind", sa.Integer, nullable=False))
    assert differences(engine, wrong)                                      # It does find what differs
    engine.dispose()


def test_the_steps_are_one_line_and_the_constant_is_its_end():
    steps = ScriptDirectory(str(STEPS))
    assert [s.revision for s in steps.walk_revisions()] == [f"{n:04}" for n in range(int(SCHEMA), 0, -1)]
    assert steps.get_heads() == [SCHEMA]


def test_what_may_only_grow_refuses_change_and_deletion(database_url):
    engine = open_database(database_url)
    with engine.begin() as c:
        ledger.append(c, "test.fact", "k", {}, AT)
        c.execute(ledger.heads.insert().values(size=1, note="n"))
    changes = ["UPDATE entries SET at='x'", "DELETE FROM entries", "UPDATE heads SET note='x'", "DELETE FROM heads"]
    if engine.dialect.name == "postgresql": changes += ["TRUNCATE entries", "TRUNCATE heads"]
    for change in changes:
        with pytest.raises(RetrainError, match="an entry is never changed"), engine.begin() as c: c.exec_driver_sql(change)
    with reading(engine) as c: assert [e.key for e in ledger.entries(c)] == ["k"] and c.execute(sa.select(ledger.heads.c.note)).scalar() == "n"
    engine.dispose()


def test_a_database_of_the_first_format_is_adopted_with_its_entries(database_url):
    written = format_1(database_url)
    engine = open_database(database_url)
    with engine.begin() as c:
        assert ledger.entries(c) == written and schema_version(c) == SCHEMA
        assert ledger.append(c, "test.fact", "k1", {"i": 1}, AT) == written[1]
        assert ledger.append(c, "test.fact", "k2", {}, AT).seq == 3
        assert [c.execute(sa.select(sa.func.count()).select_from(t)).scalar() for t in (ledger.nodes, ledger.heads)] == [0, 0]
    assert differences(engine, ledger.metadata, turns.metadata, database.metadata, events.metadata) == []
    engine.dispose()


def test_what_was_delivered_before_there_were_reasons_stays_delivered(database_url):
    engine, config = database._engine(database_url, 1), Config()
    config.set_main_option("script_location", str(STEPS))
    with engine.begin() as c:
        config.attributes["connection"] = c
        command.upgrade(config, "0002")
        c.exec_driver_sql(f"INSERT INTO deliveries (seq, channel, at) VALUES (7, 'openlineage', '{AT}')")
        assert [col["name"] for col in sa.inspect(c).get_columns("deliveries")] == ["seq", "channel", "at"]
    engine.dispose()
    engine = open_database(database_url)
    with reading(engine) as c:
        assert schema_version(c) == SCHEMA and c.execute(sa.select(database.deliveries)).all() == [(7, "openlineage", AT, None)]
    assert differences(engine, ledger.metadata, turns.metadata, database.metadata, events.metadata) == []
    engine.dispose()


def test_a_signed_ledger_of_schema_0004_is_carried_over_row_by_row(database_url):
    engine, config = database._engine(database_url, 1), Config()
    config.set_main_option("script_location", str(STEPS))
    with engine.begin() as c:
        config.attributes["connection"] = c
        command.upgrade(config, "0004")
    for i in range(5):
        with engine.begin() as c:
            ledger.append(c, "test.fact", f"k{i}", {"i": i, "text": "a:b %s ?"}, AT)
            ledger.seal(c, lambda size, root: f"toy\n{size}\n{base64.b64encode(root).decode()}\n\nsigned")
    def rows(engine):
        with reading(engine) as c: return [c.execute(sa.select(t).order_by(*t.primary_key)).all() for t in (ledger.table, ledger.nodes, ledger.heads)]
    before = rows(engine)
    engine.dispose()
    engine = open_database(database_url)
    assert rows(engine) == before and [len(t) for t in before] == [5, 3, 5]
    assert differences(engine, ledger.metadata, turns.metadata, database.metadata, events.metadata) == []
    for what in ("UPDATE entries SET body='{}' WHERE seq=3", "DELETE FROM entries", "UPDATE heads SET note=''", "DELETE FROM heads"):
        with pytest.raises(RetrainError, match="append-only"), engine.begin() as c: c.exec_driver_sql(what)
    with engine.begin() as c: assert ledger.append(c, "test.fact", "k9", {}, AT).seq == 6
    engine.dispose()


def test_an_entry_touches_one_tree_for_each_table_and_each_index():
    engine = open_database("sqlite://")
    with reading(engine) as c:
        trees = c.exec_driver_sql("SELECT tbl_name, count(*) FROM sqlite_master WHERE rootpage > 0 GROUP BY 1").all()
    assert {name: n for name, n in trees if name in ledger.metadata.tables} == {"entries": 3, "heads": 1, "nodes": 1} # Rows, the key's, and kind's


def test_what_goes_straight_to_the_driver_is_in_the_transaction_and_fails_in_words(database_url):
    engine = open_database(database_url)
    mark = MARK[engine.dialect.name]
    with engine.connect() as c:
        assert straight(c, "SELECT 1, 'a'") == [(1, "a")] and c.in_transaction()
        straight(c, f"INSERT INTO heads (size, note) VALUES ({mark}, {mark})", (1, "a"), (2, "b"))
        c.rollback()
        assert straight(c, f"SELECT note FROM heads WHERE size={mark}", (1,)) == []
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as c:
        for _ in range(2): straight(c, f"INSERT INTO heads (size, note) VALUES ({mark}, {mark})", (1, "a"))
    with engine.begin() as c: straight(c, f"INSERT INTO heads (size, note) VALUES ({mark}, {mark})", (1, "a"))
    with pytest.raises(RetrainError, match="an entry is never changed .*append-only"), engine.begin() as c:
        straight(c, f"UPDATE heads SET note={mark}", ("b",))
    engine.dispose()


def test_a_line_that_breaks_under_a_straight_statement_is_a_lost_one(database_url):
    if database_url.startswith("sqlite"): pytest.skip("SQLite has no line that could break")
    engine = open_database(database_url)
    with pytest.raises(LostError, match="not written twice"), engine.begin() as c:
        pid = straight(c, "SELECT pg_backend_pid()")[0][0]
        run(database_url, f"SELECT pg_terminate_backend({pid})")
        straight(c, "SELECT 1")
    with engine.begin() as c: assert straight(c, "SELECT 2") == [(2,)] # The pool was told, and has another
    engine.dispose()


def test_steps_that_cannot_be_run_leave_all_as_it_was(database_url):
    format_1(database_url)
    run(database_url, "CREATE TABLE deliveries (mine INTEGER)")            # The last thing that 0002 makes is in the way
    before = look(database_url)
    for _ in range(2):
        with pytest.raises(RetrainError, match="could not be brought from schema none to .*deliveries.*Nothing was changed"): open_database(database_url)
        assert look(database_url) == before == ({"entries", "deliveries"}, None)
    run(database_url, "DROP TABLE deliveries")
    open_database(database_url).dispose()
    assert look(database_url)[1] == SCHEMA


@pytest.mark.parametrize("version", [f"{int(SCHEMA) + 1:04}", "9999"])
def test_a_newer_database_is_refused_and_not_touched(database_url, version):
    engine = open_database(database_url)
    with engine.begin() as c: c.exec_driver_sql(f"UPDATE alembic_version SET version_num='{version}'")
    engine.dispose()
    before = look(database_url)
    with pytest.raises(UsageError, match=f"newer version of retrain_nb .schema {version}.*Upgrade"): open_database(database_url)
    assert look(database_url) == before


@pytest.mark.parametrize("theirs", ["CREATE TABLE alembic_version (version_num VARCHAR(32)); INSERT INTO alembic_version VALUES ('ae1027a6acf')",
                                    "CREATE TABLE entries (id INTEGER)"])
def test_a_database_of_another_program_is_refused_and_not_touched(database_url, theirs):
    run(database_url, *theirs.split(";"))
    before = look(database_url)
    with pytest.raises(UsageError, match="belongs to another program.*of its own"): open_database(database_url)
    assert look(database_url) == before


OPEN = """
import sys
from retrain_nb.stores import ledger
from retrain_nb.stores.database import open_database
who = sys.argv[2]
with open_database(sys.argv[1]).begin() as c: ledger.append(c, "test.fact", who, {}, "")
"""


def test_4_processes_that_open_a_new_database_at_once_make_it_once(database_url):
    ours = [subprocess.Popen([sys.executable, "-c", OPEN, database_url, f"p{i}"], stderr=subprocess.PIPE, text=True) for i in range(4)]
    assert [p.communicate()[1] for p in ours] == [""]*4
    engine = open_database(database_url)
    with reading(engine) as c: assert {e.key for e in ledger.entries(c)} == {f"p{i}" for i in range(4)}
    engine.dispose()


def test_who_opens_a_new_database_waits_for_whoever_is_making_it(database_url):
    other = sa.create_engine(database_url)
    making = "BEGIN IMMEDIATE" if database_url.startswith("sqlite") else "SELECT pg_advisory_xact_lock(hashtext('retrain_nb'))"
    with ThreadPoolExecutor(1) as pool, other.connect() as c:
        c.exec_driver_sql(making)
        opened = pool.submit(open_database, database_url)
        assert not wait([opened], timeout=1).done
        c.rollback()
        opened.result(20).dispose()
    other.dispose()


def test_a_server_that_would_acknowledge_too_early_is_told_otherwise(database_url):
    if database_url.startswith("sqlite"): pytest.skip("SQLite has no such server")
    other = sa.create_engine(database_url, isolation_level="AUTOCOMMIT")
    with other.connect() as c: c.exec_driver_sql(f"ALTER DATABASE {c.exec_driver_sql('SELECT current_database()').scalar()} SET synchronous_commit=off")
    engine = open_database(database_url)
    with reading(engine) as c: assert c.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
    for e in (engine, other): e.dispose()


LOADED = "import sys; from retrain_nb.stores.database import open_database; open_database(sys.argv[1]); print('alembic' in sys.modules)"


def test_alembic_is_loaded_only_when_there_is_something_to_do(database_url):
    said = [subprocess.run([sys.executable, "-c", LOADED, database_url], capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]
    assert said == ["True", "False"]


def test_what_is_no_database_is_named(tmp_path):
    (tmp_path/"ledger.db").write_bytes(b"something else entirely " * 100)
    with pytest.raises(VerificationError, match="damaged or is no database"): open_database(f"sqlite:///{tmp_path}/ledger.db")


@pytest.mark.parametrize(("url", "said"), [
    ("mysql://u:secret@h/d", "neither"), ("sqlite+aiosqlite:///x.db", "neither"), ("u:secret@h", "no database address"), ("mysql://u:secret:2@h/d", "neither"),
    ("mysql://u:my/secret@h/d", "neither"), ("mysql://u:my@secret@h/d", "neither"), ("mysql://h/d?password=secret", "neither"), ("u:secret\n@h", "no database address")])
def test_an_address_that_is_none_of_ours_is_refused_without_its_password(url, said):
    with pytest.raises(UsageError, match=said) as e: open_database(url)
    assert "secret" not in str(e.value)


def test_a_server_that_is_not_there_is_named_in_time():
    began = time.monotonic()
    with pytest.raises(RetrainError, match="cannot be reached.*that the server runs") as e: open_database("postgresql://ana:secret@127.0.0.1:1/flights")
    assert "secret" not in str(e.value) and time.monotonic() - began < 5
