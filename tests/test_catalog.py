"The catalog is a view: made again from the ledger it is the same, whatever happened"
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transactions import undone

from retrain_nb.mentions import mentions
from retrain_nb.records import DataError, UsageError
from retrain_nb.stores import catalog, database, ledger


def open_all(address="sqlite://"):
    engine = database.open_database(address)
    catalog.create(engine, ledger.entries)
    return engine


@pytest.fixture
def opened(database_url):
    engine = open_all(database_url)
    yield engine
    engine.dispose()


def write(connection, kind, key, body, at="2013-06-01T00:00:00Z"):
    entry = ledger.append(connection, kind, key, body, at)
    catalog.project(connection, entry.seq, entry.kind, entry.at, entry.body)
    return entry


def hexes(rng, n=64): return "".join(rng.choice("0123456789abcdef") for _ in range(n))


def history(seed, length):
    "A random valid life of a workbench: (kind, key, body, at), where clocks jump by days"
    rng, snapshots, models, serving = random.Random(seed), [], [], ""
    facts = [("workbench.created", "created", {"name": "w", "root_hint": "/w", "settings": hexes(rng), "by": "ana"})]
    for turn in range(length):
        day = f"2013-06-{1 + turn % 28:02d}T00:00:00Z"
        if not snapshots or rng.random() < .7: snapshots.append(hexes(rng))
        name = rng.choice(snapshots)
        facts.append(("snapshot.frozen", f"snapshot:{name}:{turn}", {
                      "snapshot": name, "as_of": day, "rows": rng.randrange(10**6), "start": day, "end": day,
                      "parts": [{"period": "2013-06", "rows": 3}], "source": {"adapter": "a:b", "code": hexes(rng)}}))
        run = hexes(rng, 12)
        facts.append(("run.planned", f"planned:{run}", {
                      "run": run, "page": "retrain", "recipe": "", "parameters": {"seed": turn, "share": .5}, "as_of": day, "cycle": day}))
        for attempt in range(1, rng.randrange(1, 4)):
            facts.append(("run.started", f"started:{run}:{attempt}", {
                          "run": run, "attempt": attempt, "pid": rng.randrange(9999), "host": "h", "lease_until": day}))
            if rng.random() < .15: continue                # Killed with its runner: nobody wrote its end
            state = rng.choice(["ok", "ok", "ok", "failed", "killed", "lost"])
            model = rng.choice([hexes(rng), *models[-1:]]) if state == "ok" else ""
            body = {"run": run, "state": state, "cause": "" if state == "ok" else "x", "cell": None if state == "ok" else 4,
                    "seconds": rng.random()*90, "cpu_seconds": rng.random()*90, "peak_mb": float(rng.randrange(900)),
                    "outcome": rng.choice(["PASS", "FAIL", "INSUFFICIENT", None]), "verdict": {"name": "gates", "parts": [{"value": .1}]},
                    "model": model, "metrics": {"auc": rng.random(), "whole": 1.0, "huge": 1e17},
                    "notebook": hexes(rng), "record": hexes(rng), "report": "reports/x.html"}
            facts.append(("run.ended", f"ended:{run}:{attempt}", body))
            if not model: continue
            models.append(model)
            if rng.random() < .5:
                facts.append(("champion.set", f"champion:{run}:{attempt}", {
                              "model": model, "run": run, "snapshot": name, "as_of": day, "previous": serving,
                              "decision": "refresh" if serving else "bootstrap",
                              "verdict": {"outcome": "PASS"}, "by": "cycle", "reason": "passed"}))
                serving = model
            else:
                facts.append(("champion.kept", f"kept:{run}:{attempt}", {
                              "model": serving, "run": run, "as_of": day, "verdict": None, "reason": "auc fell"}))
        facts.append(("report.rendered", f"report:{run}", {"anything": [1, 2.0, None]}))
        facts.append(("cycle.ended", f"cycle:{turn}:{day}", {
                      "cycle": day, "as_of": day, "outcome": "PASS", "verdict": {}, "run": run,
                      "champion": serving, "did": ["froze", "trained"]}))
    return [(*f, f"2013-06-{rng.randrange(1, 29):02d}T00:00:00Z") for f in facts]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 8), st.integers(0, 10**6))
