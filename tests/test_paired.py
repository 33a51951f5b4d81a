"What a reader of `13b_paired` should not see: known answers, odd input; error rates are in `test_error_rates`"
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from retrain_nb.records import DataError, UsageError
from retrain_nb.stages.paired import (
    _table,
    bca,
    block_length,
    block_mean,
    detectable,
    diebold_mariano,
    family,
    folds_mean,
    hac_mean,
    holm,
    max_t,
    paired_bca,
    paired_bootstrap,
    paired_mean,
    resampled,
    rmse_change,
    rows_needed,
)
from retrain_nb.tasks import influence

KNOWN = json.loads((Path(__file__).parent/"known_answers"/"paired.json").read_text())
sigmoid = lambda x: 1/(1 + np.exp(-x))


def band(rate, reps): return 3*math.sqrt(rate*(1 - rate)/reps) # Three standard errors of a share seen in `reps` repetitions


def world(rng, n, odds=0.0, noise=0.5): # -> labels and the scores of two equally good models
    truth = rng.normal(odds, 1, n)
    y = (rng.random(n) < sigmoid(truth)).astype(float)
    return y, sigmoid(truth + rng.normal(0, noise, n)), sigmoid(truth + rng.normal(0, noise, n))


# --- Known answers ---

def test_holm_gives_the_known_answers():
    assert holm(KNOWN["holm"]["p"]) == pytest.approx(KNOWN["holm"]["adjusted"], abs=1e-12)
    assert holm([]).size == 0 and holm([0.5]).tolist() == [0.5]


def test_diebold_mariano_and_newey_west_give_the_known_answers():
    known = KNOWN["diebold_mariano"]
    d, h, n = np.array(known["d"]), known["h"], len(known["d"])
    found, p = diebold_mariano(d, h)
    assert (found, p) == (pytest.approx(known["hln"], rel=1e-9), pytest.approx(known["p_t"], rel=1e-9))
    assert found/((n + 1 - 2*h + h*(h - 1)/n)/n)**0.5 == pytest.approx(known["dm"], rel=1e-9)
    e = hac_mean(d, 4, 0.95)
    assert (e.high - e.value)/stdtrit(n - 1, 0.975) == pytest.approx(known["hac_maxlags4_se"], rel=1e-9)


def test_overlapping_folds_give_the_known_answer():
    known = KNOWN["overlapping_folds"]
    e = folds_mean(np.array(known["d"]), known["ratio"])
    t = e.value/((e.high - e.value)/stdtrit(4, 0.95))
    assert (t, 2*stdtr(4, -t)) == (pytest.approx(known["t"], rel=1e-9), pytest.approx(known["p"], rel=1e-9))


def test_two_one_sided_tests_give_the_known_answers():
    known = KNOWN["two_one_sided"]
    e = paired_mean(np.array(known["a"]) - np.array(known["b"]))
    error = (e.high - e.value)/stdtrit(7, 0.95)
    lower, upper = (e.value - known["low"])/error, (e.value - known["upp"])/error
    assert (lower, upper) == (pytest.approx(known["lower"][0], rel=1e-9), pytest.approx(known["upper"][0], rel=1e-9))
    assert max(stdtr(7, -lower), stdtr(7, upper)) == pytest.approx(known["p"], rel=1e-8)


def test_block_length_gives_the_known_answer():
    known = KNOWN["block_length"]
    shocks, z = np.random.default_rng(known["seed"]).normal(size=known["n"]), np.zeros(known["n"])
    for i in range(1, len(z)): z[i] = known["rho"]*z[i - 1] + shocks[i]
    assert block_length(z) == pytest.approx(known["circular"], rel=1e-9)


def test_as_many_rows_are_needed_as_was_found_by_simulation():
    assert abs(rows_needed(0.26, 0.0147) - 1934) <= 2
    assert detectable(1.0, ndtri(0.95)) == pytest.approx(ndtri(0.95) + ndtri(0.8))


def test_weights_are_poisson_with_exact_mean_and_variance():
    w = _table()
    assert (w.mean(), (w*w).mean(), len(w)) == (1, 2, 65536)
    assert np.abs(np.bincount(w.astype(int))/65536 - [math.exp(-1)/math.factorial(k) for k in range(9)]).max() < 3e-4
    assert (w**3).mean() == pytest.approx(5, abs=0.01)


@pytest.mark.parametrize("odds, digits", [(-1.5, 6), (0.0, 1), (1.5, 1)]) # Rare, even and common; without ties and with many
def test_each_draw_is_what_scikit_learn_says_of_the_same_weights(odds, digits):
    from sklearn.metrics import log_loss, roc_auc_score
    y, a, b = world(np.random.default_rng(3), 300, odds)
    a, b = np.clip(a.round(digits), 0.01, 0.99), np.clip(b.round(digits), 0.01, 0.99)
    group = np.arange(300)//3
    found = resampled(y, a, b, 20, 7, group)
    rng, table, seen = np.random.default_rng(7), _table(), {}
    for i in range(20):
        drawn = table[rng.integers(0, 65536, 100, dtype="uint16")]
        w = drawn[group]
        seen[i] = roc_auc_score(y, b, sample_weight=w) - roc_auc_score(y, a, sample_weight=w), log_loss(y, a, sample_weight=w) - log_loss(y, b, sample_weight=w)
    for at, metric in enumerate(("auc", "log_loss")):
        assert found[metric] == pytest.approx([seen[i][at] for i in range(20)], abs=1e-12)


