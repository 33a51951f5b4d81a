"What a reader of `18b_offline_policy` should not see: known answers, coverage at the propensities where it holds and where it does not, odd logs"
import json
from pathlib import Path

import numpy as np
import pytest

from retrain_nb.records import FAIL, INSUFFICIENT, PASS, DataError, SettingsError
from retrain_nb.stages.offline_policy import Limits, doubly_robust, effective_size, ips, offline_policy, snips

KNOWN = json.loads((Path(__file__).parent/"known_answers"/"ope.json").read_text())
REWARD, LOGGED, TARGET = (np.array(KNOWN[k], dtype=float) for k in ("r", "p_log", "p_pred"))
sigmoid = lambda x: 1/(1 + np.exp(-x))


def test_known_answers():
    w = TARGET/LOGGED
    plain = ips(REWARD, w, 0.95)
    assert plain.value == pytest.approx(KNOWN["ips"], rel=1e-9)
    assert (plain.low, plain.high) == pytest.approx(KNOWN["interval_gaussian_alpha.05"], rel=1e-8)
    assert (plain.high - plain.low)/2/1.959963984540054 == pytest.approx(KNOWN["ips_se"], rel=1e-9)
    assert snips(REWARD, w).value == pytest.approx(KNOWN["snips"], rel=1e-9)
    assert effective_size(w) == pytest.approx(KNOWN["ess"], rel=1e-9)
    found = offline_policy(REWARD, LOGGED, TARGET).values
    assert (found["ips"].value, found["snips"].value) == pytest.approx((KNOWN["ips"], KNOWN["snips"]), rel=1e-9)


def test_the_delta_method_agrees_with_a_bootstrap():
    rng, w = np.random.default_rng(0), TARGET/LOGGED
    draws = rng.integers(0, len(w), (4000, len(w)))
    e = snips(REWARD, w, 0.95)
    again = (w[draws]*REWARD[draws]).sum(axis=1)/w[draws].sum(axis=1)
    assert (e.high - e.low)/2/1.96 == pytest.approx(again.std(), rel=0.05)


def test_a_policy_is_worth_what_it_earned():
    found = offline_policy(REWARD, LOGGED, LOGGED)
    assert found.values["snips"].value == found.values["ips"].value == pytest.approx(REWARD.mean())
    assert abs(found.values["gain"].value) < 1e-12 and found.values["gain"].high < 1e-12 # Not a doubt about a difference of a thing with itself


def test_a_perfect_model_leaves_only_the_spread_of_its_own_expectations():
    rng = np.random.default_rng(0)
    expected = rng.random(500)
    e = doubly_robust(np.ones(500), rng.random(500), np.ones(500), expected, 0.95)
    assert (e.high - e.low)/2 == pytest.approx(1.959964*expected.std(ddof=1)/500**0.5, rel=1e-6)


def test_groups_of_one_row_differ_only_in_t():
    w = TARGET/LOGGED
    alone, grouped = snips(REWARD, w, 0.95), snips(REWARD, w, 0.95, np.arange(300))
    assert (grouped.high - grouped.low)/(alone.high - alone.low) == pytest.approx(1.967930/1.959964, rel=1e-5)
    doubled = snips(np.repeat(REWARD, 4), np.repeat(w, 4), 0.95, np.repeat(np.arange(300), 4)) # Every row four times is no more evidence
    assert (doubled.low, doubled.high, doubled.clusters) == (pytest.approx(grouped.low), pytest.approx(grouped.high), 300)


# --- Coverage, n = 1000 ---

def logs(least, reps, seed): # -> rewards, weights, predictions, expectations: propensities by context, not below `least`; the target picks either action
    rng = np.random.default_rng(seed)
    for _ in range(reps):
        x = rng.normal(size=1000)
        p = np.clip(sigmoid(2*x), least, 1 - least)
        a = (rng.random(1000) < p).astype(float)
        q = lambda a, x=x: sigmoid(x/2 - 0.3 + 0.8*a)
        guess = lambda a, q=q: 0.8*q(a) + 0.05
        yield (rng.random(1000) < q(a)).astype(float), 0.5/np.where(a == 1, p, 1 - p), guess(a), (guess(0) + guess(1))/2


def fixed(least, reps, seed): # -> the same, one action tried with probability `least` whatever the context, and worth less
    rng = np.random.default_rng(seed)
    for _ in range(reps):
        a = (rng.random(1000) >= least).astype(int)
        yield (rng.random(1000) < np.array([0.2, 0.5])[a]).astype(float), 0.5/np.where(a == 1, 1 - least, least), np.full(1000, 0.4), np.full(1000, 0.4)


def covered(made, truth): # -> share of 95 % intervals that hold it
    hits = []
    for r, w, predicted, expected in made:
        found = ips(r, w, 0.95), snips(r, w, 0.95), doubly_robust(r, w, predicted, expected, 0.95)
        hits.append([e.low <= truth <= e.high for e in found])
    return dict(zip(("ips", "snips", "dr"), np.mean(hits, axis=0)))


X = np.random.default_rng(9).normal(size=1_000_000)
TRUTH = float(np.mean([sigmoid(X/2 - 0.3 + 0.8*a).mean() for a in (0, 1)]))


