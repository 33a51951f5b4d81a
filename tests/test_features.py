"Features: what a lesson should not have to show"
import json
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.digest import canonical
from retrain_nb.records import DataError, SettingsError
from retrain_nb.stages.features import OTHER, FeatureView, align, encode, fit_encoding, unseen, view_digest, view_of

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


# --- Declared answers ---

def test_views_and_encodings_from_before_there_was_a_choice_keep_their_digests():
    assert view_digest(FeatureView("toy", ("x", "flag"), ("name",))) == "f57655ec5b41200559e7d24795883dd61054c6520fd09f1f5b3d26f0eeb1ff66"
    encoding = fit_encoding(view, frame_of([(1.0, True, "a"), (None, False, None)]))
    assert encoding == {"format": "retrain_nb/encoding@1", "view": "toy", "numeric": ["x", "flag"], "categorical": ["name"], "categories": {"name": ["a"]}}


answers = st.sampled_from([{}, {"unseen": "other", "rare": 1}, {"unseen": "other", "rare": 3}, {"mistyped": "missing"}, {"unseen": "refuse"}])


@settings(max_examples=120, deadline=None)
@given(rows, rows, answers)
def test_under_every_answer_a_row_is_encoded_alone_as_among_others_and_after_a_trip_through_json(train, test, more):
    answering = FeatureView("toy", ("x", "flag"), ("name",), **more)
    encoding = json.loads(canonical(fit_encoding(answering, frame_of(train))))
    assert view_of(encoding) == answering
    news = {n for *_, n in test} - {None} - {n for *_, n in train}
    if more.get("unseen") == "refuse" and news:
        with pytest.raises(DataError, match=f"{len(news)} names that training never saw"): encode(answering, encoding, frame_of(test))
        return
    together = encode(answering, encoding, frame_of(test))
    for i in range(len(test)):
        pd.testing.assert_frame_equal(encode(view_of(encoding), encoding, frame_of(test[i:i + 1])), together[i:i + 1].reset_index(drop=True))
    often = {n for n in {n for *_, n in train} - {None} if sum(m == n for *_, m in train) >= more.get("rare", 1)}
    for (*_, name), got in zip(test, together.name):
        if name is None: assert pd.isna(got)
        elif name in often: assert got == name
        else: assert got == OTHER if more.get("unseen") == "other" else pd.isna(got)


def test_a_mistyped_value_costs_itself_and_not_its_column():
    lenient = FeatureView("v", ("x",), ("c",), mistyped="missing")
    odd = pd.DataFrame({"x": [1, "1,400", None, True, pd.Timestamp("2024-01-01"), float("inf")], "c": ["a", 0.5, None, True, 5, "a"]})
    encoding = fit_encoding(lenient, odd)
    assert encoding["categories"] == {"c": ["5", "a"]} and encoding["format"].endswith("@2")
    seen = encode(lenient, encoding, odd)
    assert seen.x.fillna(-1).tolist() == [1, -1, -1, 1, -1, float("inf")] and seen.c.cat.codes.tolist() == [1, -1, -1, -1, 0, 1]
    assert encode(lenient, encoding, odd.assign(x=pd.Timestamp("2024-01-01"))).x.isna().all()
    with pytest.raises(DataError): encode(FeatureView("v", ("x",), ("c",)), fit_encoding(FeatureView("v", ("x",), ("c",)), odd[:1]), odd)


@pytest.mark.parametrize("more", [{"unseen": "guess"}, {"mistyped": "other"}, {"unseen": "other"}, {"rare": 5}, {"unseen": "other", "rare": -1}, {"vouched": "x"}])
def test_an_answer_that_cannot_be_given_is_refused(more):
    with pytest.raises(SettingsError): FeatureView("v", ("x",), ("c",), **more)


def test_a_name_that_is_the_name_of_the_others_is_refused():
    with pytest.raises(DataError, match="Rename it"): fit_encoding(FeatureView("v", (), ("c",), unseen="other", rare=2), pd.DataFrame({"c": [OTHER]}))


# --- Models of older views ---

def test_a_model_of_an_older_view_is_asked_in_its_own_terms():
    old = FeatureView("v1", ("x", "flag"), ("name",))
    train, today = frame_of([(1.0, True, "a"), (2.0, False, "b")]), frame_of([(3.0, True, "b"), (4.0, None, "c")]).assign(more=1.5)
    encoding, expected = fit_encoding(old, train), encode(old, fit_encoding(old, train), today)
    for new in (old, FeatureView("v2", ("x", "flag"), ("name",)), FeatureView("v2", ("more", "x"), ()), FeatureView("v2", ("flag",), ("name",), unseen="refuse"),
                FeatureView("v2", ("x", "flag"), ("name",), vouched=("x",))):
        pd.testing.assert_frame_equal(align(new, encoding, today), expected)


def test_what_an_older_model_misses_is_named_all_at_once():
    encoding = fit_encoding(FeatureView("v1", ("x", "flag"), ("name",)), frame_of([(1.0, True, "a")]))
    new = FeatureView("v2", ("name_length",), ("flag",), lambda f: f.assign(name_length=1.0))
    with pytest.raises(DataError, match="view `v1` cannot be asked about rows of view `v2`: `flag` was a number and is a name, `x` is gone, `name` is gone"):
        align(new, encoding, pd.DataFrame({"flag": ["yes"]}))
