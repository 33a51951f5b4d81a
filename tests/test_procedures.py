"""Other procedures: shadows of real cycles, a switch on evidence, and the error rate of that evidence."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_loop import call, cycle_interrupted_at, entries

from bench.procedures import by_rule, follow, made, periods
from retrain_nb.faces.cli import main
from retrain_nb.loop.cycle import cycle_key
from retrain_nb.records import FAIL, INSUFFICIENT, PASS, Model, SettingsError, as_json, from_json
from retrain_nb.services.session import open_session
from retrain_nb.services.shadows import procedures, rows_to_teach, train_shadows
from retrain_nb.services.workbench import open_workbench
from retrain_nb.settings import policy
from retrain_nb.stages.switch import Scored, SwitchPolicy, evidence, switch, winner
from retrain_nb.windows import parse_time

FIRST, TURN, LAST = "2024-02-29", "2024-03-14", "2024-03-28"
WORLD = """
import numpy as np
import pandas as pd
from retrain_nb.demo import toy
view = toy.view
def rows():
    "From 30 January on heavy parcels are punctual and light ones late"
    frame, rng = toy.rows(), np.random.default_rng(11)
    turned = (frame.due_time >= pd.Timestamp("2024-01-30T00:00Z")).to_numpy()
    odds = -1.5 + 2.5*frame.depot.isin(["B", "D"]).to_numpy() + np.where(turned, -3.5, 3.5)*(frame.load.to_numpy() - 1)
    return frame.assign(late=(rng.random(len(frame)) < 1/(1 + np.exp(-odds))).astype(float))
