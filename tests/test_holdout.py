"The budget of a holdout as it is wired: asked of a ledger, paid by runs and cycles, and counted from entries alone"
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from bench.gates import BETTER, CHALLENGERS, EQUAL, WORSE, models, superior
from retrain_nb.faces.cli import main
from retrain_nb.loop.holdout import made, standing, uses
from retrain_nb.records import FAIL, INSUFFICIENT, PASS
from retrain_nb.services.workbench import open_workbench
from retrain_nb.settings import parse_settings
from retrain_nb.stages.budget import Holdout, level
from retrain_nb.stores import ledger

MARCH = "2024-03-01"


def call(capsys, root, *words):
    "Exit code and JSON of one command"
    capsys.readouterr()
    code = main([*words, "--root", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


def bodies(root, kind): return [e.body for e in open_workbench(root).ask(ledger.entries, kind=kind)]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    "A toy workbench in which no first model is good enough, asked three times about the same test rows; what the commands ended with"
    root = tmp_path_factory.mktemp("holdout")/"parcels"
    assert main(["init", str(root), "--demo", "toy"]) == 0
    text = (root/"settings.ini").read_text().replace("mode = offline", "mode = disabled").replace("[gates]", "[gates]\nmin_gain = 0.5")
    (root/"settings.ini").write_text(text + "\n[run]\nprofile_rows = 0\n[holdout]\nrule = lond\n")
    codes = [main(["run", "retrain", "-p", "seed", seed, "--now", MARCH, "--root", str(root)]) for seed in ("0", "1")]
    return root, codes


def test_each_decision_on_the_same_rows_has_a_smaller_level_and_says_so(refused, capsys):
    root, codes = refused
    told = [p["holdout"] for p in bodies(root, "run.planned")]
    assert codes == [3, 3] and [t["number"] for t in told] == [1, 2] and told[0]["alpha"] > told[1]["alpha"] > 0
    assert {(t["start"], t["end"]) for t in told} == {("2024-02-16T00:00:00Z", f"{MARCH}T00:00:00Z")}
    book = open_workbench(root)
    for planned, ended in zip(bodies(root, "run.planned"), bodies(root, "run.ended")):
        recipe, record = (json.loads(book.artifacts.get(d)) for d in (planned["recipe"], ended["record"]))
        assert recipe["alpha"] == planned["holdout"]["alpha"] == planned["parameters"]["alpha"] and ended["looked"]
        assert {e["level"] for e in record["evaluation"]["difference"].values()} == {1 - 2*recipe["alpha"]}
    now = call(capsys, root, "status")[1]["holdout"]
    assert (now["decisions"], now["renewed"], now["refreshes"]) == (2, "2024-03-15T00:00:00Z", 0) and now["spent"] == pytest.approx(sum(t["alpha"] for t in told))


def test_the_same_run_again_and_the_same_run_reproduced_are_the_same_decision(refused, tmp_path, capsys):
    root = shutil.copytree(refused[0], tmp_path/"parcels")
    before = standing(open_workbench(root))
    code, again = call(capsys, root, "run", "retrain", "-p", "seed", "0", "--now", MARCH)
    assert (code, again["new"]) == (3, False) and standing(open_workbench(root)) == before
    assert call(capsys, root, "reproduce", "last")[1]["verdict"] == "REPRODUCED" and standing(open_workbench(root)) == before


def test_an_exhausted_holdout_trains_nothing_and_new_rows_may_decide_again(refused, tmp_path, capsys):
    root = shutil.copytree(refused[0], tmp_path/"parcels")
    text = (root/"settings.ini").read_text()
    (root/"settings.ini").write_text(text.replace("rule = lond", "decisions = 1\nalpha = 0.003"))
    code, done = call(capsys, root, "cycle", "--now", MARCH)
    assert (code, done["verdict"], done["run"], done["did"]) == (4, INSUFFICIENT, "", "kept")
    assert "wait for labels of rows up to 2024-03-15" in done["reasons"][0]["reason"] and len(bodies(root, "run.planned")) == 2
    assert call(capsys, root, "cycle", "--now", MARCH) == (4, {**done, "new": False})
    assert call(capsys, root, "run", "retrain", "-p", "seed", "7", "--now", MARCH)[0] == 4
    code, later = call(capsys, root, "cycle", "--now", "2024-03-16")
    assert (code, later["verdict"]) == (3, FAIL) and bodies(root, "run.planned")[-1]["holdout"]["alpha"] == 0.003


def test_a_decision_that_is_taken_out_of_the_ledger_is_found(refused, tmp_path, capsys):
    root = shutil.copytree(refused[0], tmp_path/"parcels")
    assert call(capsys, root, "verify")[0] == 0
    with sqlite3.connect(root/".retrain"/"ledger.db") as db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall(): db.execute(f"DROP TRIGGER {name}")
        db.execute("DELETE FROM entries WHERE seq = (SELECT MIN(seq) FROM entries WHERE kind = 'run.planned')")
    code, told = call(capsys, root, "verify")
    assert code == 6 and told["first_bad"]


def test_nobody_chooses_a_level_and_an_old_page_is_not_asked_for_one(refused, tmp_path, capsys):
    root = shutil.copytree(refused[0], tmp_path/"parcels")
    assert call(capsys, root, "run", "retrain", "-p", "alpha", "0.3", "--now", MARCH)[0] == 2
    page = Path(root)/"nbs"/"runs"/"retrain.ipynb"
    book = json.loads(page.read_text())
    for cell in book["cells"]:
        cell["source"] = [line for line in "".join(cell["source"]).replace("alpha=alpha, ", "").splitlines(True) if not line.startswith("alpha:float")]
    page.write_text(json.dumps(book))
    code, wrong = call(capsys, root, "cycle", "--now", MARCH)
    assert code == 2 and "takes no `alpha`" in wrong["cause"]


# --- From entries alone ---

def planned(n, decision="bootstrap", start="2024-02-15", end="2024-03-01", alpha=0.05/52):
    return {"run": f"run-{n}", "holdout": {"asked": f"q{n}", "decision": decision, "start": start, "end": end, "alpha": alpha}}


@pytest.mark.parametrize("ended, counts", [
    ([], 1),                                                    # Ended without a word: nobody can tell, so it counts
    ([{"run": "run-0", "outcome": None, "looked": True}], 1),   # Broke after its candidate was compared
    ([{"run": "run-0", "outcome": None, "looked": False}], 0),  # Broke before
    ([{"run": "run-0", "outcome": INSUFFICIENT, "looked": False}], 0)]) # Stopped on purpose before
def test_what_may_have_looked_counts(ended, counts):
    assert len(uses([planned(0)], ended)) == counts


def test_a_refresh_is_told_and_spends_nothing_and_old_entries_say_nothing():
    assert uses([planned(0, "refresh"), {"run": "run-9"}], []) == () and len(uses([planned(0, "switch")], [])) == 1


def shipped(settings, n, noises, seed): # -> which challengers shipped, each at the level that the entries so far leave to it
    y, scores = models(np.random.default_rng([21, seed]), n, [EQUAL, *noises])
    rows, champion, entries, ends, found = Holdout(start="2024-02-15", end="2024-03-01"), scores[0], [], [], []
    for i, challenger in enumerate(scores[1:]):
        alpha = level(made(settings, uses(entries, ends)), rows)
        ship = bool(alpha) and superior(y, challenger, champion, alpha)
        if ship: champion, found = challenger, [*found, i]
        entries.append(planned(i, "switch", alpha=alpha))
        ends.append({"run": f"run-{i}", "outcome": PASS if ship else FAIL, "looked": True})
    return found


@pytest.mark.parametrize("rule", ["decisions = 52", "rule = lond"])
def test_of_52_equal_challengers_the_wired_path_ships_any_in_at_most_one_year_of_twenty_and_a_real_gain_always(small_settings, rule):
    settings = parse_settings(f"{small_settings}\n[holdout]\n{rule}\n")
    assert sum(bool(shipped(settings, 1000, [EQUAL]*CHALLENGERS, seed)) for seed in range(40)) <= 40*(0.05 + 3*(0.05*0.95/40)**0.5)
    assert all(10 in shipped(settings, 20_000, [WORSE]*10 + [BETTER], seed) for seed in range(6))
