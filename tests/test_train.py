"What a reader of `12_train` should not see: fresh processes, larger data, odd input"
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retrain_nb.digest import canonical, digest
from retrain_nb.records import DataError, SettingsError
from retrain_nb.settings import Settings, parse_settings, policy
from retrain_nb.stages.train import ELSEWHERE, FIXED, TUNABLE, WORDS, fixed_params, importance, matrix, predict, train

SCRIPT = """
import hashlib
from test_train import toy
from retrain_nb.stages.train import fixed_params, train
params = fixed_params({"rounds": 5, "feature_fraction": 0.6, "bagging_fraction": 0.5, "bagging_freq": 1}, 2, 3)
print(hashlib.sha256(train(*toy(1000), params).encode()).hexdigest())
"""


def toy(n=4000):
    rng = np.random.default_rng(1)
    X = pd.DataFrame({"hour": rng.integers(5, 24, n).astype(float), "wind": rng.gamma(2, 5, n),
                      "seats": rng.integers(20, 400, n).astype(float),
                      "carrier": pd.Categorical.from_codes(rng.integers(-1, 9, n), list("ABCDEFGHI"))})
    odds = 0.15*(X.hour - 14) + 0.05*(X.wind - 10) + X.carrier.cat.codes.isin([1, 4])
    return X, (rng.random(n) < 1/(1 + np.exp(1.5 - odds))).astype(int)


def test_the_same_recipe_in_two_fresh_processes_gives_equal_bytes():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = lambda: subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True).stdout
    first = run()
    assert len(first.strip()) == 64 and first == run()


def test_threads_change_one_recorded_line_and_no_tree():
    X, y = toy(1000)
    one, two = (train(X, y, fixed_params({"rounds": 5, "feature_fraction": 0.6}, t, 0)).splitlines() for t in (1, 2))
    assert [(a, b) for a, b in zip(one, two) if a != b] == [("[num_threads: 1]", "[num_threads: 2]")] and len(one) == len(two)


def test_another_seed_draws_another_model_when_something_is_drawn():
    X, y = toy()
    texts = {train(X, y, fixed_params({"rounds": 10, "bagging_fraction": 0.5, "bagging_freq": 1}, 1, seed)) for seed in (0, 1, 2)}
    assert len(texts) == 3


def test_scores_do_not_depend_on_the_company_a_row_is_in():
    X, y = toy()
    text = train(X, y, fixed_params({"rounds": 10}, 1, 0))
    whole = predict(text, X)
    assert np.array_equal(predict(text, X.iloc[::-1])[::-1], whole) and np.array_equal(predict(text, X.iloc[7:8]), whole[7:8])
    assert np.all((whole > 0) & (whole < 1)) and len(predict(text, X[:0])) == 0


def test_the_booster_knows_no_pandas_categories():
    X, y = toy()
    text = train(X, y, fixed_params({"rounds": 5}, 1, 0))
    assert "pandas_categorical:null" in text
    renamed = X.assign(carrier=X.carrier.cat.rename_categories(list("abcdefghi")))  # Codes are what counts
    assert np.array_equal(predict(text, X), predict(text, renamed))


def test_a_model_scores_only_its_own_columns_in_order_and_kind():
    X, y = toy(500)
    text = train(X, y, fixed_params({"rounds": 3}, 1, 0))
    for other in (X[X.columns[::-1]], X.drop(columns="wind"), X.assign(more=1.0), X.assign(carrier=1.0), X.assign(hour=X.carrier)):
        with pytest.raises(DataError): predict(text, other)


def test_what_makes_training_repeatable_is_recorded_in_the_model():
    X, y = toy(500)
    text = train(X, y, fixed_params({"rounds": 3}, 1, 5))
    for line in ("deterministic: 1", "force_row_wise: 1", "num_threads: 1", "seed: 5", "num_iterations: 3", "objective: binary"):
        assert f"[{line}]" in text


def test_missing_values_of_every_kind_of_column_are_nan():
    X = pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": pd.array([True, None], dtype="boolean"),
                      "c": pd.Categorical(["x", None]), "d": [0.5, np.nan]})
    assert np.array_equal(matrix(X), [[1, 1, 0, 0.5], [np.nan]*4], equal_nan=True)


@pytest.mark.parametrize("change, words", [
    (lambda X, y: (X[:0], y[:0]), "no training rows"), (lambda X, y: (X, y*0), "one class"),
    (lambda X, y: (X, y.where(y > 0)), "labels are missing"), (lambda X, y: (X, y + 1), "neither 0 nor 1"),
    (lambda X, y: (X.assign(wind=-np.inf), y), "wind hold infinite"), (lambda X, y: (X, y[:-1]), "4,000 rows but 3,999 labels"),
    (lambda X, y: (X[[]], y), "no feature columns"), (lambda X, y: (X.rename(columns={"wind": "hour"}), y), "one name"),
    (lambda X, y: (X.rename(columns={"wind": "wind[mph]"}), y), "wind[mph]"),
    (lambda X, y: (X.assign(wind=pd.Timestamp(0)), y), "wind are neither"),
])
def test_input_that_cannot_be_learned_from_is_refused_with_a_cure(change, words):
    with pytest.raises(DataError) as e: train(*change(*toy()), fixed_params({"rounds": 5}, 1, 0))
    assert words in e.value.cause and e.value.cure


