"What a reader of `14_gates` should not see: error rates over many trials, and that nothing missing ever passes"
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.records import FAIL, INSUFFICIENT, PASS, Estimate, SettingsError, Verdict, combine
from retrain_nb.stages.evaluate import base_rate, estimate, evaluate
from retrain_nb.stages.gates import NEEDED, GatePolicy, bootstrap, data_health, judge, rail, refresh, sanity, superiority

POLICY = GatePolicy(min_rows=10, min_positives=2, min_days=7, margins={"log_loss": 0.02, "auc": 0.02})
CHECKS = [Verdict(name=name, outcome=PASS, reason="fine") for name in NEEDED]
OTHERS = [c for c in CHECKS if c.name not in ("data health", "sanity")] # Which other rooms make
GOOD = Estimate(value=0.0, low=-0.01, high=0.01, n=1000, clusters=14, level=0.9, method="t", detectable=0.015)


@dataclass(frozen=True)
class Compared:
    rival_name:str
    difference:dict
    rival:dict = field(default_factory=dict)
    task:str = "binary"


def of_days(x): # An estimate from one difference per day
    return replace(estimate(x.mean(), (x - x.mean())/len(x), np.arange(len(x)), 0.9, difference=True), n=1000)


def limit(rate, trials): return rate + 3*(rate*(1 - rate)/trials)**0.5


def outcomes(harm, trials=2000, days=14, sd=0.02, other=-0.05, seed=0): # Of refreshes whose true log-loss harm is `harm`
    rng = np.random.default_rng(seed)
    pairs = ({"log_loss": of_days(rng.normal(harm, sd, days)), "auc": of_days(rng.normal(other, sd, days))} for _ in range(trials))
    found = [refresh(Compared("champion", pair), CHECKS, POLICY).outcome for pair in pairs]
    return {o: found.count(o)/trials for o in (PASS, FAIL, INSUFFICIENT)}


def test_a_candidate_exactly_at_the_margin_passes_at_most_as_often_as_alpha():
    found = outcomes(harm=0.02)
    assert 0.03 < found[PASS] <= limit(0.05, 2000), found


def test_a_candidate_at_every_margin_passes_hardly_ever():
    assert outcomes(harm=0.02, other=0.02)[PASS] < 0.02


def test_an_equal_candidate_with_enough_days_passes_and_fails_at_most_as_often_as_alpha():
    assert outcomes(harm=0, sd=0.02)[PASS] > 0.9
    assert outcomes(harm=0, sd=0.08)[FAIL] <= limit(0.05, 2000)


def test_a_harmful_candidate_fails():
    found = outcomes(harm=0.05)
    assert found[PASS] == 0 and found[FAIL] > 0.99


def test_little_evidence_is_insufficient_and_not_a_pass():
    found = outcomes(harm=0, sd=0.2)
    assert found[INSUFFICIENT] > 0.9 and found[PASS] < 0.05
    assert outcomes(harm=-1, days=3, trials=50)[INSUFFICIENT] == 1 # Three days, however good


def test_a_worthless_first_model_passes_at_most_as_often_as_alpha():
    rng, trials = np.random.default_rng(4), 2000
    found = [superiority("log_loss", {"log_loss": of_days(rng.normal(0, 0.02, 14))}, POLICY).outcome for _ in range(trials)]
    assert 0.03 < found.count(PASS)/trials <= limit(0.05, trials) and found.count(FAIL)/trials <= limit(0.05, trials)


def test_the_days_that_are_asked_for_are_about_enough():
    short = of_days(np.random.default_rng(5).normal(0, 0.06, 14))
    verdict = rail("log_loss", {"log_loss": short}, POLICY)
    more = int(verdict.reason.split("about ")[1].split(" more")[0].replace(",", ""))
    assert verdict.outcome == INSUFFICIENT and 0.6 < outcomes(harm=0, sd=0.06, days=14 + more, trials=400)[PASS] <= 1


def test_real_scores_go_all_the_way_through():
    rng = np.random.default_rng(6)
    n, day = 14_000, np.arange(14_000)//1000
    odds = rng.normal(-1, 1, n)
    y, score = (rng.random(n) < 1/(1 + np.exp(-odds))).astype(float), 1/(1 + np.exp(-odds - rng.normal(0, 0.1, n)))
    policy = replace(POLICY, min_rows=1000, min_positives=50)
    checks = [*OTHERS, sanity(score, y), data_health(y, day, y, day, policy)]
    champion = 1/(1 + np.exp(-odds - rng.normal(0, 0.1, n)))
    assert judge(evaluate(y, score, champion, day, policy.level), checks, policy).outcome == PASS
    assert judge(evaluate(y, score, base_rate(y, n), day, policy.level, "base rate"), checks, policy).outcome == PASS
    assert judge(evaluate(y, rng.permutation(score), champion, day, policy.level), checks, policy).outcome == FAIL
    assert judge(evaluate(y, rng.permutation(score), base_rate(y, n), day, policy.level, "base rate"), checks, policy).outcome == FAIL
    assert judge(evaluate(y, score, None, day, policy.level), checks, policy).outcome == INSUFFICIENT
    assert judge(evaluate(y, score, champion, day, 0.8), checks, policy).outcome == INSUFFICIENT # Made for another alpha
    few = slice(0, 200)
    checks = [*OTHERS, sanity(score[few], y[few]), data_health(y, day, y[few], day[few], policy)]
    assert judge(evaluate(y[few], score[few], champion[few], day[few], policy.level), checks, policy).outcome == INSUFFICIENT


