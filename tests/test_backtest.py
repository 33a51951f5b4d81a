"What a reader of `12b_backtest` should not see: plans drawn at random, leaks planted one by one, power under dependence, odd input"
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pandas as pd
import pytest

from retrain_nb.records import FAIL, INSUFFICIENT, PASS, DataError, SettingsError
from retrain_nb.stages.backtest import (
    Plan,
    Stream,
    backtest,
    boundaries,
    frame_bytes,
    judged_rows,
    leak,
    origins,
    slow_interval,
    training_rows,
)
from retrain_nb.stages.evaluate import delong
from retrain_nb.stages.train import fixed_params, predict, train
from retrain_nb.tasks import log_losses

FIRST, DAY = datetime(2023, 1, 1, tzinfo=UTC), timedelta(days=1)
NOW = FIRST + 200*DAY
STREAM = Stream("time", "label", "told", {"late_note": "noted"})
PLAN = Plan(every="week", folds=5, days=60, delay_days=5, feature_days=3, embargo_days=1)


def rows(n=1200, seed=0):
    rng = np.random.default_rng(seed)
    time = pd.Series(pd.to_datetime(FIRST) + pd.to_timedelta(np.sort(rng.uniform(0, 200, n)), unit="D")).dt.floor("s")
    entity = rng.integers(0, 60, n)
    x = rng.normal(size=n)
    return pd.DataFrame({
        "time": time, "entity": entity, "x": x, "count": rng.integers(0, 9, n),
        "place": pd.Categorical(rng.choice(list("abc"), n)), "new_place": pd.Categorical(np.where(time > pd.Timestamp(NOW - 20*DAY), "z", "y")),
        "late_note": rng.normal(size=n), "noted": time + pd.to_timedelta(np.where(rng.random(n) < 0.3, 30, -1), unit="D"),
        "label": (rng.random(n) < 1/(1 + np.exp(-x))).astype("int64"), "told": time + pd.to_timedelta(rng.uniform(1, 5, n), unit="D")})


FRAME = rows()
FOLDS = origins(PLAN, FIRST, NOW)


# --- Cuts and folds ---

def test_day_folds_are_those_of_scikit_learn():
    from sklearn.model_selection import TimeSeriesSplit
    days = np.array([FIRST + i*DAY for i in range(12)])
    ours = origins(Plan(every="day", folds=3, days=1, delay_days=2), FIRST, FIRST + 14*DAY)
    for split, (taught, judged) in zip(ours, TimeSeriesSplit(3, gap=2, test_size=1).split(days)):
        assert np.flatnonzero(split.train.contains(days)).tolist() == taught.tolist()
        assert np.flatnonzero(split.test.contains(days)).tolist() == judged.tolist()


@pytest.mark.parametrize("zone, hours", [("Europe/Berlin", {23, 24, 25}), ("UTC", {24}), ("Asia/Kolkata", {24}), ("America/New_York", {23, 24, 25})])
def test_days_begin_at_the_midnight_of_the_zone(zone, hours):
    cuts = boundaries("day", datetime(2023, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC), zone)
    assert {(b - a)/timedelta(hours=1) for a, b in zip(cuts, cuts[1:])} == hours
    assert {(c.tz_convert(zone).hour, c.tz_convert(zone).minute) for c in pd.DatetimeIndex(cuts)} == {(0, 0)}


@pytest.mark.parametrize("every, frequency", [("day", "D"), ("week", "W-MON"), ("month", "MS"), ("quarter", "QS")])
def test_boundaries_are_those_of_pandas(every, frequency):
    for first in (datetime(2023, 1, 1, tzinfo=UTC), datetime(2023, 2, 14, 7, tzinfo=UTC)):
        last = datetime(2025, 3, 3, tzinfo=UTC)
        expected = [d.to_pydatetime() for d in pd.date_range(pd.Timestamp(first).normalize(), last, freq=frequency) if d >= first]
        assert len(expected) > 5 and expected == boundaries(every, first, last)