def test_intervals_cover_where_propensities_are_at_least_a_tenth():
    for made, truth in ((logs(0.1, 1000, 0), TRUTH), (fixed(0.1, 1000, 0), 0.35)):
        assert {k: 0.929 <= c <= 0.971 for k, c in covered(made, truth).items()} == dict.fromkeys(("ips", "snips", "dr"), True)


def test_below_a_tenth_ips_covers_too_little_and_the_others_hold():
    found = covered(logs(0.01, 1000, 0), TRUTH)
    assert found["ips"] < 0.92 and 0.929 <= found["snips"] <= 0.971 and 0.929 <= found["dr"] <= 0.971


def test_below_a_hundredth_they_mislead_and_the_log_is_refused():
    found = covered(fixed(0.003, 1000, 0), 0.35)
    assert found["ips"] < 0.5 and found["snips"] < 0.85 # The lesson names both
    r, w, _, _ = next(fixed(0.003, 1, 0))
    assert offline_policy(r, 0.5/w, np.full(1000, 0.5)).verdict.outcome == INSUFFICIENT


def test_a_true_gain_is_found():
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        a = rng.integers(0, 2, 1000)
        r = (rng.random(1000) < np.where(a == 1, 0.40, 0.30)).astype(float)
        found += offline_policy(r, np.full(1000, 0.5), np.where(a == 1, 0.95, 0.05)).values["gain"].low > 0
    assert found >= 0.8*200 # Of a gain of 0.045


def test_an_equal_policy_gains_in_at_most_one_of_twenty():
    rng, found = np.random.default_rng(1), 0
    for _ in range(1000):
        a = rng.integers(0, 2, 500)
        r = (rng.random(500) < 0.3).astype(float)
        found += offline_policy(r, np.full(500, 0.5), np.where(a == 1, 0.8, 0.2)).values["gain"].low > 0
    assert 0.029 <= found/1000 <= 0.071


# --- Refusals and odd input ---

@pytest.mark.parametrize("change, outcome, says", [
    (lambda r, p, t: (r, None, t), INSUFFICIENT, "300 of 300 rows have no propensity"),
    (lambda r, p, t: (r, np.where(np.arange(300) == 7, np.nan, p), t), INSUFFICIENT, "1 of 300 rows have no propensity"),
    (lambda r, p, t: (r, np.where(np.arange(300) == 7, 0.0, p), t), FAIL, "1 values are no probabilities"),
    (lambda r, p, t: (r, np.where(np.arange(300) == 7, 1.5, p), t), FAIL, "1 values are no probabilities"),
    (lambda r, p, t: (r, p, np.where(np.arange(300) == 7, -0.1, t)), FAIL, "1 values are no probabilities"),
    (lambda r, p, t: (r, p, np.where(np.arange(300) == 7, np.nan, t)), FAIL, "1 values are no probabilities"),
    (lambda r, p, t: (r, np.where(np.arange(300) == 7, 0.0099, p), t), INSUFFICIENT, "the smallest is 0.0099"),
    (lambda r, p, t: (r[:100], p[:100], t[:100]), INSUFFICIENT, "100 rows count for"),
    (lambda r, p, t: (r, p, t*0), INSUFFICIENT, "300 rows count for 0"),
    (lambda r, p, t: (r, p, t/2), INSUFFICIENT, "the weights average"), # Half of what the policy wants was never tried
    (lambda r, p, t: (np.where(np.arange(300) == 7, np.nan, r), p, t), INSUFFICIENT, "1 of 300 rows have no reward yet"),
    (lambda r, p, t: (r[:0], p[:0], t[:0]), INSUFFICIENT, "there are no rows")])
def test_what_cannot_be_known_has_no_number(change, outcome, says):
    found = offline_policy(*change(REWARD, LOGGED, TARGET))
    assert found.verdict.outcome == outcome and says in found.verdict.reason and not found.values
    assert says in found._repr_markdown_()


def test_a_log_that_may_speak_does():
    assert offline_policy(REWARD, LOGGED, TARGET).verdict.outcome == PASS
    assert "SNIPS" in offline_policy(REWARD, LOGGED, TARGET)._repr_markdown_()


@pytest.mark.parametrize("call, error, says", [
    (lambda: offline_policy(REWARD, LOGGED[:9], TARGET), DataError, "propensities have shape"),
    (lambda: offline_policy(REWARD, LOGGED, TARGET[:9]), DataError, "target probabilities have shape"),
    (lambda: offline_policy(REWARD, LOGGED, TARGET, (REWARD, REWARD*np.nan)), DataError, "prediction is missing"),
    (lambda: offline_policy(REWARD, LOGGED, TARGET, groups=np.zeros(300)), DataError, "1 group cannot tell"),
    (lambda: offline_policy(REWARD, LOGGED, TARGET, groups=np.zeros(3)), DataError, "3 groups for 300 rows"),
    (lambda: Limits(least_propensity=0), SettingsError, "least_propensity 0"), (lambda: Limits(level=float("nan")), SettingsError, "level nan")])
def test_odd_input_is_refused_by_name(call, error, says):
    with pytest.raises(error, match=says): call()