def test_made_again_from_the_ledger_every_row_is_the_same(opened, seed, length, again):
    facts, rng = history(seed, length), random.Random(again)
    with undone(opened) as c:
        for fact in facts: write(c, *fact)
        before, told = catalog.dump(c), ledger.entries(c)
        for fact in rng.sample(facts, len(facts)): write(c, *fact)           # Delivered again, in any order
        assert catalog.dump(c) == before
        catalog.rebuild(c, iter(told))
        assert catalog.dump(c) == before
        text = [[tuple(r) for r in c.execute(sa.text(f"SELECT * FROM {t} ORDER BY 1"))] for t in catalog.metadata.tables]
        catalog.rebuild(c, rng.sample(told, len(told)))                      # And from entries in any order: their numbers count
        assert [[tuple(r) for r in c.execute(sa.text(f"SELECT * FROM {t} ORDER BY 1"))] for t in catalog.metadata.tables] == text


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_the_questions_agree_with_the_ledger(opened, seed):
    with undone(opened) as c:
        for fact in history(seed, 6): write(c, *fact)
        told = ledger.entries(c)
        crowned = [e for e in told if e.kind == "champion.set"]
        newest = catalog.champion(c)
        assert (newest is None) == (not crowned)
        if newest: assert newest["model"] == crowned[-1].body["model"] and newest["seq"] == crowned[-1].seq
        assert [r["model"] for r in catalog.champions(c)] == [e.body["model"] for e in crowned]
        state = {}
        for e in told:
            if not e.kind.startswith("run."): continue
            state[e.body["run"]] = {"run.planned": "planned", "run.started": "running"}.get(e.kind) or e.body["state"]
        assert {r["run"]: r["state"] for r in catalog.runs(c, limit=100)} == state
        assert {r["run"] for r in catalog.unended(c)} == {r for r, s in state.items() if s in ("planned", "running")}
        assert all(r["cause"] is None and r["ended_at"] is None and r["outcome"] is None for r in catalog.unended(c))
        assert catalog.last_cycle(c)["last"] == max(e.seq for e in told if e.kind == "cycle.ended")
        for name in state:
            assert catalog.find(c, name)["kind"] == "run" and catalog.run(c, name)["run"] == name


def test_entry_and_rows_are_there_together_or_not_at_all(database_url):
    engine = open_all(database_url)
    with pytest.raises(DataError, match="does not say its 'model'"), engine.begin() as c:
        write(c, "champion.set", "champion:1", {"run": "r", "decision": "bootstrap"})
    with database.reading(engine) as c: assert ledger.entries(c) == [] and catalog.champions(c) == []
    with pytest.raises(ZeroDivisionError), engine.begin() as c:
        write(c, "champion.set", "champion:1", {"model": "m", "run": "r", "decision": "bootstrap"})
        1/0  # noqa: B018
    with database.reading(engine) as c: assert ledger.entries(c) == [] and catalog.champion(c) is None


def test_a_failed_rebuild_leaves_the_old_tables(database_url):
    engine = open_all(database_url)
    with engine.begin() as c:
        for fact in history(3, 3): write(c, *fact)
        before, told = catalog.dump(c), ledger.entries(c)
    with pytest.raises(ZeroDivisionError), engine.begin() as c:
        catalog.rebuild(c, told[:4])
        1/0  # noqa: B018
    with database.reading(engine) as c: assert catalog.dump(c) == before


def test_opening_twice_makes_the_tables_once(database_url):
    for _ in range(2): engine = open_all(database_url)
    assert set(sa.inspect(engine).get_table_names()) >= {"entries", "runs", "models", "snapshots", "champions", "cycles"}


def test_a_name_is_found_by_its_beginning_and_never_guessed(database_url):
    engine = open_all(database_url)
    with engine.begin() as c:
        for i, name in enumerate(["abc1", "abc2", "abcd%", "Abc9"]): write(c, "run.planned", f"p{i}", {"run": name, "page": "retrain"})
        write(c, "snapshot.frozen", "s", {"snapshot": "abc1ffff", "rows": 3})
        assert catalog.find(c, "abc2")["run"] == "abc2"
        assert catalog.find(c, "abc1")["kind"] == "run"                      # A whole name wins over the beginning of another
        assert catalog.find(c, "abc1f")["kind"] == "snapshot"
        assert catalog.snapshot(c, "abc")["rows"] == 3
        assert catalog.find(c, "A")["run"] == "Abc9"                         # Capitals count, whatever LIKE says
        with pytest.raises(UsageError, match="may mean run abcd%, run abc2, run abc1, snapshot abc1ffff"): catalog.find(c, "abc")
        with pytest.raises(UsageError, match="Did you mean .*run abc"): catalog.find(c, "abx1")
        for none in ("%", "_bc1", "' OR 1=1 --"):
            with pytest.raises(UsageError, match="no record is called"): catalog.find(c, none)
        with pytest.raises(UsageError, match="no name"): catalog.find(c, "")
        with pytest.raises(UsageError, match="no model is called"): catalog.model(c, "abc")


