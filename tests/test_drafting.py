"A drafted contract: the rows it came from keep it, rows that broke lose it, and it gives nobody away"
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.promises import parse_contract
from retrain_nb.records import FAIL, PASS, DataError
from retrain_nb.stages.contract import check_contract
from retrain_nb.stages.drafting import Names, bounds, draft_contract, rounded

NAMES, NOW = Names(key="id", time="at", label="y", label_time="known"), datetime(2024, 6, 1, tzinfo=UTC)


def rows(n=500, **columns):
    rng = np.random.default_rng(1)
    at = pd.Series(pd.date_range("2024-01-01", periods=n, freq=f"{150*1440//n}min", tz="UTC", unit="us"))
    return pd.DataFrame({"id": [f"i{i}" for i in range(n)], "at": at, "y": rng.integers(0, 2, n).astype("float64"), "known": at + pd.Timedelta("1h"), **columns})


def check(frame, text, now=NOW): return check_contract(frame, parse_contract(text), now).verdict


rng = np.random.default_rng(0)
COLUMNS = {
    "number": rng.normal(size=500), "trend": np.arange(500.0), "constant": [3.0]*500, "zero": [0.0]*500, "huge": rng.normal(size=500)*1e300, "tiny": rng.normal(size=500)*1e-300,
    "missing": [None]*500, "half": [None, 1.5]*250, "flag": [True, False]*250, "text": rng.choice(list("abc"), 500), "ids": [f"u{i}" for i in range(500)], "mixed": [1, "a"]*250,
    "category": pd.Categorical(rng.choice(["x", "y", None], 500)), "many": [f"c{i % 200}" for i in range(500)], "lists": [[1]]*500, "when": pd.date_range("2024-01-01", periods=500, freq="h", tz="UTC"),
    "naive": pd.date_range("2024-01-01", periods=500, freq="h"), "berlin": pd.date_range("2024-01-01", periods=500, freq="h", tz="Europe/Berlin"), "infinite": [np.inf, 1.0]*250, "quote \" and \\ and \n": [1.0]*500,
    "emp.var.rate": rng.normal(size=500), "": [1]*500, "numbers of categories": pd.Categorical([1, 2]*250), "Int64": pd.array([1, None]*250, dtype="Int64"), "emoji 😀": ["😀", "é"]*250}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_kind_keeps_what_is_drafted_for_it(name):
    frame = rows(**{name: COLUMNS[name]})
    text = draft_contract(frame, NAMES, NOW)
    verdict = check(frame, text)
    assert verdict.outcome == (FAIL if name == "infinite" else PASS), verdict.reason # Infinite is in no order, and the draft says so
    assert ("not under contract" in text) == (name in ("missing", "mixed", "lists", "naive", "berlin", "numbers of categories"))


VALUES = st.one_of(st.none(), st.floats(allow_infinity=False), st.integers(-10**12, 10**12), st.text(max_size=3), st.booleans())


@given(st.lists(VALUES, min_size=1, max_size=40), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_whatever_the_values_the_rows_keep_their_draft(values, seed):
    frame = rows(len(values), x=pd.Series(values, dtype=object))
    assert check(frame, draft_contract(frame, NAMES, NOW)).outcome == PASS


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300), st.booleans())
def test_rounding_never_crosses_over(x, up):
    assert rounded(x, up) >= x - abs(x)*1e-11 if up else rounded(x, up) <= x + abs(x)*1e-11
    low, high = bounds(np.array([x, -x/3]))
    assert low <= min(x, -x/3) and high >= max(x, -x/3)


@pytest.mark.parametrize(("name", "breaks"), [
    ("number.range", lambda f: f.assign(number=f.number*50)), ("number.spread", lambda f: f.assign(number=f.number + 1.5)), ("number.missing", lambda f: f.assign(number=np.nan)),
    ("text.categories", lambda f: f.assign(text="z")), ("text.kind", lambda f: f.assign(text=1)), ("many.max_categories", lambda f: f.assign(many=f.id)), ("number.kind", lambda f: f.drop(columns="number")),
    ("key", lambda f: f.assign(id="same")), ("freshness", lambda f: f.assign(at=f["at"] - pd.Timedelta("60D"), known=f["at"])), ("newest week", lambda f: f[(f["at"] < "2024-05-20") | (f.index == 499)]),
    ("known >= at", lambda f: f.assign(known=f["at"] - pd.Timedelta("1s"))), ("rows", lambda f: f[-100:])])
def test_what_breaks_it_is_found_by_name(name, breaks):
    frame = rows(number=COLUMNS["number"], text=COLUMNS["text"], many=[f"c{i % 20}" for i in range(500)]).assign(many=lambda f: f.many.where(f.index != 3, "c99"))
    text = draft_contract(frame, NAMES, NOW)
    assert check(frame, text).outcome == PASS
    assert name in {leaf.name for leaf in check(breaks(frame), text).leaves if leaf.outcome != PASS}


def test_what_moves_is_not_promised_to_stand_still_and_what_stands_still_is():
    text = draft_contract(rows(trend=np.arange(500.0), still=rng.normal(size=500)), NAMES, NOW)
    assert "columns.still.reference" in text and "columns.trend.reference" not in text and "its spread is not promised" in text
    promised = sum("x.reference" in draft_contract(rows(x=np.random.default_rng(seed).normal(size=500)), NAMES, NOW) for seed in range(50))
    assert promised >= 45


def test_no_value_of_a_tagged_column_is_written_down():
    frame = rows(who=[f"ada{i % 4}" for i in range(500)], pay=np.arange(500.0) + 1e6)
    text = draft_contract(frame, NAMES, NOW, {"who": "personal", "pay": "forbidden"})
    assert "ada" not in text and "1000" not in text.split("[columns.pay]")[1] and parse_contract(text).withheld == ("who", "pay")


def test_of_old_rows_no_freshness_is_promised_and_of_500_columns_each_has_its_section():
    wide = rows(200, **{f"c{i}": rng.normal(size=200) for i in range(500)})
    text = draft_contract(wide, NAMES, datetime(2030, 1, 1, tzinfo=UTC))
    assert "max_age_days =" not in text and "days old" in text and len(parse_contract(text).columns) == 502
    assert check(wide, text, datetime(2030, 1, 1, tzinfo=UTC)).outcome == PASS
    with pytest.raises(DataError, match="the label `y` holds nothing but missing values"): draft_contract(wide.assign(y=None), NAMES, NOW)
