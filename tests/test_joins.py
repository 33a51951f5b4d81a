"Point-in-time joins against an oracle that is slow and obvious"
import time as clock
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.records import DataError, SettingsError
from retrain_nb.stages.joins import Facts, join_facts, join_sources, last_known

START = pd.Timestamp("2024-03-30T22:00Z") # An hour of the spring changeover lies in the range
hour = st.integers(0, 9)
who = st.sampled_from(["a", "a", "a", "b", None])
fact = st.tuples(who, st.sampled_from([1, 1, 1, 2]), st.integers(0, 4), st.one_of(st.none(), hour), st.one_of(st.none(), st.integers(0, 5)))
asked = st.tuples(who, st.sampled_from([1, 1, 1, 2]), hour)


def moments(hours):
    return pd.to_datetime(pd.Series([pd.NaT if h is None else START + pd.Timedelta(hours=h) for h in hours], dtype="datetime64[us, UTC]"))


def facts_of(values):
    e, k, t, n, v = zip(*values) if values else ((), (), (), (), ())
    return pd.DataFrame({"e": pd.Series(e, dtype=object), "k": pd.Series(k, dtype="int64"), "event_time": moments(t), "known_at": moments(n),
                         "v": pd.Series(v, dtype="float64"), "place": pd.Series([f"{t}-{n}-{v}" for t, n, v in zip(t, n, v)], dtype=object)})


def rows_of(values):
    e, k, t = zip(*values)
    return pd.DataFrame({"e": np.array(e, dtype=object), "k": k, "due": moments(t).array}, index=pd.Index(range(10, 10 + len(e))))


def agreeing(values): # Without those that contradict an earlier one
    seen = {}
    return [f for f in values if seen.setdefault(f[:4], f[4]) == f[4] or f[0] is None or f[3] is None]


def oracle(rows, facts, lag, max_age, as_of):
    "Look at every fact for every row"
    out = []
    for e, k, due in rows:
        moment = due if as_of is None else as_of
        best = None
        for fe, fk, ft, fn, v in facts:
            if e is None or fe is None or (fe, fk) != (e, k) or fn is None: continue
            if ft > due - lag or fn > moment: continue
            if best is None or (ft, fn) > best[:2]: best = (ft, fn, v)
        if best is not None and max_age is not None and due - best[0] > max_age: best = None
        out.append(best)
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(asked, min_size=1, max_size=8), st.lists(fact, max_size=14), st.integers(0, 2), st.one_of(st.none(), st.integers(2, 5)),
       st.one_of(st.none(), hour), st.randoms())
def test_every_row_gets_what_the_oracle_says_in_whatever_order_and_how_often_facts_arrive(rows, facts, lag, max_age, as_of, random):
    facts = agreeing(facts)
    rules = Facts("toy", ("e", "k"), ("v", "place"), timedelta(hours=lag), None if max_age is None else timedelta(hours=max_age), age="old")
    moment = None if as_of is None else (START + pd.Timedelta(hours=as_of)).to_pydatetime()
    expected = oracle(rows, facts, lag, max_age, as_of)
    arrived = facts + [f for f in facts if random.random() < 0.5]
    random.shuffle(arrived)
    frame = facts_of(arrived)
    frame.index = pd.Index(np.zeros(len(frame), dtype=int)) # An index says nothing
    for feed in (facts_of(facts), frame):
        found = join_facts(rows_of(rows), "due", rules, feed, moment)
        assert found.index.tolist() == list(range(10, 10 + len(rows)))
        for best, v, place, old, due in zip(expected, found.v, found.place, found.old, [r[2] for r in rows]):
            if best is None: assert np.isnan(v) and pd.isna(place) and np.isnan(old)
            else:
                assert place == f"{best[0]}-{best[1]}-{best[2]}" and old == due - best[0]
                assert (np.isnan(v) and best[2] is None) or v == best[2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40), st.lists(st.tuples(st.integers(-1, 39), st.integers(-1, 21)), min_size=1, max_size=20))
def test_going_left_finds_the_first_that_was_known(known, asked):
    asked = [(min(last, len(known) - 1), moment) for last, moment in asked]
    found = last_known(np.array(known, dtype="int64"), *(np.array(column, dtype="int64") for column in zip(*asked)))
    assert found.tolist() == [max((i for i in range(last + 1) if known[i] <= moment), default=-1) for last, moment in asked]


@settings(max_examples=60, deadline=None)
@given(st.lists(asked, min_size=1, max_size=6), st.lists(fact, max_size=10), st.lists(fact, max_size=6), hour)
def test_what_is_learned_later_changes_nothing_before(rows, facts, later, cut):
    later = [(e, k, t, None if n is None else cut + 1 + n, v) for e, k, t, n, v in later]
    rows = [(e, k, min(t, cut)) for e, k, t in rows]
    both = agreeing(facts + later)
    rules = Facts("toy", ("e", "k"), ("v", "place"))
    pd.testing.assert_frame_equal(join_facts(rows_of(rows), "due", rules, facts_of(agreeing(facts))), join_facts(rows_of(rows), "due", rules, facts_of(both)))


