"What a reader of `13_evaluate` should not see: known answers, brute force, error rates, odd input"
import json
from dataclasses import replace
from pathlib import Path
from time import process_time

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr

from retrain_nb.records import DataError, as_json, from_json
from retrain_nb.stages.evaluate import (
    Evaluation,
    base_rate,
    cox,
    delong,
    estimate,
    evaluate,
    logistic,
    reliability,
    spread,
    squared_error,
    wilson,
)
from retrain_nb.tasks import TASKS, influence, log_losses, placements

ANSWERS = Path(__file__).parent/"known_answers"
DELONG = json.loads((ANSWERS/"delong.json").read_text())
CALIBRATION = json.loads((ANSWERS/"calibration.json").read_text())
METRICS = TASKS["binary"].metrics
sigmoid = lambda x: 1/(1 + np.exp(-x))


def toy(n=2000, days=20, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    day = np.sort(rng.integers(0, days, n))
    odds = rng.normal(-1, 1, n)
    y = (rng.random(n) < sigmoid(odds + rng.normal(0, 0.5, days)[day])).astype(float)
    return y, sigmoid(odds + rng.normal(0, noise, n)), sigmoid(odds + rng.normal(0, noise, n)), day


@pytest.mark.parametrize("case", ["synthetic_ties", "tiny"])
def test_delong_gives_the_known_answers(case):
    known = DELONG[case]
    found = delong(*(np.array(known[k], dtype=float) for k in ("y", "score_a", "score_b")))
    for name, value in known["expected"].items():
        assert found[name] == pytest.approx(value, rel=1e-8 if name in "zp" else 2e-10, abs=1e-12), name


def test_delong_is_to_twelve_digits_what_comparing_all_pairs_gives():
    y, a, b, _ = toy(400)
    a, b = a.round(2), b.round(1) # Ties in one, more in the other
    late, punctual = y == 1, y == 0
    pairs = [(s[late][:, None] > s[punctual]) + (s[late][:, None] == s[punctual])/2 for s in (a, b)]
    s = sum(np.cov([w.mean(axis=axis) for w in pairs])/n for axis, n in ((1, late.sum()), (0, punctual.sum())))
    se, found = (s[0, 0] + s[1, 1] - 2*s[0, 1])**0.5, delong(y, a, b)
    diff = pairs[0].mean() - pairs[1].mean()
    wanted = {"auc_a": pairs[0].mean(), "var_a": s[0, 0], "var_b": s[1, 1], "cov": s[0, 1], "diff": diff, "se": se, "z": diff/se, "p": 2*ndtr(-abs(diff/se)), "lo": diff - 1.959963984540054*se}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_placements_equal_the_comparison_of_all_pairs():
    y, a, b, _ = toy(300)
    a = a.round(1) # Many ties
    late, punctual = a[y == 1], a[y == 0]
    wins = (late[:, None] > punctual) + (late[:, None] == punctual)/2
    v = placements(y, a)
    assert np.allclose(v[y == 1], wins.mean(1), atol=1e-12) and np.allclose(v[y == 0], wins.mean(0), atol=1e-12)


def test_one_row_a_day_is_exactly_delong():
    known = DELONG["synthetic_ties"]
    y, a, b = (np.array(known[k], dtype=float) for k in ("y", "score_a", "score_b"))
    psi = influence("auc", y, a)[1] - influence("auc", y, b)[1]
    test = delong(y, a, b)
    assert spread(psi, np.arange(len(y)), y)[0]**0.5 == pytest.approx(test["se"], rel=1e-12)
    assert spread(influence("auc", y, a)[1], np.arange(len(y)), y)[0] == pytest.approx(test["var_a"], rel=1e-12)


def test_one_row_a_day_gives_the_paired_t_interval_for_means():
    from scipy.stats import ttest_1samp
    y, a, b, _ = toy(500)
    difference = evaluate(y, a, b, np.arange(500)).difference
    for metric, d in (("log_loss", log_losses(y, a) - log_losses(y, b)), ("brier", (y - a)**2 - (y - b)**2)):
        low, high = ttest_1samp(d, 0).confidence_interval(0.9)
        assert (difference[metric].low, difference[metric].high) == pytest.approx((low, high), rel=1e-10)


def test_days_of_equal_size_give_the_t_interval_of_daily_means():
    from scipy.stats import ttest_1samp
    y, a, b, _ = toy(600)
    day = np.repeat(np.arange(15), 40)
    d = (log_losses(y, a) - log_losses(y, b)).reshape(15, 40).mean(1)
    e, (low, high) = evaluate(y, a, b, day).difference["log_loss"], ttest_1samp(d, 0).confidence_interval(0.9)
    assert (e.low, e.high) == pytest.approx((low, high), rel=1e-10) and e.clusters == 15


def test_the_auc_of_days_has_the_variance_of_obuchowski():
    y, a, _, day = toy(400, 12)
    v, late = placements(y, a), y == 1
    area, k = v[late].mean(), 12
    days_late, days_punctual = ([(v[g & (day == d)] - area).sum()/g.sum() for d in range(k)] for g in (late, ~late))
    pairs = ((days_late, days_late), (days_punctual, days_punctual), (days_late, days_punctual))
    s10, s01, s11 = (k/(k - 1)*np.dot(*pair) for pair in pairs)
    assert spread(influence("auc", y, a)[1], day, y) == (pytest.approx(s10 + s01 + 2*s11, rel=1e-12), k - 1) and abs(s11) > 1e-6


def test_metrics_equal_those_of_scikit_learn():
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
    y, a, b, day = toy()
    e = evaluate(y, a, b, day)
    for name, metric in (("log_loss", log_loss), ("brier", brier_score_loss), ("auc", roc_auc_score)):
        assert e.candidate[name].value == pytest.approx(metric(y, a), rel=1e-12)
        sign = -1 if name == "auc" else 1
        assert e.difference[name].value == pytest.approx(sign*(metric(y, a) - metric(y, b)), abs=1e-12)


def test_calibration_gives_the_known_answers():
    y, p = (np.array(CALIBRATION[k], dtype=float) for k in "yp")
    assert squared_error(y, p, np.arange(120), 0.9).value == pytest.approx(CALIBRATION["ece2_debiased_quantile10"], rel=1e-9)
    assert log_losses(y, p).mean() == pytest.approx(CALIBRATION["log_loss"], rel=1e-9)
    beta, bread = logistic(np.column_stack([np.ones(120), np.log(p/(1 - p))]), y)
    assert beta == pytest.approx([CALIBRATION["cox"]["intercept"], CALIBRATION["cox"]["slope"]], rel=1e-7)
    assert np.diag(bread)**0.5 == pytest.approx(CALIBRATION["cox"]["se"], rel=1e-7)


def test_wilson_interval_gives_the_textbook_value():
    assert wilson(0.7, 10, 1.959964) == pytest.approx((0.39678, 0.89221), abs=1e-5) # Brown, Cai and DasGupta (2001)


def test_the_reliability_curve_counts_days_and_not_rows():
    rng, trials, held = np.random.default_rng(4), 300, np.zeros(2)
    day = np.repeat(np.arange(20), 100)
    for _ in range(trials):
        y, p = (rng.random(2000) < rng.beta(3, 7, 20)[day]).astype(float), rng.random(2000) # Every group has the same true rate, 0.3
        bins = reliability(y, p, day, 0.9)
        naive = [wilson(b.rate, b.n, 1.645) for b in bins]
        held += np.mean([b.low <= 0.3 <= b.high for b in bins]), np.mean([low <= 0.3 <= high for low, high in naive])
    assert 0.87 < held[0]/trials < 0.94 and held[1]/trials < 0.8
    few = reliability(np.zeros(30), np.full(30, 0.1), np.repeat([0, 1, 2], 10), 0.9)[0] # Thirty rows on three days without a single one
    assert (few.n, few.rate, few.low) == (30, 0.0, 0.0) and few.high > 0.6
    alone = reliability(np.repeat([0.0, 1.0], 5), np.full(10, 0.5), np.zeros(10, dtype=int), 0.9)[0]
    assert (alone.low, alone.high) == (0.0, 1.0)


def test_a_calibrated_model_has_no_squared_error_on_average():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.6, (200, 1000))
    errors = [squared_error((rng.random(1000) < q).astype(float), q, np.arange(1000) % 20, 0.9).value for q in p]
    assert abs(np.mean(errors)) < 4*np.std(errors)/200**0.5 < 4e-4