def test_an_empty_catalog_answers_with_nothing(database_url):
    with open_all(database_url).connect() as c:
        assert (catalog.champion(c), catalog.last_cycle(c), catalog.run(c, "x"), catalog.cycle(c, "x")) == (None,)*4
        assert catalog.runs(c) == catalog.unended(c) == catalog.champions(c) == []
        with pytest.raises(UsageError, match="retrain-nb status"): catalog.find(c, "x")


def test_tables_of_another_shape_are_made_again_from_the_ledger(database_url):
    engine = open_all(database_url)
    with engine.begin() as c:
        for fact in history(5, 4): write(c, *fact)
        before = catalog.dump(c)
    with engine.begin() as c:                              # As an older version would have left them: a column less, one of another kind
        c.exec_driver_sql("DROP TABLE runs")
        c.exec_driver_sql("CREATE TABLE runs (run TEXT PRIMARY KEY, seq BIGINT, last BIGINT, attempt TEXT)")
        c.exec_driver_sql("UPDATE catalog_shape SET digest='older'")
    assert catalog.create(engine, ledger.entries) is True
    assert catalog.create(engine, ledger.entries) is False
    with database.reading(engine) as c: assert catalog.dump(c) == before
    engine.dispose()


@pytest.mark.parametrize("index", sorted(str(i.name) for t in catalog.metadata.sorted_tables for i in t.indexes)) # Indexes of a table are a set
def test_a_lost_index_is_found_and_made_again(opened, index):
    from retrain_nb.loop.audit import changed_views
    with opened.begin() as c:
        for fact in history(5, 4): write(c, *fact)
    with database.reading(opened) as c: assert changed_views(c) == []
    with opened.begin() as c: c.exec_driver_sql(f"DROP INDEX {index}")
    with database.reading(opened) as c:
        assert [name for _, name in catalog.lost_indexes(c)] == [index]
        assert [what for _, what in changed_views(c) if f"has lost its index `{index}`" in what] == [what for _, what in changed_views(c)] != []
    table, = [t.name for t in catalog.metadata.sorted_tables if index in {i.name for i in t.indexes}]
    with opened.begin() as c: c.exec_driver_sql(f"CREATE INDEX {index} ON {table} (at, seq)" if table != "mentions" else f"CREATE INDEX {index} ON {table} (kind)")
    with database.reading(opened) as c: assert catalog.lost_indexes(c) == [(table, index)]             # Of the same name, and another one
    with opened.begin() as c: catalog.rebuild(c, ledger.entries(c))
    with database.reading(opened) as c: assert catalog.lost_indexes(c) == [] == changed_views(c)


def test_another_index_is_another_shape():
    before, index = catalog.shape(), sa.Index("ix_for_this_test", catalog.RUNS.c.model)
    try: assert catalog.shape() != before
    finally: catalog.RUNS.indexes.remove(index)
    assert catalog.shape() == before


def test_a_new_column_needs_no_migration(database_url, tmp_path):
    "A later version, with one more column: its own copy of the room, in a process of its own"
    engine = open_all(database_url)
    with engine.begin() as c:
        for fact in history(5, 4): write(c, *fact)
        runs = len(catalog.dump(c)["runs"])
    engine.dispose()
    text = Path(catalog.__file__).read_text()
    assert text.count("(sa.Text, \"page recipe as_of") == 1 and text.count("(body, \"page\", \"recipe\"") == 1
    later = text.replace("(sa.Text, \"page recipe as_of", "(sa.Text, \"page page_again recipe as_of")
    later = later.replace("**_pick(body, \"page\", \"recipe\"", "\"page_again\": body.get(\"page\"), **_pick(body, \"page\", \"recipe\"").replace("from ..", "from retrain_nb.")
    (tmp_path/"later.py").write_text(later)
    code = ("import sys; sys.path.insert(0, sys.argv[2]); import later; from retrain_nb.stores import database, ledger\n"
            "engine = database.open_database(sys.argv[1]); print(later.create(engine, ledger.entries))\n"
            "with engine.begin() as c: print(sum(r['page_again'] == r['page'] == 'retrain' for r in later.dump(c)['runs']))")
    done = subprocess.run([sys.executable, "-c", code, database_url, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(runs)] and runs > 0


def plan(connection, query, *values):
    "How SQLite would find it"
    return "; ".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values))