@pytest.mark.parametrize("estimate, outcome", [
    (GOOD, PASS), (replace(GOOD, high=0.02), PASS), (replace(GOOD, low=0.001, value=0.005), PASS),
    (replace(GOOD, high=0.0201), INSUFFICIENT),
    (replace(GOOD, low=0.001, value=0.02, high=0.04), FAIL), (replace(GOOD, low=0.03, value=0.04, high=0.05), FAIL),
    (replace(GOOD, low=0.0, value=0.0, high=0.0, detectable=0.0), PASS),
    (replace(GOOD, n=9), INSUFFICIENT), (replace(GOOD, clusters=6), INSUFFICIENT),
    (replace(GOOD, level=0.95), INSUFFICIENT), (replace(GOOD, low=0.02, high=-0.02), INSUFFICIENT),
    (replace(GOOD, value=float("nan")), INSUFFICIENT),
    (replace(GOOD, low=-float("inf")), INSUFFICIENT), (replace(GOOD, value=None), INSUFFICIENT),
])
def test_the_rail_reads_its_interval(estimate, outcome):
    verdict = rail("log_loss", {"log_loss": estimate}, POLICY)
    assert verdict.outcome == outcome and verdict.reason


def test_known_to_be_a_little_worse_passes_and_says_so():
    verdict = rail("log_loss", {"log_loss": replace(GOOD, low=0.001, value=0.005)}, POLICY)
    assert verdict.reason == "worse by 0.0010 to 0.0100, margin 0.0200, which allows that"


number = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(-0.05, 0.05), st.none())
estimates = st.builds(Estimate, value=number, low=number, high=number, n=st.integers(0, 2000), clusters=st.integers(0, 30),
                      level=st.sampled_from([0.9, 0.9, 0.95, float("nan")]), method=st.just("t"), detectable=number)
verdicts = st.builds(Verdict, name=st.sampled_from([*NEEDED, "contract"]),
                     outcome=st.sampled_from([PASS, PASS, FAIL, INSUFFICIENT]), reason=st.just("."))


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(["log_loss", "auc", "f1"]), st.one_of(st.none(), st.just(GOOD), estimates)),
       st.one_of(st.lists(verdicts, max_size=4), st.just(CHECKS)), st.sampled_from(["champion", "base rate", "none", ""]),
       st.dictionaries(st.sampled_from(["log_loss", "auc", "recall"]), st.floats(0, 0.1)))
def test_a_pass_has_every_piece_of_evidence(difference, checks, rival, margins):
    verdict = judge(Compared(rival, difference), checks, replace(POLICY, margins=margins))
    if verdict.outcome != PASS: return
    assert {c.name for c in checks} >= set(NEEDED) and all(c.outcome == PASS for c in checks)
    assert rival in ("champion", "base rate") and (margins or rival == "base rate")
    for metric, bound in margins.items() if rival == "champion" else [("log_loss", 0)]:
        e = difference[metric]
        assert np.isfinite([e.low, e.value, e.high]).all() and e.low <= e.value <= e.high <= bound and e.level == 0.9
        assert e.n >= POLICY.min_rows and e.clusters >= POLICY.min_days


scores = st.lists(st.one_of(st.floats(0, 1), st.floats(allow_nan=True, allow_infinity=True)), max_size=12)
labels = st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, float("nan")]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(scores, labels)
def test_sanity_passes_only_sane_output(score, y):
    if sanity(score, y).outcome != PASS: return
    p = np.array(score)
    assert len(p) == len(y) > 1 and np.isfinite(p).all() and (p >= 0).all() and (p <= 1).all() and len(set(score)) > 1
    assert set(np.array(y)[~np.isnan(y)]) == {0.0, 1.0}


@pytest.mark.parametrize("score, y, outcome, words", [
    ([0.1, np.nan, 0.3, np.nan], [0, 1, 0, 1], FAIL, "2 of 4 scores are missing or infinite"),
    ([0.1, 0.2], [0, 1, 0], FAIL, "shape (2,), labels (3,)"),
    ([0.2, 0.2, 0.2], [0, 1, 0], FAIL, "1 different score in 3 rows"), ([0.1, 1.2], [0, 1], FAIL, "1 of 2 scores are outside 0 to 1"),
    ([0.1, 0.2], [0, 0], INSUFFICIENT, "2 labels, all 0"), ([0.1, 0.2], [0, 3], FAIL, "1 of 2 labels are neither 0 nor 1"),
    ([0.1, 0.2], [np.nan, np.nan], INSUFFICIENT, "no label is known"), ([], [], INSUFFICIENT, "no test rows"),
    (["high"], [1], INSUFFICIENT, "crashed"), ([[0.1, 0.9]], [[0, 1]], FAIL, "shape (1, 2)"),
])
def test_sanity_says_what_is_wrong_with_a_count(score, y, outcome, words):
    verdict = sanity(score, y)
    assert verdict.outcome == outcome and words in verdict.reason


