"The torture suite, second part: what rows, labels, groups and parameters can be. Each case has its right answer in its name, and the gate that has to say it"
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
from nights import CANDIDATE, CUT, FEATURES, changed, judging, parcels

from retrain_nb.digest import digest
from retrain_nb.loop.runs import plan
from retrain_nb.records import FAIL, INSUFFICIENT, PASS, SettingsError, UsageError, as_json
from retrain_nb.services.workbench import open_workbench
from retrain_nb.stages.backtest import Plan, Stream, backtest, leak, origins, training_rows
from retrain_nb.stages.privacy import hidden_groups
from retrain_nb.stages.slices import fairness
from retrain_nb.stages.train import fixed_params
from retrain_nb.tasks import log_losses
from retrain_nb.windows import parse_time

NOW = parse_time(CANDIDATE)


# --- Labels ---

def test_a_label_window_that_is_forty_percent_mature_is_insufficient_by_maturity_and_not_scored(night):
    rows = parcels()
    slow = judging(rows) & (np.random.default_rng(0).random(len(rows)) < 0.57)
    found = night(rows.assign(known_time=rows.known_time.where(~slow, rows.known_time + pd.Timedelta("40D"))))
    assert found.said == (INSUFFICIENT, {"labelled", "completeness"}) and found.stopped and "evaluation" not in found.names
    assert 0.35 < 1 - found.of("labelled").value < 0.45


def test_one_class_in_the_holdout_is_insufficient_by_the_rarer_class(night):
    found = night(changed("late", None, lambda f: 0.0))
    assert found.said == (INSUFFICIENT, {"test rarer class"}) and found.stopped


def test_one_class_in_the_training_rows_is_insufficient_by_the_rarer_class(night):
    assert night(changed("late", lambda f: 0.0)).said == (INSUFFICIENT, {"training rarer class", "training labels"})


def eighteen(): # -> rows with eighteen late parcels in the whole test
    rows = parcels()
    rows.loc[np.flatnonzero(judging(rows) & (rows.late == 1).to_numpy() & (rows.due_time < NOW - timedelta(days=1)).to_numpy())[18:], "late"] = 0.0
    return rows.assign(late=rows.late.where(rows.due_time < NOW - timedelta(days=1), 0.0))


def test_eighteen_positives_are_insufficient_by_the_rarer_class(night):
    found = night(eighteen())
    assert found.said == (INSUFFICIENT, {"test rarer class"}) and "18 rows of the rarer class" in found.verdict.reason


def test_eighteen_positives_that_the_policy_allows_are_still_too_few_for_the_auc(night):
    found = night(eighteen(), [("settings.ini", "min_positives = 50", "min_positives = 10")])
    assert found.of("auc").outcome == INSUFFICIENT and found.verdict.outcome != PASS and "margin 0.0200" in found.of("auc").reason


# --- Rows ---

def test_rows_doubled_across_the_split_are_insufficient_by_shared_rows(night):
    rows, rng = parcels(), np.random.default_rng(0)
    late, early = (rng.choice(np.flatnonzero(which), 300, replace=False) for which in (judging(rows), ~judging(rows)))
    for column in [*FEATURES, "late"]: rows.loc[late, column] = rows.loc[early, column].to_numpy()
    found = night(rows)
    assert found.said == (INSUFFICIENT, {"shared rows"})


def test_rows_doubled_with_their_key_are_failed_by_the_key(night):
    rows = parcels()
    assert night(pd.concat([rows, rows[judging(rows)].head(50)], ignore_index=True)).said == (FAIL, {"key"})


def test_two_data_sets_equal_in_their_first_10000_rows_are_two(night):
    rows = parcels(a_day=150)
    other = rows.assign(load=rows.load.where(rows.index != 12_000, 1.234))
    assert rows.head(12_000).equals(other.head(12_000)) and len(rows) > 12_000
    recipes = []
    for frame in (rows, other):
        found = night(frame)
        recipes.append((found.names["run"].snapshot.digest, digest(as_json(found.names["run"].recipe))))
    assert recipes[0][0] != recipes[1][0] and recipes[0][1] != recipes[1][1]


def test_a_feature_gone_null_that_was_promised_is_failed_by_the_contract(night):
    found = night(changed("load", None, lambda f: np.nan))
    assert found.said == (FAIL, {"load.missing"}) and found.stopped


def test_a_feature_gone_null_that_nobody_promised_is_insufficient_by_leakage(night):
    found = night(changed("rain", None, lambda f: np.nan))
    assert found.verdict.outcome != PASS and "known later: rain" in found.said[1]