def asked(connection, question, *args):
    "The statements that a question comes down to, with their values"
    said = []
    def listen(_connection, _cursor, statement, parameters, *_): said.append((statement, parameters))
    sa.event.listen(connection, "before_cursor_execute", listen)
    try: question(connection, *args)
    finally: sa.event.remove(connection, "before_cursor_execute", listen)
    return said


@pytest.mark.parametrize("question, args", [(catalog.find, ["abc1"]), (catalog.mentioned, ["abc1"]), (catalog.linked, ["abc1", "run", "run.planned", ["recipe"]]),
                                            (catalog.run, ["abc1"]), (catalog.champion, []), (catalog.cycle, ["abc1"])])
def test_every_question_is_answered_by_an_index(question, args, tmp_path):
    engine = open_all(f"sqlite:///{tmp_path}/ledger.db")
    with engine.begin() as c:
        for fact in history(4, 6): write(c, *fact)
        write(c, "run.planned", "p", {"run": "abc1", "page": "retrain"})
        said = asked(c, question, *args)
        assert said
        for statement, values in said:
            steps = plan(c, statement, *values).split("; ")
            assert all("USING" in step and ("INDEX" in step or "PRIMARY KEY" in step) for step in steps if step.startswith(("SCAN", "SEARCH"))), steps
            assert "WHERE" not in statement or not any(step.startswith("SCAN") for step in steps), steps
        like = plan(c, "SELECT * FROM runs WHERE run LIKE ? ESCAPE '/'", "abc%")
    assert like.startswith("SCAN")                             # What a prefix costs when it is asked for in the usual way
    engine.dispose()


@pytest.mark.parametrize("name", ["Zürich-1", "a%b", "a_b", "~", "\U0010fffe", "é", "e"])
def test_a_prefix_is_a_range_in_both_databases_whatever_the_alphabet(database_url, name):
    engine, others = open_all(database_url), ["a", "ab", "aXb", "Z", "z", "e1", "f", "Ä", "zürich"]
    with engine.begin() as c:
        for i, run in enumerate([name, *others]): write(c, "run.planned", f"p{i}", {"run": run})
        for length in range(1, len(name) + 1):
            meant = [run for run in [name, *others] if run.startswith(name[:length])]
            if len(meant) == 1 or name[:length] in meant: assert catalog.find(c, name[:length])["run"] in meant
            else:
                with pytest.raises(UsageError, match="may mean"): catalog.find(c, name[:length])
    engine.dispose()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_who_mentions_it_agrees_with_the_ledger(seed):
    "Both directions, against the bodies read one by one"
    engine = open_all()
    with engine.begin() as c:
        for fact in history(seed, 5): write(c, *fact)
        told = ledger.entries(c)
        pairs = {(name, role, e.seq) for e in told for name, role in mentions(e.body)}
        for name in {name for name, _, _ in pairs}:
            assert {(name, m["role"], m["seq"]) for m in catalog.mentioned(c, name)} == {p for p in pairs if p[0] == name}
        for e in told:
            if e.kind != "run.ended" or not e.body["model"]: continue
            assert e.body["model"] in [row["name"] for row in catalog.linked(c, e.body["run"], "run", "run.ended", ["model"])]
            assert e.body["run"] in [row["name"] for row in catalog.linked(c, e.body["model"], "model", "run.ended", ["run"], 1000)]
    engine.dispose()


def test_what_is_to_be_told_is_decided_with_the_entry(database_url):
    engine = open_all(database_url)
    with engine.begin() as c:
        for fact in history(7, 4): write(c, *fact)
        told = {e.seq for e in ledger.entries(c) if e.kind in catalog.TOLD["openlineage"]}
        assert told and {row["seq"] for row in catalog.dump(c)["outbox"]} == told
    engine.dispose()


def test_a_kernel_whose_last_words_hold_a_nul_is_recorded_all_the_same(database_url):
    engine = open_all(database_url)
    body = {"run": "r", "state": "failed", "cause": "died: \0\0", "verdict": {"reason": "\0"}, "outcome": "FAIL", "model": "m"}
    with engine.begin() as c:
        assert write(c, "run.ended", "r:ended", body).body == body
        before = catalog.dump(c)
        catalog.rebuild(c, ledger.entries(c))
        assert catalog.dump(c) == before and catalog.run(c, "r")["cause"] == "died: \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UsageError, match="not plain text"), engine.begin() as c: write(c, "run.ended", "a\0b", body) # A key is no place for it
