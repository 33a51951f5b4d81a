"Stand-ins for late and missing readings: the same as a slow and obvious program, and blind to what came later"
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.records import FAIL, INSUFFICIENT, PASS, DataError, SettingsError
from retrain_nb.settings import parse_settings, policy, steps
from retrain_nb.stages.fallbacks import HOWS, fallback_shares, fill, signals

START = pd.Timestamp("2024-01-01T00:00Z")
MINIMAL = "[workbench]\nname = x\n[source]\nrows = a:b\nkey = k\ntime = t\nlabel = y\nlabel_time = u\n[features]\nview = a:v\n[gates]\nmargins = auc 0.1\n"
LADDERS = ["observed 2m", "observed, last 5m", "observed 1m, wait 3m, last 9m", "observed, wait 4m, interpolate 6m, last 2m, median 3",
           "observed 1m, last 3m, wait 5m, interpolate 9m", "observed, median 2, wait 9m, interpolate 4m, last 1m", "observed 1m, wait 2m, interpolate 20m, estimate f, missing"]


def minutes(numbers): return pd.Series(START + pd.to_timedelta(np.asarray(numbers, dtype="int64"), unit="m"))


def world(seed, n, m, span=20): # Readings and questions on whole minutes, so that ties and corrections are common
    rng = np.random.default_rng(seed)
    event = rng.integers(0, span, n)
    known = event + rng.integers(0, 8, n)*(rng.random(n) < 0.7)
    value = np.where(rng.random(n) < 0.1, np.nan, rng.integers(0, 9, n))
    readings = pd.DataFrame({"entity": rng.choice(list("ab"), n), "event_time": minutes(event), "known_at": minutes(known), "value": value})
    return readings, pd.DataFrame({"entity": rng.choice(list("abc"), m), "moment": minutes(rng.integers(0, span, m))})


def slow(readings, asked, ladder, as_of, estimate): # By definition, one question at a time
    rows = sorted({(r.event_time, r.known_at, r.value, r.entity) for r in readings.itertuples() if r.known_at <= as_of and r.value == r.value})
    found, minute = [], lambda x: pd.Timedelta(seconds=x)
    for who, moment in zip(asked.entity, asked.moment):
        wait, answer = pd.Timedelta(0), (np.nan, "missing", pd.NaT)
        for step in ladder:
            if step.how == "wait": wait = minute(step.amount)
            seen = [r for r in rows if r[3] == who and r[1] <= moment + wait]
            past, later = [r for r in seen if r[0] <= moment], [r for r in seen if r[0] > moment]
            old = moment - past[-1][0] if past else None
            if step.how in ("observed", "wait", "last") and past and old <= minute(step.amount if step.how == "last" else ladder[0].amount):
                answer = (past[-1][2], HOWS[step.how], old)
            if step.how == "interpolate" and past and later:
                first = [r for r in later if r[0] == later[0][0]][-1]
                gap = first[0] - past[-1][0]
                if gap <= minute(step.amount): answer = (past[-1][2] + old/gap*(first[2] - past[-1][2]), HOWS[step.how], old)
            if step.how == "median" and past:
                last = sorted(past, key=lambda r: (max(r[0], r[1] - wait), r[:3]))[-int(step.amount):]
                answer = (float(np.median([r[2] for r in last])), HOWS[step.how], moment - min(r[0] for r in last))
            if step.how == "estimate": answer = (estimate, HOWS[step.how], pd.NaT)
            if answer[1] != "missing": break
        found.append(answer)
    return pd.DataFrame(found, columns=["value", "how", "age"], index=asked.index)


def same(a, b):
    assert a.how.astype(str).tolist() == b.how.tolist()
    assert np.allclose(a.value, b.value.astype(float), equal_nan=True)
    assert [None if x is pd.NaT else x for x in a.age] == [None if x is pd.NaT else x for x in b.age]


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 25), st.sampled_from(LADDERS), st.integers(20, 30))
def test_the_same_as_a_slow_and_obvious_program(seed, n, m, line, end):
    (readings, asked), ladder, as_of = world(seed, n, m), steps(line), START + pd.Timedelta(minutes=end)
    same(fill(readings, asked, ladder, as_of, {"f": lambda rows: np.full(len(rows), 7.0)}), slow(readings, asked, ladder, as_of, 7.0))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(LADDERS), st.integers(0, 30))
def test_what_becomes_known_later_changes_nothing_and_order_and_copies_neither(seed, line, end):
    readings, asked = world(seed, 60, 40)
    ladder, as_of, give = steps(line), START + pd.Timedelta(minutes=end), {"f": lambda rows: np.zeros(len(rows))}
    asked = asked[asked.moment <= as_of]
    before = fill(readings[readings.known_at <= as_of], asked, ladder, as_of, give)
    more = readings.assign(value=readings.value.where(readings.known_at <= as_of, 1e9))
    pd.testing.assert_frame_equal(fill(pd.concat([more, more]).sample(frac=1, random_state=seed % 99), asked, ladder, as_of, give), before)
    wait = pd.Timedelta(seconds=max([s.amount for s in ladder if s.how == "wait"], default=0))
    settled = asked[asked.moment + wait <= as_of] # Whoever had waited long enough sees the same ever after
    pd.testing.assert_frame_equal(fill(readings, settled, ladder, START + pd.Timedelta("9D"), give), before.loc[settled.index])


