"What a reader of `18b_offline_policy` should not see: known answers, odd logs; coverage is in `test_error_rates`"
import json
from pathlib import Path

import numpy as np
import pytest

from retrain_nb.records import FAIL, INSUFFICIENT, PASS, DataError, SettingsError
from retrain_nb.stages.offline_policy import Limits, doubly_robust, effective_size, ips, offline_policy, snips

KNOWN = json.loads((Path(__file__).parent/"known_answers"/"ope.json").read_text())
REWARD, LOGGED, TARGET = (np.array(KNOWN[k], dtype=float) for k in ("r", "p_log", "p_pred"))


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
