"What served then, and where it came from: against the ledger read entry by entry, on a real workbench and on made-up ones"
import json
import random
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.digest import digest
from retrain_nb.faces.cli import main
from retrain_nb.loop.deliver import deliver
from retrain_nb.loop.history import lineage, live, locate
from retrain_nb.loop.retention import collect
from retrain_nb.records import UsageError
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.stores import ledger
from retrain_nb.windows import iso, parse_time

START = datetime(2024, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    root = tmp_path_factory.mktemp("history")/"toy"
    furnish(root, "toy")
    open_workbench(root).engine.dispose()
    return root


@pytest.fixture
def fresh(empty, tmp_path): return open_workbench(Path(shutil.copytree(empty, tmp_path/"toy")))


def crown(book, n, moment, kind="champion.set"):
    body = {"model": digest(f"model {n}"), "run": f"retrain-{n:03}", "snapshot": digest(f"rows {n}"), "as_of": iso(moment), "previous": "", "decision": "refresh",
            "by": "cron", "verdict": {"name": "gate", "outcome": "PASS" if kind == "champion.set" else "FAIL", "reason": "so", "parts": []}, "reason": f"night {n}"}
    return book.append(kind, f"{kind}:{n}", body, moment)


def told_by_hand(entries, at): # -> (entry that served at `at`, the moment it ended), by walking through the ledger
    serving = None
    for e in entries:
        if e.kind == "champion.set" and parse_time(e.body["as_of"]) <= at: serving = e
    later = [parse_time(e.body["as_of"]) for e in entries if e.kind == "champion.set" and (serving is None or e.seq > serving.seq)]
    return serving, min(later, default=None)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_what_served_agrees_with_the_ledger_whatever_the_moments(seed):
    "Moments in any order, some equal, some with a fraction of a second: the number decides"
    rng, book = random.Random(seed), open_workbench("")
    moments = [START + timedelta(days=rng.randrange(6), microseconds=rng.choice([0, 0, 1, 500_000])) for _ in range(8)]
    for n, moment in enumerate(moments): crown(book, n, moment, rng.choice(["champion.set", "champion.set", "champion.kept"]))
    entries = book.ask(ledger.entries)
    for moment in moments:
        for at in (moment - timedelta(microseconds=1), moment, moment + timedelta(microseconds=1)):
            serving, until = told_by_hand(entries, at)
            found = live(book, at)
            assert found["model"] == (serving.body["model"] if serving else None)
            assert found["until"] == (iso(until) if until else None)
            if not serving: continue
            assert (found["entry"]["seq"], found["entry"]["leaf"], found["since"]) == (serving.seq, serving.leaf, serving.body["as_of"])
            following = min((e.seq for e in entries if e.kind == "champion.set" and e.seq > serving.seq), default=10**9)
            assert [r["entry"] for r in found["refused"]] == [e.seq for e in entries if e.kind == "champion.kept" and serving.seq < e.seq < following]
    book.engine.dispose()


def test_before_the_first_champion_there_is_none_and_the_refused_are_told(fresh):
    assert live(fresh, START)["model"] is None and live(fresh, START)["until"] is None
    crown(fresh, 0, START, "champion.kept")
    found = live(fresh, START)
    assert (found["model"], found["evidence"], found["entry"], found["safeguards"]) == (None, None, None, [])
    assert [r["run"] for r in found["refused"]] == ["retrain-000"]


def test_a_model_that_serves_again_has_two_reigns(fresh):
    for n, day in ((1, 0), (2, 1), (1, 2)):
        fresh.append("champion.set", f"champion:{day}", {"model": digest(f"model {n}"), "run": f"retrain-{n}", "snapshot": "", "as_of": iso(START + timedelta(days=day)), "decision": "refresh"}, START)
    assert [n["id"] for n in lineage(fresh, digest("model 1"))["down"]] == ["entry 2", "entry 4"] # The first entry is the key
    assert live(fresh, START + timedelta(days=1, hours=1))["model"] == digest("model 2")


def test_equal_bytes_from_two_runs_have_two_origins(fresh):
    for n in (1, 2): fresh.append("run.ended", f"e{n}", {"run": f"retrain-{n}", "state": "ok", "model": digest("model")}, START)
    assert [n["id"] for n in lineage(fresh, digest("model"))["up"]] == ["retrain-1", "retrain-2"]


def test_a_recipe_that_cannot_be_read_is_no_reason_to_tell_nothing(fresh):
    fresh.append("run.planned", "p", {"run": "retrain-1", "recipe": digest("gone"), "parameters": {}}, START)
    node = lineage(fresh, "retrain-1")["up"][0]
    assert node["id"] == digest("gone") and "missing" in node["says"]["unreadable"]


def test_a_whole_name_wins_over_the_beginning_of_another(fresh):
    for n, run in enumerate(["retrain-1", "retrain-1-2"]): fresh.append("run.planned", f"p{n}", {"run": run, "parameters": {}}, START)
    assert fresh.ask(locate, "retrain-1") == ("run", "retrain-1")
    with pytest.raises(UsageError, match="may mean run retrain-1, run retrain-1-2"): fresh.ask(locate, "retrain")
    with pytest.raises(UsageError, match="no name was given"): fresh.ask(locate, "")


# --- Through the command line, on a workbench with a real first cycle ---

@pytest.fixture
def parcels(first_night): return first_night


def call(capsys, root, *words):
    capsys.readouterr()
    code = main([*words, "--root", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


def kinds(nodes, way): return {n["kind"] for n in nodes} | {k for n in nodes for k in kinds(n.get(way, []), way)}


def test_from_the_champion_to_its_source_and_back(parcels, capsys):
    code, shown = call(capsys, parcels, "show", "champion")
    assert code == 0 and shown["kind"] == "model" and shown["lineage"]["up"][0]["id"] == shown["run"]
    assert {"run", "snapshot", "source", "recipe", "settings", "cycle"} <= kinds(shown["lineage"]["up"], "up")
    recipe = next(n for n in shown["lineage"]["up"][0]["up"] if n["kind"] == "recipe")["says"]
    assert {"view", "view_code", "contract", "trainer", "code", "environment"} <= set(recipe)
    forward = call(capsys, parcels, "show", "retrain_nb.demo.toy:rows")[1]
    assert forward["kind"] == "source" and {"snapshot", "run", "model", "champion", "notebook", "record"} <= kinds(forward["lineage"]["down"], "down")
    for digest_ in {shown["model"], next(n for n in shown["lineage"]["up"][0]["up"] if n["kind"] == "settings")["id"]}:
        assert call(capsys, parcels, "show", digest_[:16])[0] == 0


def test_live_answers_an_incident(parcels, capsys):
    champion = call(capsys, parcels, "status")[1]["champion"]
    code, then = call(capsys, parcels, "live", "--at", "2024-03-05")
    assert code == 0 and {k: then[k] for k in ("model", "run", "snapshot", "since")} == {k: champion[k] for k in ("model", "run", "snapshot", "since")}
    assert {"log_loss", "freshness", "unspoiled"} <= {s["name"] for s in then["safeguards"]}
    assert all(s["outcome"] in ("PASS", "FAIL", "INSUFFICIENT") and s["reason"] for s in then["safeguards"])
    assert then["evidence"]["source"]["adapter"] == "retrain_nb.demo.toy:rows" and then["by"] and then["reason"]
    assert call(capsys, parcels, "live", "--at", "2024-02-01")[1]["model"] is None
    code, wrong = call(capsys, parcels, "live", "--at", "yesterday")
    assert code == 2 and "2013-06-01" in wrong["cure"]


def test_the_tree_for_people_is_aligned(parcels, capsys):
    capsys.readouterr()
    assert main(["show", "champion", "--root", str(parcels)]) == 0
    lines = capsys.readouterr().out.splitlines()
    tree = [line for line in lines[lines.index("came from"):] if "  entry " in line]
    assert len(tree) >= 6 and len({line.index("  entry ") for line in tree if not line.lstrip().startswith("champion entry")}) == 1


def test_history_cleaning_and_telling_ask_the_same_of_both_databases(empty, tmp_path, database_url):
    root = Path(shutil.copytree(empty, tmp_path/"toy"))
    text = (root/"settings.ini").read_text()
    (root/"settings.ini").write_text(text.replace("[workbench]\n", f"[workbench]\ndatabase = {database_url}\n"))
    book = open_workbench(root)
    kept, loose = (book.artifacts.put(f'{{"n":{n}}}'.encode(), "recipe") for n in (1, 2))
    for n in range(3):
        at = START + timedelta(days=n, microseconds=n)
        book.append("snapshot.frozen", f"s{n}", {"snapshot": digest(f"rows {n}"), "as_of": iso(at), "rows": 3, "columns": ["x"], "kinds": ["text"], "parts": [], "source": {"adapter": "a.b:rows"}}, at)
        book.append("run.planned", f"p{n}", {"run": f"retrain-{n:03}", "page": "retrain", "recipe": kept, "parameters": {"snapshot": digest(f"rows {n}")}}, at)
        book.append("run.started", f"b{n}", {"run": f"retrain-{n:03}"}, at)
        crown(book, n, at, "champion.kept" if n == 2 else "champion.set")
    served = live(book, START + timedelta(days=1, hours=1))
    assert (served["model"], served["since"], served["until"]) == (digest("model 1"), "2024-03-02T00:00:00.000001Z", None)
    assert [r["run"] for r in served["refused"]] == ["retrain-002"] and live(book, START)["until"] == "2024-03-02T00:00:00.000001Z"
    assert [n["id"] for n in lineage(book, "a.b")["down"]] == [digest(f"rows {n}") for n in range(3)]
    first, second = deliver(book), deliver(book)
    assert (first["sent"], first["waiting"], first["why"]) == (6, 0, "") and second["sent"] == 0
    assert [h.path.rpartition("/")[2] for h in collect(book, delete=True, now=datetime.now(UTC) + timedelta(days=2))["free"]] == [loose]
    book.engine.dispose()
