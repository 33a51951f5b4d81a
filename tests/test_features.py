"Features: what a lesson should not have to show"
import json
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.digest import canonical
from retrain_nb.records import DataError
from retrain_nb.stages.features import FeatureView, encode, fit_encoding, unseen, view_digest, view_of

view = FeatureView("toy", ("x", "flag"), ("name",))
names = st.one_of(st.none(), st.text(max_size=3), st.sampled_from(["a", "b", "ä", "5", "nan", "None", ""]))
numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=False))
rows = st.lists(st.tuples(numbers, st.one_of(st.none(), st.booleans()), names), min_size=1, max_size=12)


def frame_of(values):
    return pd.DataFrame(values, columns=["x", "flag", "name"])


@settings(max_examples=150, deadline=None)
@given(rows, rows)
def test_a_row_is_encoded_alone_as_among_others(train, test):
    encoding = fit_encoding(view, frame_of(train))
    together = encode(view, encoding, frame_of(test))
    for i in range(len(test)):
        alone = encode(view, encoding, frame_of(test[i:i + 1]))
        pd.testing.assert_frame_equal(alone, together[i:i + 1].reset_index(drop=True))


@settings(max_examples=100, deadline=None)
@given(rows, st.randoms())
def test_the_encoding_does_not_depend_on_the_order_of_training_rows_or_on_their_dtype(train, random):
    frame = frame_of(train)
    order = list(range(len(frame)))
    random.shuffle(order)
    encoding = fit_encoding(view, frame)
    assert fit_encoding(view, frame.iloc[order]) == encoding
    assert fit_encoding(view, frame.astype({"name": "category"})) == encoding
    assert encoding["categories"]["name"] == sorted({n for _, _, n in train if n is not None})


def test_levels_that_no_training_row_holds_are_not_learned():
    column = pd.Series(["a", "b", "c"], dtype="category")
    encoding = fit_encoding(FeatureView("v", (), ("c",)), column[:1].to_frame("c"))
    assert encoding["categories"] == {"c": ["a"]}


def test_a_whole_number_is_one_category_however_it_is_written():
    view = FeatureView("v", (), ("flight",))
    encoding = fit_encoding(view, pd.DataFrame({"flight": [5, 12]}))
    assert encoding["categories"]["flight"] == ["12", "5"]
    for same in ([5.0, None], ["5", None], pd.array([5, None], dtype="Int64"), pd.Categorical(["5", None], categories=["x", "5"])):
        assert encode(view, encoding, pd.DataFrame({"flight": same})).flight.cat.codes.tolist() == [1, -1]


def test_the_encoding_survives_json_with_its_column_order():
    view = FeatureView("v", ("z", "a"), ("y", "b"))
    frame = pd.DataFrame({"a": [1.0], "b": ["u"], "y": ["w"], "z": [2]})
    encoding = json.loads(canonical(fit_encoding(view, frame)))
    assert list(encode(view_of(encoding), encoding, frame).columns) == ["z", "a", "y", "b"]


@pytest.mark.parametrize("bad", [pd.Timestamp("2013-01-01"), "1", pd.Timedelta("1s"), 1 + 2j])
def test_what_is_no_number_is_refused_with_its_column(bad):
    with pytest.raises(DataError, match="column `x` of view `v` is .*wanted is a number"):
        fit = FeatureView("v", ("x",), ())
        encode(fit, fit_encoding(fit, pd.DataFrame({"x": [1.0]})), pd.DataFrame({"x": [bad]}))


@pytest.mark.parametrize("bad", [pd.Timestamp("2013-01-01"), 0.5, True, ("a",)])
def test_what_is_no_name_is_refused_with_its_column(bad):
    with pytest.raises(DataError, match="column `c` of view `v` is .* holds values that are no names"):
        fit_encoding(FeatureView("v", (), ("c",)), pd.DataFrame({"c": [bad]}))


def test_an_error_does_not_show_values():
    with pytest.raises(DataError) as error:
        fit_encoding(FeatureView("v", ("ssn",), ()), pd.DataFrame({"ssn": [1.0]}))
        encode(FeatureView("v", ("ssn",), ()), fit_encoding(FeatureView("v", ("ssn",), ()), pd.DataFrame({"ssn": [1.0]})), pd.DataFrame({"ssn": ["123-45"]}))
    assert "123-45" not in str(error.value)


def test_a_column_that_is_there_twice_is_refused():
    twice = pd.DataFrame([[1.0, 2.0]], columns=["x", "x"])
    with pytest.raises(DataError, match="the rows have it 2 times"):
        fit_encoding(FeatureView("v", ("x",), ()), twice)


def test_derive_cannot_add_columns_to_the_callers_frame_or_lose_rows():
    def grown(frame):
        frame["y"] = frame.x * 2
        return frame
    frame = pd.DataFrame({"x": [1.0, 2.0]})
    fit_encoding(FeatureView("v", ("x", "y"), (), grown), frame)
    assert list(frame.columns) == ["x"]
    with pytest.raises(DataError, match="did not give back the rows"):
        fit_encoding(FeatureView("v", ("x",), (), lambda f: f[f.x > 1]), frame)


def test_no_rows_encode_to_no_rows_and_know_no_share():
    encoding = fit_encoding(view, frame_of([(1.0, True, "a")]))
    empty = encode(view, encoding, frame_of([]).astype({"name": object}))
    assert empty.shape == (0, 3)
    assert unseen(view, encoding, frame_of([]).astype({"name": object})).share.isna().all()


def test_column_order_is_part_of_a_view():
    assert view_digest(FeatureView("v", ("a", "b"), ())) != view_digest(FeatureView("v", ("b", "a"), ()))


def test_three_hundred_thousand_rows_encode_well_under_a_second():
    rng, n = np.random.default_rng(0), 300_000
    wide = FeatureView("wide", tuple(f"x{i}" for i in range(12)), tuple(f"c{i}" for i in range(8)))
    frame = pd.DataFrame({f"x{i}": rng.random(n) for i in range(12)}
                         | {f"c{i}": pd.Categorical.from_codes(rng.integers(0, 100, n), [f"v{j}" for j in range(100)]) for i in range(8)})
    start = time.process_time()
    encode(wide, fit_encoding(wide, frame), frame)
    assert time.process_time() - start < 1
