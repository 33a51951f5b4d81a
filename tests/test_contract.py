"Contract: what a lesson should not have to show"
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retrain_nb.demo
from retrain_nb.records import FAIL, INSUFFICIENT, OUTCOMES, PASS, SettingsError
from retrain_nb.stages.contract import SHOWN, check_contract, parse_contract

AS_OF = datetime(2024, 3, 1, tzinfo=UTC)
HEAD = 'version = "1"\n[table]\nkey = "id"\ntime = "at"\nmax_age_days = 2\n'
RULES = """
[columns.x]
kind = "number"
max_missing = 0.25
min = 0
max = 10
[columns.c]
kind = "text"
categories = ["a", "b"]
[columns.d]
kind = "text"
max_categories = 3
[columns.y]
kind = "flag"
max_missing = 0.5
[columns.secret]
kind = "text"
tag = "personal"
categories = ["s0", "s1"]
"""
contract = parse_contract(HEAD + RULES)


def frame(n=8):
    return pd.DataFrame({"id": [f"i{i}" for i in range(n)], "at": pd.date_range("2024-02-28T12:00Z", periods=n, freq="h", unit="us"),
                         "x": np.linspace(0, 10, n), "c": pd.Categorical(["a", "b"]*(n//2)), "d": ["p", "q"]*(n//2), "y": [0, 1]*(n//2),
                         "secret": ["s0", "s1"]*(n//2)})


def parts(rows, rules=contract):
    checked = check_contract(rows, rules, AS_OF)
    return {part.name: part for part in checked.verdict.parts}, checked


def test_rows_that_keep_it_pass_with_one_line_for_all_columns():
    found, checked = parts(frame())
    assert checked.verdict.outcome == PASS and len(checked.offending) == 0
    assert list(found) == ["rows", "key", "time", "freshness", "columns"]
    assert "5 columns keep all of their 12 promises" in found["columns"].reason


BREAKS = {
    "key": lambda f: f.assign(id="same"),
    "id.kind": lambda f: f.drop(columns="id"),
    "id.kind ": lambda f: f.assign(id=[["a", i] for i in range(len(f))]),
    "at.kind": lambda f: f.assign(at=f["at"].dt.tz_localize(None)),
    "time": lambda f: f.assign(at=[None, *f["at"][1:]]),
    "freshness": lambda f: f.assign(at=f["at"] - pd.Timedelta("30D")),
    "x.missing": lambda f: f.assign(x=np.nan),
    "x.range": lambda f: f.assign(x=f.x - 1),
    "x.kind": lambda f: f.assign(x="5"),
    "c.categories": lambda f: f.assign(c=pd.Categorical(["z"]*len(f))),
    "c.kind": lambda f: f.assign(c=pd.Categorical([1]*len(f))),
    "d.max_categories": lambda f: f.assign(d=[f"d{i}" for i in range(len(f))]),
    "d.kind": lambda f: f.rename(columns={"d": "D"}),
    "y.flag": lambda f: f.assign(y=2),
    "y.kind": lambda f: pd.concat([f, f[["y"]]], axis=1),
    "secret.categories": lambda f: f.assign(secret="Jane Doe"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_broken_promise_has_a_part_of_its_own_name(name):
    found, checked = parts(BREAKS[name](frame()))
    name = name.strip()
    assert found[name].outcome == FAIL
    assert [n for n, p in found.items() if p.outcome == FAIL] == [name]
    assert checked.verdict.outcome == FAIL


def test_rows_from_the_future_fail_and_a_row_at_as_of_does_not():
    rows = frame()
    assert parts(rows.assign(at=rows["at"].where(rows.index > 0, AS_OF)))[0]["time"].outcome == PASS
    found, checked = parts(rows.assign(at=rows["at"].where(rows.index > 0, pd.Timestamp("2024-03-01T00:00:01Z"))))
    assert found["time"].outcome == FAIL and checked.offending.rule.tolist() == ["time"]


def test_an_infinite_number_is_out_of_every_range_and_the_verdict_stays_json():
    loose = parse_contract(HEAD + '[columns.x]\nkind = "number"')
    found, _ = parts(frame().assign(x=[np.inf, -np.inf, *range(6)]), loose)
    assert found["x.range"].outcome == FAIL and found["x.range"].value == 2
    assert "2 of 8 rows are infinite" in found["x.range"].reason


def test_a_column_in_order_up_to_its_bounds_is_in_order():
    assert parts(frame().assign(x=[0, 10]*4))[1].verdict.outcome == PASS
    assert parts(frame().assign(x=[0.0, np.nan, np.nan, *[10.0]*5]))[1].verdict.outcome == PASS
    assert parts(frame().assign(x=[0.0, np.nan, np.nan, np.nan, *[10.0]*4]))[0]["x.missing"].value == pytest.approx(0.375)


def test_no_value_of_a_personal_column_is_shown_anywhere():
    rows = frame().assign(secret=[f"Jane Doe {i}" for i in range(8)], x=-1.0)
    checked = check_contract(rows, contract, AS_OF)
    assert "Jane" not in str(checked.verdict) + checked.offending.to_csv()
    assert set(checked.offending.secret) == {"•••"}
    personal_key = parse_contract((HEAD + RULES).replace('tag = "personal"', "") + '[columns.id]\nkind = "text"\ntag = "personal"')
    assert "i3" not in check_contract(rows, personal_key, AS_OF).offending.to_csv()


def test_a_forbidden_column_fails_by_being_there():
    rules = parse_contract(HEAD + '[columns.ssn]\nkind = "text"\ntag = "forbidden"')
    assert parts(frame(), rules)[1].verdict.outcome == PASS
    found, checked = parts(frame().assign(ssn="123"), rules)
    assert found["ssn.forbidden"].outcome == FAIL and "ssn" not in checked.offending


def test_a_column_under_another_name_fails_and_the_nearest_name_is_given():
    rules = parse_contract(HEAD + '[columns.load]\nkind = "number"\n[columns.c]\nkind = "text"')
    reason = parts(frame().assign(loads=1.0, c=1), rules)[1].verdict.reason
    assert "load.kind: there is no such column; the nearest name is `loads`" in reason
    assert "c.kind: it holds number (int64), wanted is text" in reason


def test_offending_rows_are_bounded_and_say_how_many_there_are():
    rows = frame(200).assign(x=-1.0, y=3)
    checked = check_contract(rows, contract, AS_OF.replace(month=3, day=8))
    assert len(checked.offending) <= SHOWN and set(checked.offending["rows"]) == {200}
    assert list(checked.offending.columns[:2]) == ["rule", "rows"]


def test_no_rows_and_too_few_are_insufficient():
    assert parts(frame()[:0])[1].verdict.outcome == INSUFFICIENT
    assert parts(pd.DataFrame())[1].verdict.outcome == INSUFFICIENT
    few = parse_contract((HEAD + RULES).replace("max_age_days", "min_rows = 9\nmax_age_days"))
    assert parts(frame(), few)[0]["rows"].outcome == INSUFFICIENT


def test_a_check_that_crashes_is_insufficient_and_says_nothing_of_the_values():
    class Sly(pd.DataFrame):
        def __getitem__(self, key): raise KeyError("Jane")
    found, checked = parts(Sly(frame()))
    assert checked.verdict.outcome == INSUFFICIENT and "Jane" not in str(checked.verdict)
    assert found["check"].reason == "the check crashed with KeyError"


def test_the_callers_frame_is_left_alone():
    rows = frame()
    before = rows.copy(deep=True)
    check_contract(rows, contract, AS_OF)
    pd.testing.assert_frame_equal(rows, before)


values = st.one_of(st.none(), st.integers(-5, 15), st.floats(), st.text(max_size=3), st.booleans(), st.just(pd.NaT), st.just(pd.Timestamp("2024-02-29T00:00Z")))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(*[values]*7), max_size=6), st.booleans())
def test_whatever_comes_in_a_verdict_comes_out(rows, category):
    wild = pd.DataFrame(rows, columns=["id", "at", "x", "c", "d", "y", "secret"])
    if category and len(wild):
        wild = wild.astype({"c": "category", "secret": "category"})
    checked = check_contract(wild, contract, AS_OF)
    assert checked.verdict.outcome in OUTCOMES and len(checked.offending) <= SHOWN
    assert checked.verdict.outcome != PASS or len(rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-3, 13), st.sampled_from([np.inf, -np.inf, 0.0, 10.0])), min_size=1, max_size=30))
def test_counts_are_those_of_a_slow_and_obvious_count(numbers):
    rules = parse_contract(HEAD.replace("max_age_days = 2", "") + '[columns.x]\nkind = "number"\nmax_missing = 0.2\nmin = 0\nmax = 10')
    rows = pd.DataFrame({"id": range(len(numbers)), "at": pd.Timestamp("2024-02-29T00:00Z"), "x": pd.Series(numbers, dtype="float64")})
    found, _ = parts(rows, rules)
    outside = sum(1 for v in numbers if v is not None and not 0 <= v <= 10)
    missing = sum(1 for v in numbers if v is None)/len(numbers)
    assert ("x.range" in found) == (outside > 0) and (not outside or found["x.range"].value == outside)
    assert ("x.missing" in found) == (missing > 0.2) and (missing <= 0.2 or found["x.missing"].value == pytest.approx(missing))


MISTAKES = {
    "[table] ky: unknown; did you mean `key`?": ('key = "id"', 'ky = "id"'),
    "[table] key: missing": ('key = "id"', ""),
    "[columns.x] mni: unknown; did you mean `min`?": ("min = 0", "mni = 0"),
    "[columns.x] min: found '0'; Input should be a valid number": ("min = 0", 'min = "0"'),
    "[columns.x] max_missing: found 25; Input should be less than or equal to 1": ("max_missing = 0.25", "max_missing = 25"),
    "[columns.c]: `min` and `max` are for numbers": ('["a", "b"]', '["a", "b"]\nmin = 0'),
    "[columns.y]: `categories` and `max_categories` are for texts": ("max_missing = 0.5", "max_categories = 5"),
    "[columns.secret] tag: found 'private'; Input should be '', 'personal', 'granted' or 'forbidden'": ('"personal"', '"private"'),
    "[columns.c] categories.1: found 7; Input should be a valid string": ('["a", "b"]', '["a", 7]'),
    "colums: unknown; did you mean `columns`?": ("[columns.x]", "[colums.x]"),
    "[table]: found 3; ": (HEAD, 'version = "1"\ntable = 3\n'),
    "is not TOML": ("[table]", "[table"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_in_the_contract_is_named_with_its_place(message):
    with pytest.raises(SettingsError) as error:
        parse_contract((HEAD + RULES).replace(*MISTAKES[message]))
    assert message in str(error.value)


def test_all_mistakes_come_at_once():
    with pytest.raises(SettingsError, match="3 mistake"):
        parse_contract((HEAD + RULES).replace("min = 0", "mni = 0").replace('"personal"', '"x"').replace('version = "1"', "version = 1"))


@pytest.mark.parametrize("demo", ["flights", "toy"])
def test_the_shipped_contracts_can_be_read(demo):
    path = Path(list(retrain_nb.demo.__path__)[0])/f"{demo}_contract.toml"
    assert parse_contract(path.read_text(encoding="utf-8")).table.min_rows > 1
