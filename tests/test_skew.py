"Train and serve skew: what differs is found, what does not is not, and nothing personal is shown"
import json
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.records import DataError
from retrain_nb.stages.features import FeatureView, encode, fit_encoding
from retrain_nb.stages.skew import MASK, SHOWN, skew

value = st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(float("inf")), st.just(float("-inf")))
name = st.one_of(st.none(), st.sampled_from(["a", "b", "5", "", "None", "nan"]))


def frame(xs, names, ids=None):
    return pd.DataFrame({"id": range(len(xs)) if ids is None else ids, "x": pd.Series(xs, dtype="float64"), "c": pd.Series(names, dtype=object)})


def same_number(a, b, tolerance=1e-6):
    if a is None or b is None: return a is b
    return a == b or (np.isfinite(a) and np.isfinite(b) and abs(a - b) <= max(tolerance*max(abs(a), abs(b)), 1e-12))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(value, value, name, name), min_size=1, max_size=12), st.randoms())
def test_counts_are_those_of_a_loop_over_pairs_in_whatever_order(rows, random):
    x, x2, c, c2 = zip(*rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    found = skew(frame(x, c), frame(x2, c2).iloc[order], "id")
    numbers, names = found.columns
    assert numbers.unequal == sum(not same_number(a, b) for a, b in zip(x, x2))
    assert names.unequal == sum(a != b for a, b in zip(c, c2))
    for column, a, b in ((numbers, x, x2), (names, c, c2)):
        assert (column.n, column.only_logged) == (len(rows), sum(p is not None and q is None for p, q in zip(a, b)))
        assert column.only_recomputed == sum(p is None and q is not None for p, q in zip(a, b))
        assert len(column.examples) == min(column.unequal, SHOWN)


def test_a_32_bit_log_and_one_that_went_through_json_do_not_differ_from_what_was_encoded():
    rng = np.random.default_rng(0)
    raw = pd.DataFrame({"x": rng.normal(0, 1e5, 400), "small": rng.normal(0, 1e-3, 400), "flag": rng.random(400) < 0.5, "c": rng.choice(["a", "b", None], 400)})
    view = FeatureView("v", ("x", "small", "flag"), ("c",))
    seen = encode(view, fit_encoding(view, raw), raw)
    sent = pd.DataFrame([json.loads(line) for line in seen.to_json(orient="records", lines=True, double_precision=15).splitlines()])
    for log in (sent, seen.astype({"x": "float32", "small": "float32"})):
        assert skew(log.assign(id=range(400)), seen.assign(id=range(400)), "id", limit=0.01).verdict.outcome == "PASS"


@pytest.mark.parametrize("differ, n, outcome", [(0, 400, "PASS"), (0, 100, "INSUFFICIENT"), (40, 400, "FAIL"), (6, 400, "INSUFFICIENT"), (1, 2000, "PASS"), (0, 0, "INSUFFICIENT")])
def test_a_verdict_needs_rows(differ, n, outcome):
    x = np.arange(n) + 1.0
    a = frame(x, ["a"]*n)
    assert skew(a, a.assign(x=np.where(np.arange(n) < differ, -x, x)), "id").verdict.outcome == outcome


def test_many_honest_columns_do_not_fail_by_their_number():
    rng, failed = np.random.default_rng(0), 0
    for _ in range(60): # Each of 30 columns differs in 1 % of rows, just what may be
        a = pd.DataFrame(rng.random((400, 30)), columns=[f"x{i}" for i in range(30)]).assign(id=range(400))
        failed += skew(a, a.mask(rng.random(a.shape) < 0.01, 2).assign(id=range(400)), "id").verdict.outcome == "FAIL"
    assert failed <= 8 # 5 %, and three standard errors


def test_a_column_that_changed_its_kind_says_so():
    n = 400
    found = skew(frame(range(n), ["a"]*n), frame(range(n), ["a"]*n).assign(x=[f"{i} km" for i in range(n)]), "id")
    assert found.columns[0].verdict.outcome == "FAIL" and "logged as float64, recomputed as" in found.columns[0].verdict.reason
    assert skew(frame(range(n), ["5"]*n), frame(range(n), [5]*n), "id").verdict.outcome == "PASS"


def test_nothing_personal_is_shown_anywhere():
    n = 400
    a = frame(np.arange(n)*1.5, [f"ada{i}@example.org" for i in range(n)], [f"+49 151 {i}" for i in range(n)])
    found = skew(a, a.assign(c=a.c.str.upper(), x=a.x + 777_777), "id", personal={"id", "c", "x"})
    assert found.verdict.outcome == "FAIL" and found.columns[0].largest is None
    assert not any(word in repr(found) + found._repr_markdown_() for word in ("@", "ada1", "ADA1", "+49", "777"))
    assert found.columns[1].examples == ((MASK,)*3,)*SHOWN


def test_odd_values_and_long_ones_crash_nothing_and_stay_on_their_line():
    a = frame([1.0, 2.0], ["x|y\nz", "w"*10_000])
    found = skew(a, a.assign(c=[Decimal("1.5"), pd.Timestamp("2024-01-01")], x=[True, None]), "id")
    assert found.columns[1].unequal == 2
    lines = found._repr_markdown_().splitlines()
    assert max(map(len, lines)) < 600 and any("x\\|y z" in line for line in lines)


@pytest.mark.parametrize("change, said", [
    (lambda f: pd.concat([f, f]), "2 logged rows have an id"), (lambda f: f.assign(id=[None, 1]), "1 logged rows have an id"),
    (lambda f: f.drop(columns="id"), "have no column `id`"), (lambda f: f.set_axis(["id", "x", "x"], axis=1), "have column `x` twice")])
def test_rows_that_cannot_be_paired_are_refused(change, said):
    a = frame([1.0, 2.0], ["a", "b"])
    with pytest.raises(DataError, match=said): skew(change(a), a, "id")