def test_the_interval_over_days_covers_where_the_interval_over_rows_does_not():
    rng = np.random.default_rng(1)
    odds, storm = rng.normal(0, 1, 1_000_000), rng.normal(0, 1, 1_000_000)
    truth_p, a, b = sigmoid(odds + storm), sigmoid(odds), sigmoid(odds + 0.5)
    expected = lambda q: -(truth_p*np.log(q) + (1 - truth_p)*np.log(1 - q))
    truth = (expected(a) - expected(b)).mean()
    day, rows, trials, hits = np.repeat(np.arange(14), 50), np.arange(700), 600, np.zeros(2)
    for _ in range(trials):
        odds = rng.normal(0, 1, 700)
        y = (rng.random(700) < sigmoid(odds + rng.normal(0, 1, 14)[day])).astype(float)
        (u, psi_u), (v, psi_v) = influence("log_loss", y, sigmoid(odds)), influence("log_loss", y, sigmoid(odds + 0.5))
        both = [estimate(u - v, psi_u - psi_v, codes, 0.9) for codes in (day, rows)]
        hits += [e.low <= truth <= e.high for e in both]
    over_days, over_rows = hits/trials
    assert 0.9 - 3*(0.09/trials)**0.5 <= over_days <= 0.9 + 3*(0.09/trials)**0.5, over_days
    assert over_rows < 0.6, over_rows