def test_nothing_is_drawn_beyond_the_last_reading():
    readings = pd.DataFrame({"entity": "a", "event_time": minutes([0, 10]), "known_at": minutes([0, 10]), "value": [0.0, 10.0]})
    asked = pd.DataFrame({"entity": "a", "moment": minutes([5, 10, 12])})
    found = fill(readings, asked, steps("observed, wait 1h, interpolate 1h"), START + pd.Timedelta("1D"))
    assert found.how.tolist() == ["interpolated", "observed", "missing"] and found.value.iloc[0] == 5


def test_moments_may_come_in_any_unit_and_finer_than_a_microsecond_is_cut():
    readings = pd.DataFrame({"entity": ["a"], "event_time": minutes([0]).dt.as_unit("s"), "known_at": minutes([0]).dt.as_unit("ns"), "value": [1]})
    asked = pd.DataFrame({"entity": ["a"], "moment": minutes([1]).dt.as_unit("ms")})
    assert fill(readings, asked, steps("observed 1m"), START + pd.Timedelta("1D")).how.tolist() == ["observed"]


@pytest.mark.parametrize("change, words", [
    (lambda r, a: (r.drop(columns="known_at"), a), "no column `known_at`"), (lambda r, a: (r, a.drop(columns="entity")), "no column `entity`"),
    (lambda r, a: (r.assign(known_at=r.known_at.dt.tz_localize(None)), a), "not a time in UTC"),
    (lambda r, a: (r.assign(event_time=r.event_time.where(r.event_time > START)), a), "are missing"),
    (lambda r, a: (r, a.assign(moment=a.moment + pd.Timedelta("9D"))), "the future is not known")])
def test_bad_input_is_named(change, words):
    readings = pd.DataFrame({"entity": "a", "event_time": minutes([0, 10]), "known_at": minutes([0, 10]), "value": [0.0, 10.0]})
    asked = pd.DataFrame({"entity": "a", "moment": minutes([5])})
    with pytest.raises(DataError, match=words): fill(*change(readings, asked), steps("observed"), START + pd.Timedelta("1D"))


def test_limits_are_held_and_silence_is_no_pass():
    how = ["observed"]*90 + ["last known"]*10
    assert fallback_shares("x", how, steps("observed, last 1h at most 10%")).outcome == PASS
    assert fallback_shares("x", how, steps("observed, last 1h at most 9.9%")).outcome == FAIL
    assert fallback_shares("x", how + [None], steps("observed, last 1h, missing at most 0%")).outcome == FAIL
    assert fallback_shares("x", how + ["guessed"], steps("observed, missing at most 50%")).outcome == FAIL
    assert fallback_shares("x", how, steps("observed, last 1h")).outcome == INSUFFICIENT
    assert fallback_shares("x", [], steps("observed, missing at most 1%")).outcome == INSUFFICIENT
    frame = pd.DataFrame({"Wind_how": how})
    assert signals(frame, {"wind": "observed, last 1h at most 20%"}).outcome == PASS # Names in the settings are in small letters
    assert signals(frame, {"wind": "observed, last 1h at most 20%", "rain": "observed, missing at most 1%"}).outcome == INSUFFICIENT


def test_settings_declare_ladders_and_they_are_part_of_the_policy():
    line = "observed 1h, wait 10m, interpolate 3h, last 6h at most 10%, missing at most 1%"
    read = parse_settings(MINIMAL + f"[signals]\nwind_speed = {line}\n")
    assert read.signals == {"wind_speed": line} and policy(read)["signals"] == read.signals
    assert parse_settings(MINIMAL).signals == {}
    for wrong in ("", "last 5m", "observed 1h, observed 2h", "observed, missing, last 1h", "observed 1h, last 6", "observed, last 1h at most many"):
        with pytest.raises(SettingsError, match=r"\[signals\] wind"): parse_settings(MINIMAL + f"[signals]\nwind = {wrong}\n")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(LADDERS))
def test_many_entities_over_a_very_long_time_are_found_as_well(seed, line):
    (readings, asked), far = world(seed, 30, 20), [pd.Timestamp("1700-01-01T00:00Z"), pd.Timestamp("2250-01-01T00:00Z")]
    names = pd.DataFrame({"entity": [f"n{i}" for i in range(1000)], "event_time": far[0], "known_at": far[1], "value": 1.0})
    for frame in (names, readings): frame[["event_time", "known_at"]] = frame[["event_time", "known_at"]].astype("datetime64[us, UTC]")
    both = pd.concat([names, readings], ignore_index=True)
    give = {"f": lambda rows: np.zeros(len(rows))}
    pd.testing.assert_frame_equal(fill(both, asked, steps(line), far[1], give), fill(readings, asked, steps(line), far[1], give))


def test_a_million_values_take_seconds():
    rng, n = np.random.default_rng(0), 1_000_000
    event = np.sort(rng.integers(0, 10**9, n))
    readings = pd.DataFrame({"entity": rng.integers(0, 500, n), "event_time": pd.Series(START + pd.to_timedelta(event, unit="ms")), "value": rng.normal(size=n)})
    readings["known_at"] = readings.event_time + pd.to_timedelta(rng.exponential(600, n), unit="s")
    asked = pd.DataFrame({"entity": rng.integers(0, 500, n), "moment": readings.event_time.sample(frac=1, random_state=0).reset_index(drop=True)})
    start = time.process_time()
    found = fill(readings, asked, steps("observed 2m, wait 5m, interpolate 15m, last 1h, median 9"), START + pd.Timedelta("30D"))
    assert time.process_time() - start < 15 # A loop over rows takes minutes
    assert len(found) == n and found.how.nunique() >= 5