def test_the_spread_of_draws_is_the_standard_error_of_delong_and_of_clusters():
    rng = np.random.default_rng(0)
    y, a, b = world(rng, 4000, -1)
    for codes in (None, np.arange(4000)//20):
        draws, at = resampled(y, a, b, 1000, codes=codes), np.arange(4000) if codes is None else codes
        for metric in ("auc", "log_loss"):
            psi = influence(metric, y, a)[1] - influence(metric, y, b)[1]
            assert draws[metric].std() == pytest.approx(float((np.bincount(at, psi)**2).sum())**0.5, rel=0.08)


def test_max_t_is_bonferroni_for_strangers_and_one_test_for_twins():
    rng = np.random.default_rng(0)
    alone, twin = rng.normal(size=(4000, 10)), np.repeat(rng.normal(size=(400, 1)), 10, axis=1)
    assert max_t(np.zeros(10), alone)[0] == pytest.approx(-ndtri(1 - 0.95**0.1), abs=0.05)
    assert max_t(np.zeros(10), twin)[0] == pytest.approx(ndtri(0.95), abs=0.04)
    assert max_t(np.array([2.0]), rng.normal(size=(50, 1)))[1][0] == pytest.approx(ndtr(-2.0), abs=0.005)


def test_a_difference_that_is_called_detectable_is_found_four_times_in_five():
    rng, reps = np.random.default_rng(2), 1000
    true = detectable(1/20**0.5, stdtrit(19, 0.95), 19)
    assert abs(np.mean([paired_mean(rng.normal(true, 1, 20)).low > 0 for _ in range(reps)]) - 0.8) <= band(0.8, reps) + 0.01
    assert np.mean([paired_mean(rng.normal(0, 1, 20)).low > 0 for _ in range(reps)]) <= 0.05 + band(0.05, reps)


# --- Odd input ---

def test_no_evidence_gives_no_estimate():
    assert paired_mean(np.array([])) is None and paired_mean(np.ones(5), codes=np.zeros(5)) is None
    assert hac_mean(np.ones(1), 0) is None and block_mean(np.ones(3), length=3) is None and paired_bca(np.array([])) is None
    assert rmse_change(*[np.array([])]*3) is None and block_mean(np.array([])) is None
    nothing = family(np.ones(4), np.zeros((2, 4), dtype=bool))
    assert nothing.estimates == (None, None) == nothing.adjusted
    assert family(np.ones(4), np.zeros((0, 4), dtype=bool)).estimates == ()
    assert family(np.ones(4), np.ones((1, 4), dtype=bool)).estimates == (None,) # Nothing varies
    y, a, b = world(np.random.default_rng(0), 100)
    assert paired_bootstrap(y, a, b, codes=np.arange(100)%2) == {} # Two clusters: one draw in seven is empty


def test_a_model_compared_with_itself_is_no_different():
    y, a, _ = world(np.random.default_rng(0), 200)
    for e in [*paired_bootstrap(y, a, a, draws=100).values(), paired_mean(np.zeros(9)), rmse_change(y, a, a)]: assert (e.value, e.low, e.high) == (0, 0, 0)
    assert bca(0.0, np.zeros(10), np.zeros(5)) == (0.0, 0.0)


@pytest.mark.parametrize("call, says", [
    (lambda: paired_mean(np.array([1, math.inf])), "missing or infinite"), (lambda: paired_mean(np.ones((2, 2))), "one number for each row"),
    (lambda: paired_mean(np.ones(3), codes=np.ones(2)), "one cluster for each row"), (lambda: hac_mean(np.ones(3), -1), "Choose 0 to 2"),
    (lambda: resampled(np.zeros(4), np.ones(4)/2, np.ones(4)/2), "there is no AUC"), (lambda: family(np.ones(3), np.ones((1, 2))), "sets of rows"),
    (lambda: diebold_mariano(np.ones(5)), "not above 0")])
def test_bad_input_is_refused_with_a_cure(call, says):
    with pytest.raises((DataError, UsageError), match=says): call()


def test_the_order_of_rows_and_the_names_of_clusters_do_not_matter_and_units_carry_over():
    rng = np.random.default_rng(0)
    d, at = rng.normal(size=60), np.arange(60)//6
    shuffled = rng.permutation(60)
    e, other = paired_mean(d, codes=at), paired_mean(1000*d[shuffled], codes=np.array([f"day {i}" for i in at])[shuffled])
    assert (1000*e.value, 1000*e.low, 1000*e.high) == pytest.approx((other.value, other.low, other.high))