"""
OTHERS = "\n[procedure.sliding]\nrule = sliding\ndays = 14\n[procedure.yearly]\nseason_days = 365\n"


def workbench(root, others=OTHERS, world=WORLD):
    assert main(["init", str(root), "--demo", "toy"]) == 0
    text = (root/"settings.ini").read_text().replace("mode = offline", "mode = disabled").replace("retrain_nb.demo.toy:", "turning:").replace("holdout_days = 14", "holdout_days = 7")
    text = text.replace("min_rows = 300", "min_rows = 200").replace("max_unlabelled = 0.1", "max_unlabelled = 0.2").replace("min_positives = 50", "min_positives = 30")
    (root/"settings.ini").write_text(text.replace("bootstrap = gated", "bootstrap = gated\nblock_days = 1") + "\n[run]\nprofile_rows = 0\n" + others)
    (root/"turning.py").write_text(world)
    return root


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    "A world whose rule turns, two cycles after: the second of them was interrupted when it was to be written down"
    root = workbench(tmp_path_factory.mktemp("turned")/"parcels")
    assert main(["cycle", "--now", FIRST, "--root", str(root)]) == 0
    with pytest.MonkeyPatch.context() as patch: cycle_interrupted_at("cycle.ended", root, patch, TURN)
    assert [e.kind for e in entries(root)].count("shadows.ended") == 1 # All of it, or nothing
    assert main(["cycle", "--now", TURN, "--root", str(root)]) == 0
    return root


def told(root): return [e.body for e in entries(root) if e.kind == "shadows.ended"]


def test_a_challenger_that_is_better_takes_over_once_and_it_is_said_why(turned, capsys):
    first, second = told(turned)
    assert (first["days"], first["verdict"]["outcome"], [s["procedure"] for s in first["shadows"]]) == ([], INSUFFICIENT, ["main", "sliding"])
    assert (len(second["days"]), {s["procedure"] for s in second["scored"]}) == (14, {"main", "sliding"})
    serving = [e.body for e in entries(turned) if e.kind == "champion.set"]
    assert [(b["decision"], b.get("procedure", "main")) for b in serving] == [("bootstrap", "main"), ("switch", "sliding")]
    assert "`sliding` takes over from `main`, as `sliding` lost" in serving[1]["reason"]
    leaves = {v.name: v for part in from_json_verdict(serving[1]["verdict"]).parts for v in part.leaves}
    assert leaves["sliding"].outcome == PASS and leaves["sliding"].value >= leaves["sliding"].threshold == 40
    assert {"log_loss", "auc", "vetting", "unspoiled", "training season"} <= set(leaves)      # The rails of a refresh, against the model that served
    status = call(capsys, turned, "status")[1]
    assert status["champion"]["procedure"] == "sliding" and status["shadows"]["challengers"][0]["procedure"] == "sliding"
    assert call(capsys, turned, "live")[1]["procedure"] == "sliding"
    assert open_workbench(turned).artifacts.has(serving[0]["model"])
    assert call(capsys, turned, "verify")[1]["verdict"] == "PASS"


def from_json_verdict(value):
    from retrain_nb.records import Verdict
    return from_json(Verdict, value)


def test_not_before_the_evidence(turned):
    days = [from_json(Scored, day) for day in told(turned)[1]["days"]]
    outcomes = [switch(days[:n], "main", ["sliding", "yearly"], SwitchPolicy(block_days=1), "log_loss").outcome for n in range(len(days) + 1)]
    assert outcomes[:7] == [INSUFFICIENT]*7 and outcomes[-1] == PASS


def test_a_shadow_is_what_the_page_of_its_procedure_trains_to_the_last_byte(turned, capsys):
    shadow = next(s["model"] for s in told(turned)[1]["shadows"] if s["procedure"] == "sliding")
    assert call(capsys, turned, "status")[1]["champion"]["model"] == shadow
    runs = [e.body for e in entries(turned) if e.kind == "run.planned" and e.body["page"] == "retrain"]
    assert [r["parameters"]["procedure"] for r in runs] == ["main", "main", "sliding"]


def test_a_window_that_cannot_teach_is_refused_by_name(turned):
    assert [(r["procedure"], "a season has 365; lengthen" in r["reason"]) for r in told(turned)[1]["untaught"]] == [("yearly", True)]


def test_the_same_cycle_again_adds_nothing_and_every_run_was_shown(turned, capsys):
    before = entries(turned)
    code, again = call(capsys, turned, "cycle", "--now", TURN)
    assert (code, again["did"], again["new"]) == (0, "switch", False) and entries(turned) == before
    for run in call(capsys, turned, "status")[1]["runs"]:
        assert (turned/"reports"/run["run"]/"report.html").is_file()
    switched = (turned/"reports"/again["run"]/"report.html").read_text()
    assert "takes over from" in switched and "would have saved" in (turned/"reports"/told(turned)[1]["run"]/"report.html").read_text()


def test_what_the_shadows_said_and_what_took_over_can_be_reproduced(turned, capsys):
    switched = [e.body["run"] for e in entries(turned) if e.kind == "champion.set"][1]
    for run in (told(turned)[1]["run"], switched):
        again = call(capsys, turned, "reproduce", run)[1]
        assert (again["verdict"], again["differs"]) == ("REPRODUCED", [])


def test_what_does_not_fit_into_the_budget_waits_and_comes_first(turned, tmp_path, capsys):
    root = Path(shutil.copytree(turned, tmp_path/"parcels"))
    with (root/"settings.ini").open("a") as f: f.write("[shadows]\nbudget_s = 0.0001\n")
    done = call(capsys, root, "cycle", "--now", LAST)[1]
    newest = told(root)[-1]
    assert done["did"] in ("refresh", "kept") and newest["procedure"] == "sliding"
    assert (newest["waiting"], [s["procedure"] for s in newest["shadows"]]) == (["main", "yearly"], ["sliding"])
    assert {s["procedure"] for s in newest["scored"]} == {"main", "sliding"} and len(newest["days"]) == 14
    assert "for want of budget: main" in main_says(capsys, root)


def main_says(capsys, root):
    capsys.readouterr()
    assert main(["status", "--root", str(root)]) == 0
    return capsys.readouterr().out


# --- Without a kernel ---

@pytest.fixture
def parcels(tmp_path):
    return workbench(tmp_path/"parcels", "\n[procedure.latest]\nrule = latest\n[procedure.more]\ncontinued = yes\nrounds = 5\n[procedure.seasonal]\nrule = seasonal\ndays = 20\n")


def test_without_other_procedures_nothing_changes(parcels):
    text = (parcels/"settings.ini").read_text()
    with_others = open_workbench(parcels)
    (parcels/"settings.ini").write_text(text.partition("[procedure.latest]")[0])
    alone, as_of = open_workbench(parcels), parse_time(TURN)
    rows = alone.freeze(as_of, as_of)
    recipe = alone.recipe(as_of, rows, "", 0)
    assert as_json(with_others.following("main").recipe(as_of, rows, "", 0)) == as_json(recipe) and "procedure" not in as_json(recipe)
    assert with_others.following("main").freeze_policy() == alone.freeze_policy() and policy(with_others.settings) == policy(alone.settings)
    assert "season_days" not in policy(alone.settings)["window"] and "continued" not in policy(alone.settings)["trainer"]
    assert cycle_key(alone, as_of) != cycle_key(with_others, as_of)


def test_shadows_that_are_trained_together_are_those_that_are_trained_alone(parcels):
    book = open_workbench(parcels)
    run = open_session(book, as_of=TURN)
    frame = run.read()
    base = train_shadows(run, book, frame, ["main"])["shadows"][0]["model"]
    run = replace(run, recipe=replace(run.recipe, champion=base))
    together = {s["procedure"]: s["model"] for s in train_shadows(run, book, frame, ["main", "seasonal", "more", "latest"])["shadows"]}
    for name in ("latest", "more"):
        one = open_session(book, as_of=TURN, snapshot=run.recipe.snapshot, champion=base, procedure=name)
        assert one.recipe.procedure == name and train_shadows(one, book, frame, [name])["shadows"][0]["model"] == together[name]
    assert len(set(together.values())) == 4
    trees = {n: from_json(Model, json.loads(book.artifacts.get(m))).booster.count("\nTree=") for n, m in together.items()}
    assert trees["more"] == trees["main"] + 5


def test_a_seasonal_window_leaves_out_what_lies_between(parcels):
    book = open_workbench(parcels)
    run = open_session(book, as_of=TURN, procedure="latest")
    taught = rows_to_teach(run, run.read())
    assert (run.when(taught).min(), run.book.settings.window.days) >= (run.split.train.start, 7) and run.split.train.days == 7


def test_a_training_window_of_one_class_is_refused_before_anything_is_trained(tmp_path):
    calm = WORLD.replace("return frame.assign(late=(", "calm = (frame.due_time > pd.Timestamp('2024-02-20T00:00Z')) & (frame.due_time < pd.Timestamp('2024-03-10T00:00Z'))\n    return frame.assign(late=~calm*(")
    book = open_workbench(workbench(tmp_path/"calm", "\n[procedure.latest]\nrule = latest\n", calm))
    run = open_session(book, as_of=TURN)
    made = train_shadows(run, book, run.read(), ["latest", "main"])
    assert ([s["procedure"] for s in made["shadows"]], [r["procedure"] for r in made["refused"]]) == (["main"], ["latest"])
    assert "0 rows of class 1 to learn from, at least 30 wanted; lengthen `days`" in made["refused"][0]["reason"]


def test_a_procedure_that_changed_under_its_name_is_another(parcels):
    book = open_workbench(parcels)
    before = procedures(book)
    (parcels/"settings.ini").write_text((parcels/"settings.ini").read_text().replace("rounds = 5", "rounds = 6"))
    after = procedures(open_workbench(parcels))
    assert {name for name in before if before[name] != after[name]} == {"more"}
    with pytest.raises(SettingsError, match="did you mean `rounds`"):
        (parcels/"settings.ini").write_text((parcels/"settings.ini").read_text().replace("rounds = 6", "ronds = 6"))
        open_workbench(parcels)


# --- The evidence ---

def lives(n, weeks, rho, kind, shared=0.0):
    "Daily gains of three challengers exactly as good as the champion, (3, n, 7 times weeks)"
    rng = np.random.default_rng([n, weeks, round(10*rho), len(kind), round(10*shared)])
    noise = {"normal": rng.standard_normal, "heavy tails": lambda size: rng.standard_t(3, size), "rare": lambda size: rng.standard_normal(size)*(rng.random(size) < 0.1)}[kind]
    own = noise((3, n, 7*weeks))*(1 - shared)**0.5 + noise((1, n, 7*weeks))*shared**0.5
    for t in range(1, 7*weeks): own[..., t] = rho*own[..., t - 1] + (1 - rho*rho)**0.5*own[..., t]
    return own


def weekly(days): return days.reshape(*days.shape[:2], -1, 7).mean(axis=-1)


@pytest.mark.parametrize("rho, kind, shared", [(0, "normal", 0), (0.3, "normal", 0), (0, "heavy tails", 0), (0.3, "heavy tails", 0.7), (0, "rare", 0.7), (0.3, "normal", 0.7)])
def test_over_a_year_of_weekly_looks_three_equal_challengers_hardly_ever_take_over(rho, kind, shared):
    n = 2000
    ever = (evidence(weekly(lives(n, 52, rho, kind, shared))) >= 3/0.05).any(axis=(0, 2)).mean()
    assert ever <= 0.05 + 3*(0.05*0.95/n)**0.5


def test_days_that_remember_each_other_fool_a_test_that_counts_days():
    "Why blocks: pinned, so that nobody makes `block_days = 1` the default"
    days = lives(1000, 52, 0.3, "normal")
    assert (evidence(days) >= 60).any(axis=(0, 2)).mean() > 0.2


@pytest.mark.parametrize("rho, median, most", [(0, 84, 126), (0.3, 105, 182)])
def test_a_challenger_better_by_half_a_day_is_found_within_a_season(rho, median, most):
    days = lives(1000, 52, rho, "normal")[0] + 0.5
    found = evidence(weekly(days[None]))[0] >= 60
    first = np.where(found.any(axis=1), 7*(found.argmax(axis=1) + 1), 9999)
    assert np.median(first) <= median and np.quantile(first, 0.9) <= most


def test_a_challenger_that_becomes_better_is_found_after_a_year_of_being_worse():
    days = lives(500, 104, 0, "normal")[0]
    days[:, :364] -= 0.5
    days[:, 364:] += 0.5
    found = evidence(weekly(days[None]))[0] >= 60
    assert not found[:, :52].any() and (found[:, 52:].argmax(axis=1) + 1).max() < 52 and np.median(7*(found.argmax(axis=1) + 1) - 364) <= 189


def test_min_gain_is_a_null_of_its_own():
    days = lives(2000, 52, 0, "normal") + 0.2
    assert (evidence(weekly(days) - 0.2) >= 60).any(axis=(0, 2)).mean() <= 0.065 < (evidence(weekly(days)) >= 60).any(axis=(0, 2)).mean()


def test_the_same_evidence_the_other_way_round_fails_the_challenger():
    rng = np.random.default_rng(0)
    days = [Scored(day=str(i), n=100, loss={"main": 0.5, "other": 0.51 + 0.01*x}) for i, x in enumerate(rng.standard_normal(200))]
    verdict = switch(days, "main", ["other"], SwitchPolicy(), "log_loss")
    assert (verdict.outcome, winner(verdict)) == (FAIL, "") and winner(switch(days, "other", ["main"], SwitchPolicy(), "log_loss")) == "main"


def test_on_a_stream_that_never_changes_proven_never_switches_and_where_it_turns_it_does():
    calm, seen = list(periods(made("null", 150, 12))), list(periods(made("turns", 400, 12)))
    assert follow(calm, "expanding", by_rule("proven", 7, "log_loss"))[1] == 0
    loss, switches = follow(seen, "expanding", by_rule("proven", 7, "log_loss"))
    assert switches >= 1 and loss < follow(seen, "expanding", lambda *_: "")[0]