def test_parts_keep_their_distance_in_plans_drawn_at_random():
    rng, made = np.random.default_rng(0), 0
    for _ in range(300):
        plan = Plan(every=str(rng.choice(["day", "week", "month"])), folds=int(rng.integers(1, 6)), rule=str(rng.choice(["expanding", "sliding"])), days=float(rng.uniform(1, 90)),
                    delay_days=float(rng.uniform(0, 20)), feature_days=float(rng.uniform(0, 20)), embargo_days=float(rng.uniform(0, 3)), zone=str(rng.choice(["UTC", "Europe/Berlin"])))
        try: splits = origins(plan, FIRST, NOW)
        except SettingsError: continue
        made += 1
        assert len(splits) == plan.folds
        for split in splits:
            assert split.cut - split.train.end == timedelta(days=plan.delay_days + plan.feature_days)
            assert split.test.end + timedelta(days=plan.delay_days) <= NOW and split.train.start >= FIRST
            assert split.train.days >= plan.days - 1e-9 if plan.rule == "expanding" else abs(split.train.days - plan.days) < 1e-9
            assert split.train.start == FIRST or plan.rule == "sliding"
        for one, following in zip(splits, splits[1:]):
            assert following.cut - one.test.end == timedelta(days=plan.embargo_days)
    assert made > 100


# --- Leaks ---

def test_what_a_fold_learns_was_known_at_its_cut():
    for split in FOLDS:
        taught, asked = training_rows(FRAME, split, STREAM), judged_rows(FRAME, split, STREAM, NOW)
        slow = FRAME[(FRAME.time >= split.train.start) & (FRAME.time < split.train.end) & (FRAME.told <= split.cut)]
        assert len(taught) == len(slow) > 100 and (taught.label == slow.label.to_numpy()).all() and taught.told.max() <= split.cut
        for part in (taught, asked):
            source = FRAME.set_index("time").loc[part.time]
            assert (part.late_note.isna().to_numpy() == (source.noted > source.index).to_numpy()).all() and 0.1 < part.late_note.isna().mean() < 0.5
            assert "noted" not in part


@pytest.mark.parametrize("label", ["int64", "float64", "text", "category", "bool", "Int64"])
@pytest.mark.parametrize("change", ["delete", "shuffle", "overwrite"])
def test_no_byte_depends_on_what_came_later_whatever_the_types(label, change):
    frame = FRAME.copy()
    if label in ("text", "category"): frame["label"] = frame.label.map({0: "no", 1: "yes"}).astype("category" if label == "category" else object)
    else: frame["label"] = frame.label.astype(label)
    assert leak(frame, FOLDS, STREAM).outcome == PASS
    rng = np.random.default_rng(0)
    for split in FOLDS:
        later = frame.time >= split.cut
        changed = frame[~later] if change == "delete" else frame.copy()
        if change == "shuffle": changed = pd.concat([frame[~later], frame[later].sample(frac=1, random_state=0)])
        if change == "overwrite": changed.loc[later, "x"], changed.loc[later, "count"] = rng.normal(size=later.sum()), 77
        assert frame_bytes(training_rows(changed, split, STREAM)) == frame_bytes(training_rows(frame, split, STREAM))


def base(frame, split): return training_rows(frame, split, STREAM)


