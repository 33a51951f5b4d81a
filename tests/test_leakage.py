"The leakage guard: every kind of leak, planted, is found by name; where none was planted, nothing is"
import numpy as np
import pandas as pd
import pytest

from retrain_nb.columns import agreement, calibration_of, mixed, rank_correlation, strength_of, target_of, values_of
from retrain_nb.stages.leakage import KINDS, Leakage, Limits, Roles, leakage

N, CUT = 4000, 3000
NUMERIC, NAMES = ["weight", "rain", "stops", "sparse"], ["depot", "driver"]
SEEN = NUMERIC + NAMES
ROLES = Roles(label="y", time="due", label_time="told")
TASKS = ("binary", "words", "classes", "quantity")


def world(task, seed=0):
    "Honest rows: some features tell a little, one is missing by chance, and drivers and depots come again"
    rng = np.random.default_rng([seed, TASKS.index(task)])
    due = pd.date_range("2024-01-01", periods=N, freq="10min", tz="UTC")
    rows = pd.DataFrame({"due": due, "weight": rng.gamma(2, 3, N), "rain": rng.random(N), "stops": rng.integers(1, 40, N),
                         "sparse": np.where(rng.random(N) < 0.3, np.nan, rng.normal(size=N)), "depot": rng.choice(list("ABCD"), N),
                         "driver": [f"d{i}" for i in rng.integers(0, 60, N)]})
    risk = 0.1*(rows.weight - 6) + 2*(rows.rain - 0.5) + (rows.depot == "B") + rng.logistic(size=N)
    labels = {"binary": (risk > 0.3).astype(float), "words": np.where(risk > 0.3, "late", "fine"),
              "classes": np.select([risk < -0.5, risk < 1], ["early", "fine"], "late"), "quantity": (10 + risk + rng.normal(size=N)).round(3)}
    return rows.assign(y=labels[task], told=due + pd.to_timedelta(rng.exponential(3, N), unit="h"))


def number(y): # -> the label as numbers, for planting
    return y.to_numpy(float) if y.dtype != object and y.dtype.kind == "f" else pd.factorize(y, sort=True)[0].astype(float)


def ask(rows, seen=SEEN, roles=ROLES, spoil=None, cut=CUT, **more) -> Leakage:
    "As on the page: training rows are those whose label is known at the cut, and what is open at the end is open"
    start = rows[roles.time].iloc[cut]
    taught, judged = rows[:cut], rows[cut:]
    taught = taught[taught[roles.label_time] <= start]
    if spoil is not None: taught, judged = spoil(taught, judged)
    return leakage(taught, judged, taught[seen], judged[seen], roles, **more)


def found(result): return {(leak.name, leak.column) for leak in result.leaks}


# --- No false alarm ---

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_found_in_clean_rows(task, seed):
    rows = world(task, seed)
    end = rows.due.iloc[-1]
    rows["y"] = rows.y.astype(object).where(rows.told <= end) if rows.y.dtype == object else rows.y.where(rows.told <= end)
    result = ask(rows.assign(told=rows.told.where(rows.told <= end)), as_of=end)
    assert found(result) == set()
    assert result.verdict.outcome == "PASS" and {v.name for v in result.verdict.leaves} == {*KINDS} - {"group"}