# --- Leaks ---

def backfilled(rows, until=CUT): # -> rows whose rain was corrected once the outcome was known
    done, told = (rows.due_time < until).to_numpy(), rows.late*2 + np.random.default_rng(1).normal(0, 0.3, len(rows))
    return rows.assign(rain=np.where(done, (told + 3).round(2), rows.rain))


def test_a_backfill_that_ends_at_the_cut_is_failed_by_both_rails(night):
    assert night(backfilled(parcels())).said == (FAIL, {"log_loss", "auc"})


def test_a_backfill_up_to_now_makes_a_candidate_too_good_to_be_true_and_is_not_passed(night):
    found = night(backfilled(parcels(), pd.Timestamp(NOW - timedelta(days=1))))
    assert found.verdict.outcome != PASS and any("rain" in name for name in found.said[1])
    assert found.of("log_loss").outcome == PASS # All that a gate on metrics would have seen


def test_a_backfill_with_its_moments_written_down_is_missing_in_every_fold_and_not_one_byte_leaks():
    rows = backfilled(parcels(), pd.Timestamp(NOW)).assign(noted=lambda f: f.known_time)
    stream = Stream("due_time", "late", "known_time", {"rain": "noted"})
    folds = origins(Plan(every="week", folds=4, days=30, delay_days=1), rows.due_time.min().to_pydatetime(), NOW)
    def by_rain(taught, asked): return np.where(asked.rain.fillna(0) > 4, 0.99, np.where(asked.rain.isna(), taught.late.mean(), 0.01))
    def overall(taught, asked): return np.full(len(asked), taught.late.mean())
    held, blind = (backtest(rows, folds, s, {"rain": by_rain, "overall": overall}, log_losses, NOW) for s in (stream, Stream("due_time", "late", "known_time")))
    assert leak(rows, folds, stream).outcome == PASS
    assert (held.losses.rain == held.losses.overall).all() and blind.losses.rain.mean() < 0.2*blind.losses.overall.mean()


def test_a_training_set_scaled_by_the_future_is_failed_by_leak():
    rows = parcels()
    stream, folds = Stream("due_time", "late", "known_time"), origins(Plan(every="week", folds=3, days=30, delay_days=1), rows.due_time.min().to_pydatetime(), NOW)
    found = leak(rows, folds, stream, lambda frame, split: training_rows(frame.assign(load=frame.load - frame.load.mean()), split, stream))
    assert found.outcome == FAIL and "column(s) load" in found.reason


# --- Groups ---

def test_a_group_of_seven_is_insufficient_and_never_named():
    rng = np.random.default_rng(6)
    group = np.repeat(["north", "south", "hamlet", "village"], [900, 700, 8, 7])
    y, said = (rng.random(len(group)) < 0.5).astype(float), (rng.random(len(group)) < 0.5).astype(float)
    said[group == "village"] = 0.0 # However it was treated
    found = fairness(y, said, group, 0.2, hidden_groups(pd.Series(group).value_counts().to_dict()))
    assert found.outcome == INSUFFICIENT and {v.name for v in found.leaves if v.outcome == INSUFFICIENT} == {"too small to be shown"}
    assert "village" not in str(found) and "hamlet" not in str(found)


# --- Typing mistakes ---

@pytest.mark.parametrize("given, says", [({"sed": "1"}, "Did you mean `seed`?"), ({"as_off": CANDIDATE}, "Did you mean `as_of`?"), ({"seed": "one"}, "seed")])
def test_a_typo_in_a_parameter_of_the_page_is_refused_by_name(night, given, says):
    with pytest.raises(UsageError) as e: plan(open_workbench(night.root), "retrain", given, NOW)
    assert says in str(e.value)


@pytest.mark.parametrize("before, after, says", [
    ("margins =", "margin =", "did you mean `margins`?"), ("alpha = 0.05", "aplha = 0.05", "did you mean `alpha`?"), ("log_loss 0.02", "logloss 0.02", "`logloss` is not measured")])
def test_a_typo_in_the_gates_is_refused_by_name(night, before, after, says):
    with pytest.raises(SettingsError) as e: night(files=[("settings.ini", before, after)])
    assert says in str(e.value)


def test_a_typo_in_a_parameter_of_the_trainer_is_refused_by_name(night):
    with pytest.raises(SettingsError, match="Did you mean `learning_rate`?"): night(files=[("settings.ini", "learning_rate", "lerning_rate")])
    with pytest.raises(SettingsError): fixed_params({"rounds": 20, "num_leafs": 7}, 1, 0)