def test_delong_covers_on_independent_rows():
    rng, trials, hits = np.random.default_rng(2), 600, 0
    y = np.repeat([1.0, 0.0], [60, 240])
    truth = ndtr(1.0/2**0.5) - ndtr(0.6/2**0.5)
    for _ in range(trials):
        shared, own = rng.normal(size=300), rng.normal(size=300)
        test = delong(y, shared + 1.0*y, 0.7*shared + 0.51**0.5*own + 0.6*y)
        hits += test["lo"] <= truth <= test["hi"]
    assert 0.95 - 3*(0.0475/trials)**0.5 <= hits/trials <= 0.95 + 3*(0.0475/trials)**0.5, hits/trials


def test_a_difference_of_detectable_size_is_found_four_times_in_five():
    rng, trials, found = np.random.default_rng(3), 1000, 0
    true = (1.7709 + 0.8702)/14**0.5 # t quantiles at 0.95 and 0.8 with 13 degrees of freedom
    for _ in range(trials):
        x = rng.normal(true, 1, 14)
        found += estimate(x.mean(), (x - x.mean())/14, np.arange(14), 0.9).low > 0
    assert 0.76 < found/trials < 0.84


def test_a_model_compared_with_itself_differs_by_exactly_nothing():
    y, a, _, day = toy()
    for e in evaluate(y, a, a, day).difference.values(): assert (e.value, e.low, e.high, e.detectable) == (0, 0, 0, 0)


def test_days_may_be_moments_dates_or_names():
    y, a, b, day = toy()
    moments = pd.Series(pd.Timestamp("2013-03-01T07:00Z") + pd.to_timedelta(day, "D"))
    one, two = evaluate(y, a, b, moments), evaluate(y, a, b, moments.dt.strftime("%Y-%m-%d"))
    assert one == two and one.by_day[0].day == "2013-03-01" and sum(d.n for d in one.by_day) == one.n


def test_input_from_pandas_counts_by_position_and_knows_missing():
    y, a, b, day = toy(100)
    label = pd.array(y, dtype="Int64")
    label[3] = pd.NA
    shuffled = np.random.default_rng(0).permutation(100)
    e = evaluate(pd.Series(label, index=shuffled), pd.Series(a, index=shuffled), pd.Series(b), pd.Series(day, index=shuffled))
    without = evaluate(*(np.delete(values, 3) for values in (y, a, b, day)))
    assert (e.n, e.unlabelled) == (99, 1) and e.candidate == without.candidate


def test_the_order_of_rows_does_not_matter():
    y, a, b, day = toy()
    order = np.random.default_rng(0).permutation(len(y))
    one, two = evaluate(y, a, b, day), evaluate(y[order], a[order], b[order], day[order])
    for metric in METRICS: assert as_json(one.difference[metric])["low"] == pytest.approx(two.difference[metric].low, abs=1e-12)
    assert one.calibration["squared_error"].high == pytest.approx(two.calibration["squared_error"].high, abs=1e-12)