@pytest.mark.parametrize("params, threads, seed", [
    ({}, 1, 0), ({"rounds": 0}, 1, 0), ({"rounds": 2.5}, 1, 0), ({"rounds": True}, 1, 0), ({"rounds": 5}, 0, 0), ({"rounds": 5}, 1, -1),
    ({"rounds": 5, "lambda_l2": float("nan")}, 1, 0), ({"rounds": 5, "lambda_l2": None}, 1, 0),
    ({"rounds": 5, "device_type": "gpu"}, 1, 0),
    ({"rounds": 5, "random_state": 1}, 1, 0), ({"rounds": 5, "n_jobs": 4}, 1, 0), ({"rounds": 5, "objective": "regression"}, 1, 0),
    ({"rounds": 5, "bagging_seed": 1}, 1, 0), ({"rounds": 5, "xyz": 1}, 1, 0),
])
def test_parameters_that_are_not_open_are_refused(params, threads, seed):
    with pytest.raises(SettingsError) as e: fixed_params(params, threads, seed)
    assert e.value.cure


def test_a_value_that_lightgbm_refuses_is_our_error_not_theirs():
    X, y = toy()
    with pytest.raises(SettingsError, match="LightGBM refused"): train(X, y, fixed_params({"rounds": 5, "num_leaves": 1}, 1, 0))


def test_each_open_parameter_holds_the_kind_of_value_that_lightgbm_takes():
    import lightgbm as lgb
    X, y = toy(60)
    def said(name, value): # -> what LightGBM says of the value's kind
        params = {"verbosity": -1, "objective": "binary", name: value}
        try: lgb.train(params, lgb.Dataset(X, y, params=params), 1)
        except lgb.basic.LightGBMError as e: return str(e)
        return ""
    for name, kind in TUNABLE.items():
        if kind == "a list": continue
        assert ("of type int" in said(name, 0.5)) == (kind == "a whole number"), name
        assert ('should be "true"' in said(name, 1)) == (kind == "`true` or `false`"), name
        for value in (True, False) if kind == "`true` or `false`" else WORDS.get(name, ()):
            assert not re.search("should be|Unknown", said(name, value)), (name, value)


@pytest.mark.parametrize("text", ["boosting dart, drop_rate 0.5", "extra_trees true", "boosting rf, bagging_freq 1, bagging_fraction 0.5", "use_missing FALSE, num_leaves 7", "data_sample_strategy goss"])
def test_what_settings_say_of_the_trainer_reaches_the_model_or_is_refused(text, small_settings):
    settings = parse_settings(small_settings + f"[trainer]\nrounds = 5\nparams = {text}\n")
    again = Settings.model_validate(json.loads(canonical({**settings.model_dump(mode="json"), **policy(settings)})))  # As a page has it
    assert again.trainer == settings.trainer and digest(policy(again)) == digest(policy(settings))
    X, y = toy()
    one, two = (train(X, y, fixed_params({**params, "rounds": 5}, 1, 0)) for params in (settings.trainer.params, {}))
    assert one != two and json.loads(canonical(fixed_params({**settings.trainer.params, "rounds": 5}, 1, 0)))


@pytest.mark.parametrize(("text", "said"), [
    ("extra_trees 1", "`extra_trees` is 1.0, and LightGBM takes `true` or `false`"), ("boosting 1", "takes one of gbdt, rf, dart"), ("boosting forest", "'forest'.*takes one of gbdt, rf, dart"),
    ("num_leaves 30.5", "takes a whole number"), ("num_leaves true", "is True, .*takes a whole number"), ("learning_rate fast", "'fast', .*takes a number"),
    ("monotone_constraints 1", "takes a list.*settings.ini has no lists"), ("learning_rate nan", r"params.learning_rate.*finite number, `true` or `false`, or a word"),
    ("learning_rate 1e999", "finite number"), ("boosting d@rt", "finite number")])
def test_a_value_of_another_kind_is_refused_before_a_run_is_planned(text, said, small_settings):
    with pytest.raises(SettingsError, match=said): fixed_params({**parse_settings(small_settings + f"[trainer]\nparams = {text}\n").trainer.params, "rounds": 5}, 1, 0)


def test_every_open_parameter_is_a_main_name_of_this_lightgbm():
    from lightgbm.basic import _ConfigAliases
    known = set(_ConfigAliases._get_all_param_aliases())
    assert set(TUNABLE) <= known and set(FIXED) | set(ELSEWHERE) - {"rounds"} <= known
    assert not set(TUNABLE) & (set(FIXED) | set(ELSEWHERE)) and not any("seed" in n or "file" in n for n in TUNABLE)


def test_importance_of_a_model_without_splits_is_zero_everywhere():
    X, y = toy(60)
    table = importance(train(X, y, fixed_params({"rounds": 2, "min_data_in_leaf": 60}, 1, 0)))
    assert table.gain.sum() == 0 and table.splits.sum() == 0 and list(table.feature) == sorted(X.columns)