def test_data_health_names_each_shortage():
    y, day = np.tile([0.0, 0, 0, 1], 50), np.arange(200)//10
    policy = GatePolicy(min_rows=150, min_positives=40, min_days=7)
    assert data_health(y, day, y, day, policy).outcome == PASS
    for train, test, words in ((slice(0, 100), slice(None), "training rows"), (slice(None), slice(0, 156), "test rarer class"),
                               (slice(0, 0), slice(None), "training days"), (slice(None), slice(0, 60), "test days")):
        verdict = data_health(y[train], day[train], y[test], day[test], policy)
        assert verdict.outcome == INSUFFICIENT and words in verdict.reason
    assert data_health(y, day, y, day[1:], policy).outcome == INSUFFICIENT
    assert data_health(1 - y*0, day, y, day, policy).outcome == INSUFFICIENT # One class


def test_days_of_health_are_days_and_not_moments():
    y = pd.Series(np.tile([0.0, 1], 100))
    moments = pd.Series(pd.date_range("2013-06-01", periods=200, freq="h", tz="UTC"))
    verdict = data_health(y, moments, y, moments, GatePolicy(min_rows=10, min_positives=5, min_days=10))
    assert {v.name: v.value for v in verdict.leaves}["test days"] == 9


def test_labels_without_a_day_are_no_days():
    y, day = pd.Series(np.tile([0.0, 1], 50)), pd.Series(np.arange(100)//10).where(lambda d: d > 5)
    assert {v.name: v.value for v in data_health(y, day, y, day, POLICY).leaves}["test days"] == 4


@pytest.mark.parametrize("wrong", [
    {"alpha": 0}, {"alpha": 0.5}, {"alpha": float("nan")}, {"min_rows": 0}, {"min_positives": 0}, {"min_days": 1},
    {"max_unlabelled": 1.0},
    {"max_unlabelled": -0.1}, {"min_gain": -0.1}, {"margins": {"log_loss": -0.1}}, {"margins": {"auc": float("nan")}},
    {"margins": {"auc": float("inf")}},
])
def test_a_policy_that_guards_nothing_is_refused(wrong):
    with pytest.raises(SettingsError) as e: GatePolicy(**wrong)
    assert e.value.cure


def test_the_keys_of_the_settings_are_the_fields_of_the_policy():
    from retrain_nb.settings import GatesSection
    assert GatePolicy(**GatesSection(margins={"log_loss": 0.02}).model_dump()) == GatePolicy(margins={"log_loss": 0.02})


def test_no_margin_at_all_lets_nothing_pass():
    assert refresh(Compared("champion", {"log_loss": GOOD}), CHECKS, GatePolicy()).outcome == INSUFFICIENT


@pytest.mark.parametrize("gate, rival", [(refresh, "base rate"), (bootstrap, "champion"), (refresh, "none"), (judge, "yesterday")])
def test_a_gate_meant_for_another_rival_does_not_pass(gate, rival):
    better = replace(GOOD, value=-0.1, low=-0.2, high=-0.05)
    assert gate(Compared(rival, {"log_loss": better, "auc": better}), CHECKS, POLICY).outcome == INSUFFICIENT


def test_a_failed_check_decides_whatever_the_rails_say():
    broken = replace(CHECKS[0], outcome=FAIL, reason="3 scores are NaN")
    verdict = refresh(Compared("champion", {"log_loss": GOOD, "auc": GOOD}), [broken, *CHECKS[1:]], POLICY)
    assert verdict.outcome == FAIL and "3 scores are NaN" in verdict.reason
    assert combine("x", [verdict]).leaves == verdict.leaves


@pytest.mark.parametrize("evaluation, checks, policy", [(None, CHECKS, POLICY), (Compared("champion", None), CHECKS, POLICY),
                                                        (Compared("champion", {"log_loss": GOOD}), None, POLICY),
                                                        (Compared("champion", {"log_loss": GOOD, "auc": GOOD}), [*CHECKS, None], POLICY),
                                                        (Compared("champion", {"log_loss": GOOD, "auc": GOOD}), CHECKS, None)])
def test_a_gate_that_crashes_is_insufficient(evaluation, checks, policy):
    for gate in (refresh, bootstrap, judge): assert gate(evaluation, checks, policy).outcome == INSUFFICIENT


def test_a_rail_that_crashes_is_called_by_its_metric():
    parts = {v.name: v for v in refresh(Compared("champion", {"log_loss": GOOD, "auc": "0.7"}), CHECKS, POLICY).leaves}
    assert parts["auc"].outcome == INSUFFICIENT and "the check crashed" in parts["auc"].reason and parts["log_loss"].outcome == PASS