LEAKS = {
    "scaled by all rows": lambda f, s: base(f.assign(x=f.x/f.x.std()), s),
    "filled by the mean of all rows": lambda f, s: base(f.assign(count=f["count"].where(f["count"] > 0, f["count"].mean())), s),
    "categories of all rows": lambda f, s: base(f, s).assign(new_place=lambda t: pd.Categorical(t.new_place, sorted(f.new_place.unique()))),
    "the last row of each entity": lambda f, s: base(f.drop_duplicates("entity", keep="last"), s),
    "counted over all rows": lambda f, s: base(f.assign(seen=f.groupby("entity").x.transform("size")), s),
    "rolling, centred": lambda f, s: (lambda t: t[t.time >= s.train.end - 2*DAY])(f.assign(x=f.x.rolling(150, center=True, min_periods=1).mean())[f.time < s.train.end]),
    "labels of today": lambda f, s: f[s.train.contains(f.time) | ((f.time < s.cut) & f.label.notna())].reset_index(drop=True),
    "rows of the test": lambda f, s: f[f.time < s.test.end].drop(columns=["told", "noted"]),
    "target encoded on all rows": lambda f, s: base(f.assign(mean=f.groupby("place", observed=True).label.transform("mean")), s),
    "sorted by the future": lambda f, s: base(f.assign(order=f.groupby("entity").x.transform("max")).sort_values("order").drop(columns="order"), s),
    "one bit": lambda f, s: base(f, s).assign(x=lambda t: t.x + (len(f) == len(FRAME))*np.spacing(t.x)*(np.arange(len(t)) == 3)),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_found(name):
    found = leak(FRAME, FOLDS, STREAM, LEAKS[name])
    assert found.outcome == FAIL and "2023-" in found.reason, found


def test_the_column_that_leaks_is_named():
    assert "column(s) x" in leak(FRAME, FOLDS, STREAM, LEAKS["one bit"]).reason
    assert "rows instead of" in leak(FRAME, FOLDS, STREAM, LEAKS["rows of the test"]).reason


@pytest.mark.parametrize("make, says", [
    (lambda f, s: 1/0, "the check crashed: ZeroDivisionError"), (lambda f, s: base(f, s).iloc[:0], "learns from nothing"), (lambda f, s: "", "learns from nothing")])
def test_nothing_compared_is_no_proof(make, says):
    found = leak(FRAME, FOLDS, STREAM, make)
    assert found.outcome == INSUFFICIENT and says in found.reason
    assert leak(FRAME, (), STREAM).outcome == INSUFFICIENT


def fitted(frame, split, features=("x", "count"), peek=False):
    taught = base(frame.assign(tomorrow=frame.x.shift(-400)) if peek else frame, split)
    return train(taught[[*features, *(["tomorrow"] if peek else [])]], taught.label, fixed_params({"rounds": 5, "num_leaves": 7}, 1, 0))


def test_the_bytes_of_a_model_are_compared_too():
    assert leak(FRAME, FOLDS[-2:], STREAM, fitted).outcome == PASS
    found = leak(FRAME, FOLDS[-2:], STREAM, partial(fitted, peek=True))
    assert found.outcome == FAIL and "its bytes" in found.reason


def test_labels_shuffled_leave_nothing_to_learn():
    frame = rows(4000, 3)
    frame["label"] = np.random.default_rng(0).permutation(frame.label)
    learned = lambda taught, asked: predict(train(taught[["x", "count"]], taught.label, fixed_params({"rounds": 20}, 1, 0)), asked[["x", "count"]])
    again = backtest(frame, FOLDS, STREAM, {"trees": learned, "none": lambda t, a: np.full(len(a), t.label.mean())}, lambda y, p: p, NOW).losses
    y = pd.concat([judged_rows(frame, s, STREAM, NOW) for s in FOLDS]).label.to_numpy()
    test = delong(y, again.trees.to_numpy(), again.none.to_numpy())
    assert abs(test["auc_a"] - 0.5) <= 3*test["var_a"]**0.5


# --- Intervals under dependence ---

def series(rho, T, rng):
    x = np.zeros(T)
    for i, e in enumerate(rng.normal(size=T)): x[i] = rho*x[i - 1] + e if i else e/(1 - rho*rho)**0.5
    return x


def interval(x): return slow_interval(float(x.mean()), (x - x.mean())/len(x), len(x), 0.95)


def test_and_it_finds_what_it_says_it_can_find():
    rng, found, said = np.random.default_rng(2), 0, []
    true = 3.0*(1/0.16/250)**0.5 # Three standard errors of a mean with rho 0.6
    for _ in range(300):
        e = slow_interval(float((x := series(0.6, 250, rng) + true).mean()), (x - x.mean())/250, 250, 0.90)
        found, said = found + (e.low > 0), [*said, e.detectable]
    assert found/300 > 0.85 and np.mean(said) == pytest.approx(2.6*true/3.0, rel=0.15)


def test_seasons_of_a_week_do_not_fool_it():
    rng, ours = np.random.default_rng(3), 0
    for _ in range(400):
        x = rng.normal(size=210) + 2*np.sin(2*np.pi*(np.arange(210)/7 + rng.random()))
        ours += interval(x).low <= 0 <= interval(x).high
    assert ours/400 >= 0.87


# --- The driver, and odd input ---

def test_a_backtest_is_what_one_would_have_computed_by_hand():
    told = backtest(FRAME, FOLDS, STREAM, {"mean": lambda t, a: np.full(len(a), t.label.mean()), "half": lambda t, a: np.full(len(a), 0.5)}, log_losses, NOW)
    for i, split in enumerate(FOLDS):
        taught = FRAME[(FRAME.time >= split.train.start) & (FRAME.time < split.train.end) & (FRAME.told <= split.cut)]
        judged = FRAME[(FRAME.time >= split.cut) & (FRAME.time < split.test.end) & (FRAME.told <= NOW)]
        assert told.folds.loc[i, "mean"] == pytest.approx(log_losses(judged.label.to_numpy(), np.full(len(judged), taught.label.mean())).mean(), rel=1e-12)
        assert (told.folds.taught[i], told.folds.judged[i]) == (len(taught), len(judged))
    e = told.difference("mean", "half", 0.9)
    assert e.value == pytest.approx((told.losses["mean"] - told.losses.half).mean()) and e.n == len(told.losses)
    assert told.difference("half", "mean", 0.9).low == pytest.approx(-e.high)


def test_no_procedure_sees_the_outcome():
    seen = []
    backtest(FRAME, FOLDS, STREAM, {"spy": lambda t, a: seen.append(set(a.columns)) or np.full(len(a), 0.5)}, log_losses, NOW)
    assert all(not {"label", "told", "noted"} & columns for columns in seen) and len(seen) == 5


@pytest.mark.parametrize("call, error, says", [
    (lambda: Plan(folds=0), SettingsError, "folds 0"), (lambda: Plan(rule="widening"), SettingsError, "rule 'widening'"), (lambda: Plan(days=float("nan")), SettingsError, "days nan"),
    (lambda: Plan(delay_days=-1), SettingsError, "delay_days -1"), (lambda: origins(Plan(every="fortnight"), FIRST, NOW), SettingsError, "no folds by `fortnight`"),
    (lambda: origins(Plan(zone="Mars/Olympus"), FIRST, NOW), SettingsError, "no time zone"), (lambda: origins(Plan(every="day", days=9, embargo_days=1), FIRST, NOW), SettingsError, "leaves nothing of a day"),
    (lambda: origins(Plan(folds=7), FIRST, NOW), SettingsError, "of 7 wanted fit"),
    (lambda: backtest(FRAME, (), STREAM, {}, log_losses, NOW), DataError, "no folds"),
    (lambda: backtest(FRAME[FRAME.time < FOLDS[0].cut], FOLDS, STREAM, {}, log_losses, NOW), DataError, "0 test rows"),
    (lambda: backtest(FRAME, FOLDS, STREAM, {"odd": lambda t, a: np.full(len(a), np.nan)}, log_losses, NOW), DataError, "procedure `odd` gave .* not finite"),
    (lambda: slow_interval(0.0, np.zeros(11), 11, 0.9), DataError, "11 periods are too few")])
def test_odd_input_is_refused_by_name(call, error, says):
    with pytest.raises(error, match=says): call()
