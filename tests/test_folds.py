"What a reader of `36c_folds` and of the page `backtest` should not see: recorded runs, models compared byte for byte, other tasks, settings that ask for too much"
import json
import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retrain_nb.demo import toy
from retrain_nb.faces.cli import main
from retrain_nb.records import FAIL, INSUFFICIENT, PASS, SettingsError
from retrain_nb.services.folds import (
    BASE,
    NEVER,
    RETRAINED,
    ROW,
    bin_rows,
    folds_of,
    learned_from,
    learner,
    losses_of,
    lost,
    plan_of,
    procedures,
    stream_of,
)
from retrain_nb.settings import parse_settings, policy
from retrain_nb.stages.backtest import Plan, Stream, backtest, leak, training_rows
from retrain_nb.stages.train import fixed_params
from retrain_nb.windows import parse_time

NOW = parse_time("2024-03-22")
STREAM = Stream("due_time", "late", "known_time")
PARAMS = fixed_params({"rounds": 10, "num_leaves": 7}, 1, 0)
ROWS = toy.rows()
ROWS = ROWS[ROWS.due_time < NOW].reset_index(drop=True)
FOLDS = folds_of(Plan(every="week", folds=4, days=28, delay_days=1), ROWS, STREAM, NOW)


def call(capsys, root, *words):
    capsys.readouterr()
    code = main([*words, "--root", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def parcels(first_night, tmp_path): return Path(shutil.copytree(first_night, tmp_path/"parcels"))


# --- The page, recorded ---

def test_a_backtest_is_a_recorded_run_with_a_verdict_intervals_and_a_picture(parcels, capsys):
    before = call(capsys, parcels, "status")[1]["champion"]
    code, done = call(capsys, parcels, "run", "backtest", "--now", "2024-03-22")
    assert (code, done["state"], done["outcome"], done["model"]) == (0, "ok", "PASS", "")
    record = json.loads((parcels/"reports"/done["run"]/"record.json").read_text())
    assert {v["name"] for v in record["verdict"]["parts"]} >= {"folds", "leak"} and len(record["evaluation"]["folds"]) == 4
    assert record["evaluation"]["folds"][0]["cut"] == "2024-02-19T00:00:00Z" and record["evaluation"]["difference"].keys() == {f"log_loss against {n}" for n in (NEVER, BASE)}
    e = record["evaluation"]["difference"]["log_loss against base rate"]
    assert e["high"] < 0 and e["clusters"] == 28 and "cosines" in e["method"]
    report = (parcels/done["report"]).read_text()
    assert "Retrained 4 times" in report and "not one byte of 4 folds knows the future" in report
    assert call(capsys, parcels, "status")[1]["champion"] == before
    again = call(capsys, parcels, "run", "backtest", "--now", "2024-03-22")[1]
    assert again["run"] == done["run"] and not again["new"]
    assert call(capsys, parcels, "reproduce", done["run"])[1]["verdict"] == "REPRODUCED"


def test_more_folds_than_there_are_is_insufficient_and_says_what_to_do(parcels, capsys):
    path = parcels/"settings.ini"
    path.write_text(path.read_text().replace("folds = 4", "folds = 40"))
    code, done = call(capsys, parcels, "run", "backtest", "--now", "2024-03-22")
    assert (code, done["outcome"]) == (4, INSUFFICIENT) and "folds by week, 40 wanted; ask for fewer folds" in done["verdict"]["reason"]


# --- Shared bins ---

def booster(frame, split, first=FOLDS[0]): # -> the text of a model, trained as the page does
    binned, texts = bin_rows(frame, [first], STREAM, toy.view, PARAMS), []
    import lightgbm as lgb
    taught = training_rows(binned.rows, split, STREAM)
    tree = {k: v for k, v in binned.params.items() if k != "rounds"}
    part = binned.data.subset(taught[ROW].tolist()).construct().set_label(taught.late.to_numpy())
    texts.append(lgb.train(tree, part, num_boost_round=10).model_to_string())
    return texts[0]


def test_deleting_the_future_changes_no_byte_of_a_model_on_shared_bins():
    assert leak(ROWS, FOLDS, STREAM, booster).outcome == PASS
    assert leak(ROWS, FOLDS, STREAM, partial(learned_from, first=FOLDS[0], stream=STREAM, view=toy.view)).outcome == PASS


def test_bins_of_the_last_fold_are_a_leak_and_are_found():
    for make in (partial(booster, first=FOLDS[-1]), partial(learned_from, first=FOLDS[-1], stream=STREAM, view=toy.view)):
        assert leak(ROWS, FOLDS[:3], STREAM, make).outcome == FAIL


def test_a_feature_that_was_written_down_later_is_missing_for_every_fold():
    noted = ROWS.assign(noted=ROWS.known_time, load=ROWS.load.where(ROWS.index % 2 == 0, ROWS.late*100))
    stream = Stream("due_time", "late", "known_time", {"load": "noted"})
    binned = bin_rows(noted.assign(noted=noted.noted.where(noted.index % 2 == 1, noted.due_time)), FOLDS, stream, toy.view, PARAMS)
    assert np.isnan(binned.numbers[1::2, 0]).all() and not np.isnan(binned.numbers[::2, 0]).any()


def test_the_order_of_rows_is_that_of_the_frame_and_places_are_kept():
    shuffled = ROWS.sample(frac=1, random_state=0).reset_index(drop=True)
    one, other = (backtest(b.rows, FOLDS, b.stream, procedures(b), losses_of(b), NOW).folds[BASE] for b in (bin_rows(f, FOLDS, STREAM, toy.view, PARAMS) for f in (ROWS, shuffled)))
    assert other.tolist() == pytest.approx(one.tolist(), rel=1e-12)
    binned = bin_rows(shuffled, FOLDS, STREAM, toy.view, PARAMS)
    assert (binned.numbers[:, 0] == shuffled.load.to_numpy()).all() and (binned.rows[ROW] == np.arange(len(shuffled))).all()


def test_further_procedures_come_in_by_name_and_never_is_the_first_model():
    binned = bin_rows(ROWS, FOLDS, STREAM, toy.view, PARAMS)
    deep = fixed_params({"rounds": 40, "num_leaves": 31}, 1, 0)
    told = backtest(binned.rows, FOLDS, binned.stream, procedures(binned, {"deep": learner(binned, deep), "two weeks": learner(binned, days=14)}), losses_of(binned), NOW)
    assert list(told.folds.columns[4:]) == [RETRAINED, NEVER, BASE, "deep", "two weeks"]
    assert told.folds[RETRAINED][0] == told.folds[NEVER][0] and told.folds[RETRAINED][3] != told.folds[NEVER][3]
    assert (told.folds.deep != told.folds[RETRAINED]).all() and (told.folds["two weeks"] != told.folds[RETRAINED]).all()


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_other_tasks_are_asked_too(task):
    rng = np.random.default_rng(0)
    label = ROWS.load*10 + rng.normal(0, 1, len(ROWS)) if task == "regression" else pd.Series(np.where(ROWS.load > 1.2, "heavy", np.where(ROWS.depot == "D", "far", "plain")))
    if task == "multiclass": label[ROWS.due_time > FOLDS[2].cut + timedelta(days=2)] = "new"
    frame, params = ROWS.assign(late=label), fixed_params({"rounds": 10, "num_leaves": 7}, 1, 0, task)
    binned = bin_rows(frame, FOLDS, STREAM, toy.view, params, task)
    told = backtest(binned.rows, FOLDS, binned.stream, procedures(binned), losses_of(binned), NOW)
    kept = lost(told, task)
    assert told.folds[RETRAINED][0] < told.folds[BASE][0] and np.isfinite(told.losses[RETRAINED]).all()
    assert next(iter(kept["difference"].values())).n == len(told.losses)


# --- Settings ---

def test_what_the_settings_leave_open_follows_from_the_window(small_settings):
    plan = plan_of(parse_settings(small_settings + "\n[window]\nrule = sliding\ndays = 40\nholdout_days = 30\nwait_days = 3"))
    assert plan == Plan(every="month", folds=6, rule="sliding", days=40, delay_days=3)
    plan = plan_of(parse_settings(small_settings + "\n[backtest]\nevery = quarter\nfolds = 2\ndays = 9\ndelay_days = 1\nfeature_days = 2\nembargo_days = 3\nzone = Europe/Berlin\nknown = queue noted"))
    assert plan == Plan(every="quarter", folds=2, days=9, delay_days=1, feature_days=2, embargo_days=3, zone="Europe/Berlin")


@pytest.mark.parametrize("line, says", [("fold = 3", "did you mean `folds`"), ("every = fortnight", "[backtest] every"), ("folds = 0", "[backtest] folds"), ("known = queue", "[backtest] known")])
def test_a_mistake_is_named(small_settings, line, says):
    with pytest.raises(SettingsError) as e: parse_settings(f"{small_settings}\n[backtest]\n{line}")
    assert says in str(e.value)


def test_a_workbench_without_a_plan_has_the_policy_it_had(small_settings):
    assert "backtest" not in policy(parse_settings(small_settings)) and "backtest" in policy(parse_settings(small_settings + "\n[backtest]\nfolds = 3"))
    known = parse_settings(small_settings + "\n[backtest]\nknown = queue noted")
    assert stream_of(known).known == {"queue": "noted"}
