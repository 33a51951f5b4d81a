"The torture suite, first part: what a candidate can be. Each case has its right answer in its name, and the gate that has to say it"
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from nights import FEATURES, changed, judging, parcels

from retrain_nb.records import FAIL, INSUFFICIENT, PASS, SettingsError, Verdict
from retrain_nb.stages.evaluate import delong, evaluate
from retrain_nb.stages.gates import GatePolicy, guarded, judge, refresh, superiority
from retrain_nb.stages.paired import family, paired_mean
from retrain_nb.stages.slices import judge_slices, rows_of, slice_of
from retrain_nb.stages.train import predict
from retrain_nb.tasks import log_losses

FEW = [("settings.ini", "min_rows = 300", "min_rows = 50"), ("settings.ini", "min_positives = 50", "min_positives = 10")]
sigmoid = lambda x: 1/(1 + np.exp(-x))
odds = lambda p: np.log(p/(1 - p))


def as_candidate(change): # -> what the page's `evaluate` is swapped for: the candidate is the champion, changed
    return {"evaluate": lambda y, scores, rival, *more: evaluate(y, change(y, rival), rival, *more)}


def noisy(sd, seed=0): return as_candidate(lambda y, rival: sigmoid(odds(rival) + np.random.default_rng(seed).normal(0, sd, len(rival))))


def test_an_ordinary_candidate_is_passed(night):
    found = night()
    assert found.verdict.outcome == PASS and not found.stopped and {v.name for v in found.verdict.leaves} >= {"log_loss", "auc", "unspoiled"}


def test_the_champion_plus_noise_at_small_n_is_insufficient_and_says_how_many_days_it_would_take(night):
    rows = parcels()
    found = night(rows[~judging(rows) | (np.arange(len(rows)) % 6 == 0)].reset_index(drop=True), FEW, noisy(0.4))
    assert found.said[0] == INSUFFICIENT and found.said[1] <= {"log_loss", "auc"} and "more days like these" in found.verdict.reason


def test_the_champion_plus_much_noise_is_failed_by_both_rails(night):
    assert night(swap=noisy(2.0)).said == (FAIL, {"log_loss", "auc"})


def test_a_copy_of_the_champion_does_no_harm_and_is_no_gain(night):
    found = night(swap=as_candidate(lambda y, rival: rival.to_numpy()))
    assert found.verdict.outcome == PASS and found.of("log_loss").interval == (0, 0) and "no different" in found.of("log_loss").reason
    assert superiority("log_loss", found.names["evaluation"].difference, found.names["run"].gates).outcome == FAIL


def test_scores_that_are_nan_are_failed_by_finite_before_anything_is_measured(night):
    found = night(swap={"predict": lambda booster, X, classes: np.where(np.arange(len(X)) == 7, np.nan, 0.3 + 0.1*(np.arange(len(X)) % 3))})
    assert found.said == (FAIL, {"finite"}) and found.stopped and "1 of 840 scores" in found.verdict.reason and "evaluation" not in found.names


def test_a_constant_prediction_is_failed_by_varied(night):
    found = night(files=[("settings.ini", "num_leaves 7", "num_leaves 7, min_data_in_leaf 100000")])
    assert found.said == (FAIL, {"varied"}) and found.stopped


def test_inverted_labels_are_failed_by_both_rails(night):
    found = night(changed("late", lambda f: 1 - f.late))
    assert found.said == (FAIL, {"log_loss", "auc"}) and "worse by" in found.verdict.reason


def test_units_changed_in_one_feature_of_the_training_rows_are_failed_by_both_rails(night):
    assert night(changed("rain", lambda f: f.rain*25.4)).said == (FAIL, {"log_loss", "auc"})


def test_units_changed_beyond_what_the_contract_promises_are_failed_by_its_range(night):
    found = night(changed("load", None, lambda f: f.load*1000))
    assert found.said == (FAIL, {"load.range"}) and found.stopped


def test_weights_that_move_every_score_are_failed_by_log_loss_and_not_by_auc(night):
    found = night(files=[("settings.ini", "num_leaves 7", "num_leaves 7, scale_pos_weight 4")])
    assert found.said == (FAIL, {"log_loss"}) and found.of("auc").outcome == PASS


def test_weights_of_rows_are_refused_by_name_and_not_ignored(night):
    with pytest.raises(SettingsError, match=r"\[source\] weight: unknown"): night(files=[("settings.ini", "label = late", "label = late\nweight = load")])


# --- Margins, ties ---

ZERO = [("settings.ini", "margins = log_loss 0.02, auc 0.02", "margins = log_loss 0, auc 0")]