@pytest.mark.parametrize("seed", range(5))
def test_a_mean_over_the_past_a_coarse_world_and_a_lag_are_honest(seed):
    rows = world("binary", seed)
    so_far = rows.groupby("driver").y.transform(lambda y: (y.cumsum().shift(fill_value=0) + 1)/(np.arange(len(y)) + 3))
    once = rows.driver.map(rows[:1500].groupby("driver").y.mean())
    rows = rows.assign(so_far=so_far, once=once, lag=rows.y.shift(30))
    assert found(ask(rows, [*SEEN, "so_far", "lag"])) == set()
    assert found(ask(rows[1500:].reset_index(drop=True), [*SEEN, "once"], cut=1500)) == set()
    coarse = rows.assign(stops=rows.stops // 20, heavy=rows.weight > 6) # A handful of different rows: all have doubles
    assert found(ask(coarse, ["stops", "heavy", "depot"])) == set()


# --- Each kind, planted ---

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_a_feature_that_tells_too_much_is_found(task, seed):
    rows = world(task, seed)
    y, rng = number(rows.y), np.random.default_rng(seed)
    told = ask(rows.assign(scan=y + rng.normal(0, 0.2*y.std(), N)), [*SEEN, "scan"])
    assert found(told) == {("too good", "scan")}
    leak, = told.leaks
    assert leak.interval[0] <= leak.value <= leak.interval[1] and leak.value > leak.threshold


@pytest.mark.parametrize("task", TASKS)
def test_the_label_in_disguise_is_found_and_is_certain(task):
    rows = world(task)
    disguises = {"cents": number(rows.y)*-100 + 7} | ({} if task == "quantity" else {"code": rows.y.map({v: f"<{v}>" for v in rows.y.unique()}).astype("category")})
    for name, column in disguises.items():
        result = ask(rows.assign(**{name: column}), [*SEEN, name])
        assert found(result) == {("disguise", name)} and result.verdict.outcome == "FAIL"


@pytest.mark.parametrize("task", ["binary", "quantity"])
def test_columns_that_sum_to_the_label_are_named(task):
    rows = world(task)
    part = np.random.default_rng(0).normal(0, 3, N)
    result = ask(rows.assign(casual=part, registered=number(rows.y) - part), [*SEEN, "casual", "registered"])
    assert ("disguise", "casual + registered") in found(result) and result.verdict.outcome == "FAIL"


@pytest.mark.parametrize("column", [
    lambda n: np.arange(n), lambda n: np.random.default_rng(0).permutation(n)*3.0, lambda n: [f"T{i}" for i in range(n)],
    lambda n: np.arange(n) // 7, lambda n: np.sqrt(np.arange(n)), lambda n: pd.date_range("2024", periods=n, freq="h")])
@pytest.mark.parametrize("task", ["binary", "quantity"])
def test_what_names_rows_is_found(column, task):
    rows = world(task)
    assert found(ask(rows.assign(number=column(N)), [*SEEN, "number"])) == {("identifier", "number")}


@pytest.mark.parametrize("task", ["binary", "words", "quantity"])
@pytest.mark.parametrize("upto", ["training", "all"])
def test_a_mean_that_knows_the_future_is_found(task, upto):
    rows = world(task)
    y = pd.Series(number(rows.y))
    kept = slice(0, CUT) if upto == "training" else slice(None)
    means = y[kept].groupby(rows.driver[kept]).mean()
    result = ask(rows.assign(rate=rows.driver.map(means), told=rows.due), [*SEEN, "rate"], Roles(label="y", time="due", label_time="told"))
    assert found(result) == {("future encoding", "rate")}


def test_of_several_classes_the_mean_of_any_is_found():
    rows = world("classes")
    rate = (rows.y == "early").astype(float).groupby(rows.driver).transform("mean")
    assert found(ask(rows.assign(rate=rate), [*SEEN, "rate"])) == {("future encoding", "rate")}


@pytest.mark.parametrize("task", ["binary", "words", "classes"])
def test_what_is_missing_where_the_outcome_has_one_value_is_found(task):
    rows = world(task)
    rare = rows.y == rows.y.mode()[0] if task == "binary" else rows.y == "late"
    some = rare & (np.random.default_rng(0).random(N) < 0.2) # A fifth of the late ones: no AUC to speak of
    for column in (rows.rain.mask(some), pd.Series(np.where(some, "why", None)), rows.depot.mask(some)):
        assert ("known later", "tail") in found(ask(rows.assign(tail=column), [*SEEN, "tail"]))


@pytest.mark.parametrize("task", TASKS)
def test_what_is_filled_in_with_the_outcome_is_found(task):
    rows = world(task)
    open = rows.told > rows.due.iloc[-1]
    rows["y"] = rows.y.where(~open)
    assert open.sum() >= 10
    waits = rows.assign(told=rows.told.where(~open), signed=rows.weight.mask(open | (rows.index.to_numpy() % 20 == 0)))
    if open.sum() < 20: waits.loc[waits.index[-40::2], "y"] = np.nan; waits.loc[waits.y.isna(), ["signed", "told"]] = [np.nan, pd.NaT]
    assert ("known later", "signed") in found(ask(waits, [*SEEN, "signed"]))


def test_a_declared_moment_after_the_row_is_found_and_is_certain():
    rows = world("binary").assign(seen=lambda r: r.due - pd.Timedelta("1min"))
    roles = Roles(label="y", time="due", label_time="told", known_at={"rain": "seen"})
    assert found(ask(rows, roles=roles)) == set()
    late = rows.assign(seen=rows.seen.mask(rows.index == 17, rows.due + pd.Timedelta("1s")))
    assert found(ask(late, roles=roles)) == {("known later", "rain")} and ask(late, roles=roles).verdict.outcome == "FAIL"
    assert found(ask(late.assign(rain=rows.rain.mask(rows.index == 17)), roles=roles)) == set() # No value, nothing known


@pytest.mark.parametrize("spoil, column", [
    (lambda a, b: (pd.concat([a, b[-3:]]), b), "due"),
    (lambda a, b: (a, pd.concat([a[:3], b])), "due"),
    (lambda a, b: (a.assign(told=a.told.mask(a.index == 5, a.due - pd.Timedelta("1s"))), b), "told"),
    (lambda a, b: (a, b.assign(told=b.due - pd.Timedelta("1s"))), "told"),
    (lambda a, b: (a.assign(told=a.told.mask(a.index == 5, b.due.iloc[1])), b), "told")])
def test_broken_order_in_time_is_found_and_is_certain(spoil, column):
    result = ask(world("binary"), spoil=spoil)
    assert ("time order", column) in found(result) and result.verdict.outcome == "FAIL"


def test_rows_and_outcomes_after_as_of_are_found():
    rows = world("binary")
    assert found(ask(rows, as_of=rows.told.max())) == set()
    assert found(ask(rows, as_of=rows.due.max())) == {("time order", "told")} # Outcomes nobody knew by then
    assert ("time order", "due") in found(ask(rows, as_of=rows.due.iloc[-2]))


@pytest.mark.parametrize("task", TASKS)
def test_rows_in_training_and_test_are_found(task):
    rows = world(task)
    copied = ask(rows, spoil=lambda a, b: (a, pd.concat([b, a[100:150].assign(due=b.due.iloc[0], told=b.due.iloc[0])])))
    assert found(copied) == {("shared rows", "")}
    assert copied.leaks[0].value > copied.leaks[0].threshold == 0


def test_one_who_is_on_both_sides_is_found_where_that_is_declared():
    rows = world("binary").assign(patient=np.arange(N) // 10)
    roles = Roles(label="y", time="due", label_time="told", group=("patient",))
    assert found(ask(rows, roles=roles)) == set()
    assert found(ask(rows.assign(patient=rows.patient.mask(rows.index >= 3900, 3)), roles=roles)) == {("group", "patient")}
    assert found(ask(rows.assign(patient=rows.patient.astype("object").mask(rows.index >= 3900)), roles=roles)) == set() # Nobody is nobody


# --- Flights ---

@pytest.fixture(scope="module")
def flights():
    "January to 15 March, as known on that day, with what nobody may look at"
    from retrain_nb.demo.flights import prepare, read_tables
    published, *rest = read_tables()
    published = published[published.month <= 3]
    rows = prepare(published, *rest)
    hours = published.time_hour.dt.strftime("%Y%m%dT%HZ")
    key = published.carrier.astype(str) + published.flight.astype(str) + "-" + published.origin.astype(str) + "-" + hours
    banned = published[["dep_delay", "tailnum"]].set_axis(key).reindex(rows.flight_id).reset_index(drop=True)
    end = pd.Timestamp("2013-03-15T15:00Z")
    rows = rows.join(banned)[rows.event_time < end]
    known = rows.label_time <= end
    return rows.assign(disrupted=rows.disrupted.astype(float).where(known), label_time=rows.label_time.where(known)), end


def ask_flights(flights, *banned):
    from retrain_nb.demo.flights_view import view
    rows, end = flights
    cut = end - pd.Timedelta("14D")
    taught, judged = rows[(rows.event_time < cut) & (rows.label_time <= cut)], rows[rows.event_time >= cut]
    seen = [*view.columns, *banned]
    return leakage(taught, judged, taught[seen], judged[seen], Roles(label="disrupted", time="event_time", label_time="label_time"), end)


def test_nothing_is_found_in_the_view_of_the_flights(flights):
    assert ask_flights(flights).verdict.outcome == "PASS"


def test_the_departure_delay_and_the_tail_number_are_found(flights):
    result = ask_flights(flights, "dep_delay", "tailnum")
    assert found(result) == {("too good", "dep_delay"), ("known later", "dep_delay"), ("known later", "tailnum")}
    assert result.verdict.outcome == "INSUFFICIENT"


def test_the_flights_take_less_than_a_second(flights):
    import time
    took = []
    for _ in range(3):
        started = time.process_time()
        ask_flights(flights)
        took.append(time.process_time() - started)
    assert min(took) < 1


# --- Verdicts ---

def test_a_suspect_may_be_accepted_by_name_and_stays_visible_and_what_is_certain_may_not():
    rows = world("binary")
    rows = rows.assign(scan=rows.y + np.random.default_rng(0).normal(0, 0.2, N), answer=rows.y*2)
    suspect = ask(rows, [*SEEN, "scan"])
    accepted = ask(rows, [*SEEN, "scan"], limits=Limits(accepted=("scan",)))
    assert (suspect.verdict.outcome, accepted.verdict.outcome) == ("INSUFFICIENT", "PASS")
    assert "accepted by name" in next(v for v in accepted.verdict.leaves if v.name == "too good: scan").reason
    assert ask(rows, [*SEEN, "answer"], limits=Limits(accepted=("answer",))).verdict.outcome == "FAIL"


def test_no_value_is_shown():
    rows = world("binary").assign(secret=lambda r: np.where(r.y == 1, "Ada Lovelace", "4111 1111 1111 1111"), driver=lambda r: "Grace Hopper " + r.driver)
    roles = Roles(label="y", time="due", label_time="told", group=("driver",))
    result = ask(rows, [*SEEN, "secret"], roles)
    assert ("disguise", "secret") in found(result)
    assert not any(word in repr(result) for word in ("Lovelace", "4111", "Hopper"))


@pytest.mark.parametrize("labels", [lambda y: y*np.nan, lambda y: y*0, lambda y: y.where(y.index < 60)])
def test_labels_from_which_nothing_follows_are_no_pass_or_no_finding(labels):
    rows = world("binary")
    result = ask(rows.assign(y=labels(rows.y)))
    assert found(result) == set() and result.verdict.outcome in ("INSUFFICIENT", "PASS")
    assert result.verdict.outcome == "INSUFFICIENT" or rows.y.notna().all()


def test_odd_columns_crash_nothing():
    rows = world("binary").assign(inf=np.inf, none=None, one=1, flag=lambda r: (r.stops > 20).astype("boolean").mask(r.index % 9 == 0),
                                  wide=lambda r: np.where(r.index % 3 == 0, np.inf, r.rain), span=lambda r: r.due - r.due.iloc[0],
                                  mixed=lambda r: [i if i % 2 else str(i) for i in r.stops], whole=lambda r: r.stops.astype("Int64"))
    odd = ["inf", "none", "one", "flag", "wide", "mixed", "whole"]
    assert found(ask(rows, [*SEEN, *odd])) == set()
    assert found(ask(rows, [*SEEN, "span"])) == {("identifier", "span")}
    empty = leakage(rows[:CUT], rows[:0], rows[:CUT][SEEN], rows[:0][SEEN], Roles(label="y"))
    assert empty.verdict.outcome == "PASS" and {v.name for v in empty.verdict.leaves} == {*KINDS} - {"group", "time order", "shared rows"}


def test_ten_thousand_names_and_as_many_classes_cost_little():
    rows = world("binary")
    rng = np.random.default_rng(0)
    assert found(ask(rows.assign(name=rng.integers(0, 1000, N).astype(str)), [*SEEN, "name"])) == set()
    words = rows.assign(y=[f"w{i}" for i in rng.integers(0, 1000, N)])
    assert found(ask(words, SEEN)) == set()
    assert ("disguise", "again") in found(ask(words.assign(again=words.y), [*SEEN, "again"]))


# --- The numbers beneath ---

def test_the_interval_of_an_auc_covers_the_population_and_the_auc_is_the_known_one():
    from sklearn.metrics import roc_auc_score
    rates = 0.1 + 0.1*np.arange(8)
    pairs = [(a, b, rates[a]*(1 - rates[b])) for a in range(8) for b in range(8)]
    truth = sum(w*((a > b) + (a == b)/2) for a, b, w in pairs)/sum(w for *_, w in pairs)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        x = rng.integers(0, 8, 1000)
        y = (rng.random(1000) < rates[x]).astype(float)
        value, low, high = strength_of(x, 9, y, 2)
        assert abs(value - roc_auc_score(y, x)) < 0.03 # The bins rise, so both say nearly the same
        covered += low <= truth <= high
    assert covered >= 190 # Of 198; what the bins mean is learned from the other half, which costs a little


def test_ranks_and_agreement_are_the_known_ones():
    from scipy.stats import spearmanr
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 50).astype(float), rng.integers(0, 6, 50).astype(float)
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    x, y = pd.Series(["a", "b", "a", "b", "a"]), pd.Series([1, 0, 1, 0, 0])
    assert agreement(values_of(x), target_of(y)) == 0.8
    assert agreement(values_of(pd.Series([None, "b", None, "b"])), target_of(pd.Series([1, 0, 1, 0]))) == 1 # Missing is a value too


def test_honest_means_are_as_far_off_as_chance_has_it():
    rng, low = np.random.default_rng(0), 0
    for _ in range(400): # Values are the true rates: the distance is that of chance, and its lower tail is not fat
        rate = rng.uniform(0.2, 0.8, 30).repeat(100)
        low += calibration_of(rate, (rng.random(3000) < rate).astype(float))[1] < 0.05
    assert low <= 36 # 5 % of 400, and 3.6 standard errors


def test_equal_rows_and_no_others_have_equal_numbers():
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, 30, 50_000).astype(float), rng.integers(0, 30, 50_000).astype(float), rng.integers(0, 30, 50_000)*0.5]
    numbers = mixed(columns)
    assert len(np.unique(numbers)) == len(pd.DataFrame(columns).T.drop_duplicates())
    assert (mixed([c[::-1].copy() for c in columns]) == numbers[::-1]).all()


# --- On the page ---

LEAKY = """
from retrain_nb.stages.features import FeatureView
def echo(f): return f.assign(echo=f.late.fillna(0)*0.2 + f.rain*0.1)
view = FeatureView("parcels", ("load", "rain", "hour", "weekday", "echo"), ("depot",), echo, vouched=("echo",))
"""


def test_the_page_hands_a_leak_to_the_gates_and_nobody_can_vouch_for_the_label(tmp_path, monkeypatch):
    import json
    from importlib import import_module
    from pathlib import Path
    (tmp_path/"leaky_view.py").write_text(LEAKY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("retrain_nb.demo.toy.view", import_module("leaky_view").view)
    page = json.loads((Path(__file__).parent.parent/"nbs"/"runs"/"retrain.ipynb").read_text())
    held:dict = {}
    for cell in page["cells"]:
        if cell["cell_type"] == "code": exec(compile("".join(cell["source"]), "page", "exec"), held)
    said = {leaf.name: leaf.outcome for leaf in held["verdict"].leaves}
    assert (said["too good: echo"], said["disguise: rain + echo"]) == ("PASS", "FAIL")
    assert held["verdict"].outcome == "FAIL" and "disguise: rain + echo" in held["verdict"].reason