@pytest.mark.parametrize("change", [
    lambda y, a, b, d: (y, np.where(np.arange(len(y)) == 5, np.nan, a), b, d), lambda y, a, b, d: (y, a, b*np.nan, d),
    lambda y, a, b, d: (y, a + 1, b, d), lambda y, a, b, d: (y, -a, b, d), lambda y, a, b, d: (y + 1, a, b, d),
    lambda y, a, b, d: (y, a[1:], b, d),
    lambda y, a, b, d: (y, a, b[1:], d), lambda y, a, b, d: (y, a, b, d[1:]), lambda y, a, b, d: (["late"]*len(y), a, b, d),
    lambda y, a, b, d: (y, a, b, np.where(d > 3, d, np.nan)),
    lambda y, a, b, d: (y, np.stack([a, a]), b, d), lambda y, a, b, d: (np.where(y == 1, np.inf, 0), a, b, d),
])
def test_no_number_comes_from_input_that_is_not_one(change):
    with pytest.raises(DataError) as e: evaluate(*change(*toy(50)))
    assert e.value.cure


@pytest.mark.parametrize("y, a, b, day", [
    (np.zeros(40), np.full(40, 0.3), np.full(40, 0.2), np.arange(40) % 5),
    (np.arange(40) % 2, np.full(40, 0.3), np.full(40, 0.2), np.arange(40) % 5),
    (np.arange(40) % 2, (np.arange(40) % 2)*1.0, np.full(40, 0.0), np.arange(40) % 5),
    ([1], [0.5], [0.4], ["a"]), ([1, 0], [0.5, 1], [0.4, 0], ["a", "a"]),
    ([np.nan]*9, [0.5]*9, [0.4]*9, range(9)), ([], [], [], []), ([0, 0, 1], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1], ["a", "b", "c"]),
])
def test_degenerate_data_gives_absence_and_never_nan(y, a, b, day):
    e = evaluate(y, a, b, day)
    text = json.dumps(as_json(e), allow_nan=False)
    assert from_json(Evaluation, json.loads(text)) == e and isinstance(e._repr_markdown_(), str)
    assert 0 < sum(np.nan_to_num(np.asarray(y, float))) < e.n or "auc" not in e.candidate


def test_without_a_rival_there_is_no_difference():
    y, a, _, day = toy(100)
    e = evaluate(y, a, None, day)
    assert e.rival_name == "none" and e.difference == {} == e.rival and e.by_day[0].rival is None and set(e.candidate) == set(METRICS)


def test_the_base_rate_is_that_of_known_training_labels():
    assert list(base_rate(pd.Series([1, 0, None, 0, 0]), 2)) == [0.25, 0.25]
    y, a, _, day = toy(400)
    e = evaluate(y, a, base_rate(y, 400), day, rival_name="base rate")
    assert e.rival["auc"].value == 0.5 and e.difference["auc"].value == pytest.approx(0.5 - e.candidate["auc"].value)
    with pytest.raises(DataError, match="no training label"): base_rate(pd.Series([None, None]), 2)


def test_a_perfect_split_and_a_constant_score_have_no_calibration_line():
    y, a, _, day = toy(100)
    assert cox(y, y*0.8 + 0.1, day, 0.9) == {} and cox(y, a*0 + 0.5, day, 0.9) == {} and cox(y*0, a, day, 0.9) == {}


def test_three_hundred_thousand_rows_are_evaluated_in_a_moment():
    y, a, b, day = toy(300_000, 365)
    start = process_time()
    e = evaluate(y, a, b, day)
    assert e.n == 300_000 and process_time() - start < 2 # About 0.4 s; the bound leaves room for a slow machine


def test_an_evaluation_is_frozen():
    y, a, b, day = toy(100)
    e = evaluate(y, a, b, day)
    with pytest.raises(AttributeError): e.n = 0
    assert replace(e, level=0.8) != e


def test_more_days_than_a_picture_holds_share_places_and_no_row_is_lost():
    from retrain_nb.services import figures
    rng, n = np.random.default_rng(0), 2600
    y, score, days = (rng.random(n) < 0.3).astype(float), rng.uniform(0.1, 0.6, n), pd.Series(pd.date_range("1990-01-01", periods=n, tz="UTC"))
    dated, named = (evaluate(y, score, np.full(n, 0.3), when) for when in (days, days.dt.strftime("d%Y%m%d")))
    assert dated.days == n and len(dated.by_day) == 867 and sum(d.n for d in dated.by_day) == n and dated.by_day[1].day == "1990-01-04"
    assert dated.difference == named.difference and named.by_day == () # The evidence counts single days
    assert "of 867 stretches of days" in figures.daily(dated).finding and "not drawn for each of 2,600 clusters" in figures.daily(named).finding