def test_with_a_margin_of_zero_an_equal_candidate_is_not_passed(night):
    found = night(files=ZERO, swap=noisy(0.05))
    assert found.verdict.outcome != PASS and found.said[1] <= {"log_loss", "auc"}


def test_with_a_margin_of_zero_a_better_candidate_is_passed(night):
    better = as_candidate(lambda y, rival: sigmoid(odds(rival) + np.where(y.fillna(0) == 1, 0.4, -0.4)))
    found = night(files=ZERO, swap=better)
    assert found.verdict.outcome == PASS and found.of("log_loss").interval[1] < 0


def test_ties_everywhere_are_counted_as_half_and_a_copy_of_them_is_no_different(night):
    tied = {"evaluate": lambda y, scores, rival, *more: evaluate(y, rival.round(1).clip(0.05, 0.95), rival.round(1).clip(0.05, 0.95), *more)}
    found = night(swap=tied)
    e, run = found.names["evaluation"], found.names["run"]
    judged = found.names["judged"]
    known = judged[run.label].notna().to_numpy()
    y, p = judged[run.label].to_numpy()[known], found.names["rival"].round(1).clip(0.05, 0.95).to_numpy()[known]
    pairs = (p[y == 1][:, None] > p[y == 0]).mean() + (p[y == 1][:, None] == p[y == 0]).mean()/2
    assert found.verdict.outcome == PASS and e.candidate["auc"].value == pytest.approx(pairs, abs=1e-12) and len(np.unique(p)) < 11
    assert delong(y, p, p)["se"] == 0


def test_ties_do_not_hide_a_candidate_that_ranks_nothing(night):
    found = night(swap=as_candidate(lambda y, rival: np.where(np.arange(len(rival)) == 0, 0.25, 0.26)))
    assert found.said[0] == FAIL and "auc" in found.said[1]


# --- Parts that break ---

def test_a_metric_that_is_missing_is_insufficient_by_its_name(night):
    def forgetful(*given):
        found = evaluate(*given)
        return replace(found, difference={m: e for m, e in found.difference.items() if m != "auc"})
    found = night(swap={"evaluate": forgetful})
    assert found.said == (INSUFFICIENT, {"auc"}) and "measured are: log_loss" in found.verdict.reason


def test_no_baseline_is_insufficient_by_rival(night):
    found = night(swap={"evaluate": lambda y, scores, rival, days, level, name, task: evaluate(y, scores, None, days, level, name, task)})
    assert found.said == (INSUFFICIENT, {"rival"}) and "`none`" in found.verdict.reason


def test_a_gate_that_raises_is_insufficient_and_the_others_are_still_heard(night):
    @guarded
    def sanity(*given): raise ZeroDivisionError("one row too few")
    found = night(swap={"sanity": sanity})
    assert found.said == (INSUFFICIENT, {"sanity"}) and "ZeroDivisionError: one row too few" in found.verdict.reason and found.stopped
    e, policy = night().names["evaluation"], GatePolicy(margins={"log_loss": 0.02, "auc": 0.02}, min_rows=300)
    broken = replace(e, difference={**e.difference, "auc": replace(e.difference["auc"], high="wide")})
    told = {v.name: v.outcome for v in refresh(broken, [], policy).leaves}
    assert told.get("auc", told.get("rail")) == INSUFFICIENT and told["log_loss"] == PASS


def test_a_check_that_was_forgotten_is_insufficient_by_its_name(night):
    found = night()
    checks = [v for v in found.verdict.parts if v.name not in ("leakage", "log_loss", "auc")]
    again = judge(found.names["evaluation"], checks, found.names["run"].gates)
    assert again.outcome == INSUFFICIENT and "leakage: this check was not made" in again.reason
    assert judge(found.names["evaluation"], [*checks, Verdict(name="leakage", outcome=PASS, reason="looked at")], found.names["run"].gates).outcome == PASS


# --- Slices, entities ---

def sliced(seed=3, share=0.03, n=9000, days=30): # -> rows, their days, and differences of a candidate that is as good everywhere but on a few
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame({"depot": np.where(rng.random(n) < share, "F", rng.choice(list("ABCDE"), n)), "load": rng.gamma(4, 0.25, n)})
    truth = rng.normal(-1, 1, n)
    y = (rng.random(n) < sigmoid(truth)).astype(float)
    champion = sigmoid(truth + rng.normal(0, 0.3, n))
    candidate = np.where(rows.depot == "F", 0.35, sigmoid(truth + rng.normal(0, 0.3, n)))
    return rows, np.arange(n) % days, log_losses(y, candidate) - log_losses(y, champion)