FACTS = [("a", 1, 1, 2, 5)]
ROWS = rows_of([("a", 1, 5), ("b", 1, 5)])
RULES = Facts("toy", ("e", "k"), ("v",))


def test_no_source_at_all_no_facts_and_no_rows():
    pd.testing.assert_frame_equal(join_sources(ROWS, "due", []), ROWS)
    assert join_facts(ROWS, "due", RULES, facts_of([])).v.isna().all()
    assert len(join_facts(ROWS[:0], "due", RULES, facts_of(FACTS))) == 0


@pytest.mark.parametrize("kind, given", [("int32", "Int64"), ("uint8", "UInt64"), ("bool", "boolean"), ("category", "category"), ("float32", "float32")])
def test_the_type_of_a_column_does_not_depend_on_what_is_missing(kind, given):
    frame = facts_of(FACTS).astype({"v": kind})
    for rows in (ROWS[:1], ROWS): assert str(join_facts(rows, "due", RULES, frame).v.dtype) == given


def test_zones_may_differ_and_clocks_may_be_finer():
    there = facts_of(FACTS).assign(event_time=lambda f: f.event_time.dt.tz_convert("America/New_York"), known_at=lambda f: f.known_at.dt.as_unit("ns"))
    assert join_facts(ROWS, "due", RULES, there).v.tolist()[0] == 5
    just_after = there.assign(known_at=[ROWS.due.iloc[0].as_unit("ns") + pd.Timedelta(1, "ns")])
    assert join_facts(ROWS, "due", RULES, just_after).v.isna().all() # A nanosecond too late is too late


@pytest.mark.parametrize("change, said", [
    (lambda f: f.assign(known_at=f.known_at.dt.tz_localize(None)), "`known_at` of the facts of `toy` is datetime64"),
    (lambda f: f.assign(event_time="2024-03-30"), "not a time with a zone"),
    (lambda f: f.assign(event_time=moments([None])), "1 facts of `toy` have no `event_time`"),
    (lambda f: f.drop(columns="v"), "have no column `v`"),
    (lambda f: f.drop(columns="k"), "have no column `k`"),
    (lambda f: f.assign(k="1"), "nothing would match"),
    (lambda f: pd.concat([f, f.assign(v=6)]), "1 facts of `toy` contradict"),
    (lambda f: f.assign(event_time=pd.Timestamp("3000-01-01", tz="UTC").as_unit("us")), "Mend it in the source"),
])
def test_facts_that_cannot_be_joined_are_refused_by_name(change, said):
    with pytest.raises(DataError, match=said): join_facts(ROWS, "due", RULES, change(facts_of(FACTS)))


def test_rows_and_moments_that_cannot_be_joined_are_refused_by_name():
    with pytest.raises(DataError, match="1 rows have no `due`"): join_facts(ROWS.assign(due=ROWS.due.where(ROWS.e == 'a')), "due", RULES, facts_of(FACTS))
    with pytest.raises(DataError, match="has no time zone"): join_facts(ROWS, "due", RULES, facts_of(FACTS), pd.Timestamp("2024-01-01"))
    with pytest.raises(DataError, match="have `v` already"): join_facts(ROWS.assign(v=1), "due", RULES, facts_of(FACTS))
    with pytest.raises(SettingsError, match="gives no column"): Facts("toy", ("e",), ())


def test_a_contradiction_shows_no_value():
    secret = facts_of(FACTS).assign(v="4111 1111 1111 1111", e="Ada Lovelace")
    with pytest.raises(DataError) as refused: join_facts(ROWS, "due", RULES, pd.concat([secret, secret.assign(v="other")]))
    assert "4111" not in str(refused.value) and "Lovelace" not in str(refused.value)


def test_facts_that_all_arrive_late_cost_no_more_than_a_logarithm():
    def took(n): # The worst case of going left one by one: nothing of the past was known yet
        times = START + pd.to_timedelta(np.arange(n), unit="s")
        frame = pd.DataFrame({"event_time": times, "known_at": times + pd.Timedelta(seconds=n), "v": 1})
        rows = pd.DataFrame({"due": times + pd.Timedelta(seconds=n // 2)})
        started = clock.process_time()
        found = join_facts(rows, "due", Facts("late", (), ("v",)), frame)
        assert found.v.isna().sum() == n // 2
        return clock.process_time() - started
    assert min(took(100_000) for _ in range(2)) < 30*max(min(took(10_000) for _ in range(3)), 0.005)