def test_worse_only_on_a_slice_of_three_percent_is_failed_by_that_slice_where_the_whole_passes():
    rows, day, d = sliced()
    names = [f"depot = {x}" for x in "ABCDEF"]
    found = judge_slices(names, family(d, np.stack([rows_of(slice_of(n), rows) for n in names]), codes=day), 0.05)
    assert paired_mean(d, codes=day).high < 0.02 # What a gate on all rows sees
    assert found.outcome == FAIL and {v.name for v in found.leaves if v.outcome == FAIL} == {"depot = F"}


def test_clustered_entities_that_pass_as_rows_are_insufficient_as_customers():
    rng = np.random.default_rng(5)
    who = np.repeat(np.arange(8), 250) # Eight customers, 250 rows each
    truth = rng.normal(-1, 1, 2000)
    y = (rng.random(2000) < sigmoid(truth)).astype(float)
    champion, candidate = sigmoid(truth), sigmoid(truth + rng.normal(0, 0.35, 8)[who])
    policy = GatePolicy(margins={"log_loss": 0.02}, min_rows=300)
    rail = lambda clusters: next(v for v in refresh(evaluate(y, candidate, champion, clusters), [], policy).leaves if v.name == "log_loss")
    assert (rail(np.arange(2000)).outcome, rail([f"customer {w}" for w in who]).outcome) == (PASS, INSUFFICIENT)


def test_the_columns_of_the_rows_are_those_that_the_suite_believes(night):
    assert set(night().names["features"].columns) == set(FEATURES)


# --- What the plan in the settings asks besides ---

def asked(**keys): return [("settings.ini", "[gates]\n", "[gates]\n" + "".join(f"{name} = {value}\n" for name, value in keys.items()))]


def test_on_the_page_a_slice_of_three_percent_is_failed_by_that_slice_where_both_rails_pass(night):
    def blind(booster, X, classes): return np.where(X["load"] >= 2.1, 0.25, predict(booster, X, classes))
    found = night(parcels(a_day=240), asked(slices="load = .. 1; load = 1 .. 2.1; load = 2.1 ..", slice_margin=0.05), {"predict": blind})
    assert found.said == (FAIL, {"load = 2.1 .."}) and {found.of(m).outcome for m in ("log_loss", "auc")} == {PASS}
    assert "harm is shown" in found.verdict.reason and found.of("load = 2.1 ..").n < 0.035*3360


def towns(): # -> rows of two towns, and in the test a village of seven and a hamlet of eight
    rows = parcels()
    at, town = np.flatnonzero(judging(rows)), np.where(np.arange(len(rows)) % 3 == 0, "north", "south").astype(object)
    town[at[20:27]], town[at[40:48]] = "village", "hamlet"
    return rows.assign(town=town)


@pytest.mark.parametrize("untested, outcome", [("block", INSUFFICIENT), ("10%", PASS)])
def test_on_the_page_a_group_of_seven_is_never_named_and_insufficient_unless_the_policy_lets_some_go_untested(night, untested, outcome):
    found = night(towns(), asked(groups="town", group_margin=0.3, decide_at=0.5, untested=untested))
    assert found.verdict.outcome == outcome and (outcome == PASS or found.said[1] == {"town, too small to be shown"})
    assert "village" not in str(found.verdict) and "hamlet" not in str(found.verdict) and "too small to be shown" in str(found.verdict)


def test_on_the_page_a_gate_of_ones_own_that_raises_is_insufficient_and_the_others_are_still_heard(night):
    (night.root/"own.py").write_text("from retrain_nb.records import PASS, Verdict\ndef crash(evaluation): raise KeyError('a column that is gone')\n"
                                     "def fine(evaluation): return Verdict(name='fine', outcome=PASS, reason='looked')\n")
    found = night(files=asked(own="own:crash, own:fine"))
    assert found.said == (INSUFFICIENT, {"crash"}) and "KeyError: 'a column that is gone'" in found.verdict.reason
    assert {found.of(name).outcome for name in ("fine", "log_loss", "auc")} == {PASS}


def test_on_the_page_weights_that_move_every_score_are_failed_by_calibration_too(night):
    found = night(files=[*asked(calibration="slope 0.3, intercept 0.3"), ("settings.ini", "num_leaves 7", "num_leaves 7, scale_pos_weight 4")])
    assert found.said == (FAIL, {"calibration intercept", "log_loss"})


@pytest.mark.parametrize("before, after, says", [("slices", "slice", "did you mean `slices`"), ("slice_margin", "slice_margn", "did you mean `slice_margin`")])
def test_a_typo_in_the_plan_is_refused_by_name(night, before, after, says):
    with pytest.raises(SettingsError) as e: night(files=[(f, a, b.replace(before, after)) for f, a, b in asked(slices="depot", slice_margin=0.05)])
    assert says in str(e.value)
