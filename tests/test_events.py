"Events: any order, duplication, batching and sealing of arrivals; two writers, kills, damage; on SQLite and PostgreSQL"
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retrain_nb.digest import canonical
from retrain_nb.events import LATEST, Event, Refused, conflict, data_text, find_zone, parse_event
from retrain_nb.loop import retention
from retrain_nb.loop.audit import audit_book, verify
from retrain_nb.loop.custody import export
from retrain_nb.records import DataError, LockedError, RetrainError, VerificationError
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.settings import parse_settings
from retrain_nb.stages.signals import training_frame
from retrain_nb.stages.tabular import columns_of, frame_of, id_hashes, tabulate, types_of
from retrain_nb.stores import events as store_of
from retrain_nb.stores import ledger
from retrain_nb.stores.database import open_database, reading
from retrain_nb.stores.events import Arrival, Events, arrive
from retrain_nb.stores.snapshots import Snapshots
from retrain_nb.windows import iso

NOW = datetime(2014, 1, 1, tzinfo=UTC)
START = datetime(2013, 5, 31, 22, tzinfo=UTC) # So that a day of hours spans two months
NAMES = dict(key="flight", time="due", label="late", label_time="told")


def hour(n): return START + timedelta(hours=n)


def prediction(n, due, known=None, **features):
    return {"kind": "prediction", "id": f"F{n}", "subject": f"line {n % 3}", "event_time": iso(hour(due)), "known_at": iso(hour(due if known is None else known)), "data": {"features": features}}


def outcome(n, subject, known, value):
    return {"kind": "outcome", "id": f"O{n}", "subject": f"F{subject}", "event_time": iso(hour(min(known, 3))), "known_at": iso(hour(known)), "data": {"value": value}}


class Kept:
    "A store with a database, and a list that plays the ledger"
    def __init__(self, url, folder):
        self.engine, self.noted = open_database(url), []
        self.events = Events(folder, lambda c: list(self.noted))
    def take(self, sent, now=NOW, origin=""):
        with self.engine.begin() as c: return self.events.accept(c, [s if isinstance(s, Arrival) else arrive(s, now, origin=origin) for s in sent], now)
    def seal(self):
        with reading(self.engine) as c: sealing = self.events.gather(c)
        if sealing is None: return
        with self.engine.begin() as c: self.events.finish(c, sealing, NOW)
        self.noted += sealing.segments
    def table(self, kind, table, now=NOW, **more):
        with reading(self.engine) as c: sealing = self.events.gather_table(c, kind, table, now, **more)
        with self.engine.begin() as c: self.events.finish(c, sealing, now)
        self.noted += sealing.segments
        return sealing
    def read(self, kind, as_of=LATEST, **more):
        with reading(self.engine) as c: return self.events.read(c, kind, as_of, **more)
    def training(self, as_of, **more):
        outcomes = self.read("outcome", as_of, columns=["subject", "event_time", "known_at", "value"])
        return training_frame(self.read("prediction", as_of, end=as_of, **more), outcomes, as_of, **NAMES)
    def letters(self, **more):
        with reading(self.engine) as c: return store_of.dead_letters(c, **more)


@pytest.fixture
def kept(database_url, tmp_path):
    made = Kept(database_url, tmp_path/"signals")
    yield made
    made.engine.dispose()


@pytest.fixture(scope="module")
def empty(tmp_path_factory): # A database to be copied: making one takes longer than an example
    path = tmp_path_factory.mktemp("empty")/"ledger.db"
    open_database(f"sqlite:///{path}").dispose()
    return path


# --- A training set does not depend on how its events arrived ---

def oracle(sent, as_of): # What was known at `as_of`, in the slowest and plainest way: rows as dicts, in order
    known = {}
    for e in sent:
        if datetime.fromisoformat(e["known_at"]) <= as_of: known[e["kind"], e["id"]] = e
    rows = []
    for (kind, id), e in known.items():
        if kind != "prediction" or datetime.fromisoformat(e["event_time"]) >= as_of: continue
        told = [o for (k, _), o in known.items() if k == "outcome" and o["subject"] == id]
        newest = max(told, key=lambda o: (o["known_at"], o["event_time"], o["data"]["value"] is None, o["data"]["value"]), default={"data": {"value": None}, "known_at": None})
        value = newest["data"]["value"]
        rows.append({"flight": id, "due": e["event_time"], "late": value, "told": None if value is None else newest["known_at"], **{k: v for k, v in e["data"]["features"].items() if v is not None}})
    return sorted(rows, key=lambda r: (r["due"], r["flight"]))


def rows_of(frame): # A frame in the oracle's words
    rows = []
    for row in frame.to_dict("records"):
        plain = {k: iso(v.to_pydatetime()) if isinstance(v, pd.Timestamp) else v for k, v in row.items() if not (v is None or v is pd.NaT or isinstance(v, float) and np.isnan(v))}
        rows.append({"late": None, "told": None, **plain})
    return rows


FEATURES = st.fixed_dictionaries({}, optional={"x": st.one_of(st.integers(-2, 2), st.sampled_from([0.5, -0.0, 1e-7, 1e17]), st.none()), "carrier": st.sampled_from(["UA", "DL", "ü"]),
                                               "gate": st.one_of(st.integers(0, 2), st.sampled_from(["B12", "a b"]))})
HOURS = st.integers(0, 12)


@st.composite
def histories(draw): # Events, and two ways in which they may arrive: batches of arrivals with repetitions, each sealed or not
    sent = [prediction(n, due, due + draw(st.integers(0, 4)), **draw(FEATURES)) for n, due in enumerate(draw(st.lists(HOURS, min_size=1, max_size=6)))]
    sent += [outcome(n, *draw(st.tuples(st.integers(0, 6), HOURS, st.sampled_from([0, 1, 0.5, None])))) for n in range(draw(st.integers(0, 6)))]
    def way():
        order = draw(st.permutations(sent + draw(st.lists(st.sampled_from(sent), max_size=4))))
        cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=3)))
        return [(order[a:b], draw(st.sampled_from(["keep", "seal", "table"]))) for a, b in zip([0, *cuts], [*cuts, len(order)])]
    return sent, [way(), way()]


def as_table(sent): # Events of one kind as a table
    flat = [{"id": e["id"], "subject": e["subject"], "event_time": datetime.fromisoformat(e["event_time"]), "known_at": datetime.fromisoformat(e["known_at"]),
             **{f"features.{k}": v for k, v in e["data"].get("features", {}).items()}, **{k: v for k, v in e["data"].items() if k != "features"}} for e in sent]
    names = list(dict.fromkeys(k for row in flat for k in row))
    return pa.table({k: pa.array([row.get(k) for row in flat], pa.timestamp("us", "UTC") if k in ("event_time", "known_at") else None) for k in names})


def plain(sent, kind): # What can stand in a table: columns of one type, and no outcome taken back
    types = {k: {type(e["data"]["features"].get(k)) is str for e in sent if e["kind"] == kind and e["data"].get("features", {}).get(k) is not None} for k in ("x", "carrier", "gate")}
    return [e for e in sent if e["kind"] == kind and e["data"].get("value", 0) is not None and all(len(t) < 2 for t in types.values())]


def in_text(frame): # Columns of numbers and texts, which a snapshot refuses by their name, as text
    return frame.assign(**{c: frame[c].map(repr) for c in frame if frame[c].dtype == object})


def slow_column(values): # What a column of a frame is, one value after the other: type and values
    types = {type(v) for v in values if v is not None}
    if types <= {int, float}: return "float64", [None if v is None else float(v) for v in values]
    return ("category" if types == {str} else "object"), values


@st.composite
def cut_rows(draw): # Rows that are wanted in order of time, and tables with others among them, each in order, as months and a buffer may give them
    made = [(f"P{n}", "s", at, at, json.dumps({"features": draw(FEATURES)})) for n, at in enumerate(draw(st.lists(st.integers(0, 9), max_size=12)))]
    rows, cuts = sorted(made, key=lambda r: (r[2], r[0])), sorted(draw(st.lists(st.integers(0, 12), max_size=4)))
    mixed = rows if draw(st.booleans()) else draw(st.permutations(rows))
    wanted = draw(st.sets(st.sampled_from(rows))) if rows and draw(st.booleans()) else set(rows)
    tables = [(part, *tabulate(part)) for part in (sorted(mixed[a:b], key=lambda r: (r[2], r[0])) for a, b in zip([0, *cuts], [*cuts, 12]))]
    return [r for r in rows if r in wanted], [(t.filter(pa.array([r in wanted for r in part], pa.bool_())), kinds) for part, t, kinds in tables]


@settings(max_examples=200, deadline=None)
@given(cut_rows(), st.integers(0, 3))
def test_a_frame_is_the_same_however_its_rows_lie_in_tables(cut, spare):
    rows, tables = cut
    frame = frame_of(iter(tables), types_of(kinds for _, kinds in tables), len(rows) + spare, ["id", "event_time"], None)
    data = [{f"features.{k}": v for k, v in json.loads(r[4])["features"].items() if v is not None} for r in rows]
    assert list(frame) == ["id", "event_time", *sorted({c for d in data for c in d})]
    assert frame["id"].tolist() == [r[0] for r in rows] and frame["event_time"].tolist() == [pd.Timestamp(r[2], unit="us", tz="UTC") for r in rows]
    for c in frame.columns[2:]:
        dtype, values = slow_column([d.get(c) for d in data])
        assert (str(frame[c].dtype), [None if pd.isna(v) else v for v in frame[c]]) == (dtype, values), c
        if dtype == "category": assert list(frame[c].cat.categories) == sorted({v for v in values if v is not None})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_any_order_duplication_batching_and_sealing_gives_the_same_training_sets(empty, tmp_path_factory, history):
    sent, ways = history
    found = []
    for way in ways:
        root = tmp_path_factory.mktemp("kept")
        shutil.copy(empty, root/"ledger.db")
        kept = Kept(f"sqlite:///{root}/ledger.db", root/"signals")
        for batch, then in way:
            tables = [plain(batch, kind) for kind in ("prediction", "outcome")] if then == "table" else []
            for those in tables:
                if those: kept.table(those[0]["kind"], as_table(those))
            rest = [e for e in batch if not any(e is t for those in tables for t in those)]
            assert kept.take(rest).refused == 0
            if then == "seal": kept.seal()
        moments = [hour(n) for n in range(0, 18, 3)]
        frames = [kept.training(as_of) for as_of in moments]
        for as_of, frame in zip(moments, frames): assert rows_of(frame) == oracle(sent, as_of)
        shelf = Snapshots(root/"snapshots")
        found.append([shelf.freeze(in_text(frame), "due").digest for frame in frames if len(frame)])
        kept.engine.dispose()
        shutil.rmtree(root)
    assert found[0] == found[1]


def test_labels_that_come_three_days_late_change_what_is_known_after_and_nothing_before(kept):
    sent = [prediction(n, n, carrier="UA", x=n) for n in range(10)]
    kept.take(sent + [outcome(n, n, n + 3, n % 2) for n in range(5)])
    moments = [hour(n) for n in range(0, 120, 6)]
    before = [kept.training(m) for m in moments]
    kept.seal()
    kept.take([outcome(n, n, 72 + n, 1) for n in range(5, 10)] + [outcome(20, 0, 80, 1)]) # And one correction
    for as_of, was in zip(moments, before):
        now = kept.training(as_of)
        if as_of < hour(77): pd.testing.assert_frame_equal(now, was)
        else: assert now.late.notna().sum() > was.late.notna().sum()
    assert [kept.training(hour(n)).late[0] for n in (79, 80)] == [0, 1]


def test_a_window_and_columns_are_those_of_the_whole(kept):
    sent = [prediction(n, n % 90, known=n % 90 + n % 7, x=n, carrier="UAB"[n % 3], **({"rare": 1} if n == 50 else {})) for n in range(100)]
    kept.take(sent[:40])
    kept.seal()
    kept.take(sent[40:70])
    kept.seal()
    kept.take(sent[70:])
    for as_of, start, end in ((90, None, None), (40, 5, 30), (50, 26, 26.5), (200, None, 3), (3, 2, 90)):
        got = kept.read("prediction", hour(as_of), start=None if start is None else hour(start), end=None if end is None else hour(end), columns=["id", "features.x", "features.gone"])
        want = [s for s in sent if datetime.fromisoformat(s["known_at"]) <= hour(as_of) and (start is None or datetime.fromisoformat(s["event_time"]) >= hour(start)) and (end is None or datetime.fromisoformat(s["event_time"]) < hour(end))]
        want.sort(key=lambda s: (s["event_time"], s["id"]))
        assert list(got) == ["id", "features.x", "features.gone"] and got["features.gone"].isna().all()
        assert (got["id"].tolist(), got["features.x"].tolist()) == ([s["id"] for s in want], [s["data"]["features"]["x"] for s in want])
    assert "features.rare" in kept.read("prediction", hour(200)) and "features.rare" not in kept.read("prediction", hour(45)) # A column in which nothing was known is not there


def test_segments_outside_the_window_are_not_opened(kept, monkeypatch):
    kept.take([prediction(n, 24*40*n, x=n) for n in range(4)])
    kept.seal()
    opened = []
    monkeypatch.setattr(Events, "get", lambda self, sha: opened.append(sha) or self.path(sha).read_bytes())
    assert len(kept.read("prediction", LATEST, start=hour(24*39), end=hour(24*50))) == 1 and len(opened) == 1
    opened.clear()
    assert len(kept.read("prediction", hour(1))) == 1 and len(opened) == 1 # Of the others nothing was known yet


# --- One event ---

JSON = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.one_of(st.integers(-2**53 + 1, 2**53 - 1), st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
                       st.floats(allow_nan=False, allow_infinity=False).map(lambda x: int(x) if x.is_integer() and abs(x) < 2**53 else x)), max_size=6)


@settings(max_examples=400, deadline=None)
@given(JSON)
@example({"x": 2.0**53})
@example({"x": -1e16 + 2})
def test_the_quick_way_writes_canonical_json(data): assert data_text(data) == canonical(data).decode()


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.datetimes()), lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner))),
       st.sampled_from(["kind", "id", "subject", "event_time", "known_at", "ahead", "data", "new"]))
def test_whatever_is_sent_it_is_an_event_or_a_reason(anything, field):
    for given_ in (anything, prediction(1, 1, x=1) | {field: anything}, prediction(1, 1) | {"data": {"features": {"x": anything}, "score": anything}}):
        found = parse_event(given_, NOW)
        assert isinstance(found, Event | Refused)
        assert len(str(found)) < 1000 if isinstance(found, Refused) else parse_event(store_of.sending(found), NOW) == found


@pytest.mark.parametrize("change, field, why", [
    ({"event_time": "2013-06-01T06:00"}, "event_time", "no time zone"), ({"event_time": 1370066400}, "event_time", "not a time"), ({"event_time": "2013-06-31T06:00Z"}, "event_time", "not a time"),
    ({"event_time": datetime(2013, 6, 1)}, "event_time", "no time zone"), ({"event_time": "2013-06-01T06:00:00.1234567Z"}, "event_time", "finer"), ({"event_time": "0001-01-01T00:00Z"}, "event_time", "not between"),
    ({"event_time": "0001-01-01T00:00+14:00"}, "event_time", "not between"), ({"event_time": iso(NOW + timedelta(hours=1)), "known_at": None}, "event_time", "still to come"), ({"known_at": iso(NOW + timedelta(hours=1))}, "known_at", "still to come"),
    ({"known_at": iso(hour(-1))}, "known_at", "before event_time"), ({"id": "x"*10_240}, "id", "10,240 characters"), ({"id": "a\nb"}, "id", r"U\+000A"), ({"id": "\ud800"}, "id", r"U\+D800"), ({"id": ""}, "id", "empty"),
    ({"id": None}, "id", "not text"), ({"id": 7}, "id", "not text"), ({"subject": "\x85"}, "subject", r"U\+0085"), ({"kind": "Prediction"}, "kind", "none of prediction"), ({"kind": None}, "kind", "none of"),
    ({"extra": 1}, "extra", "no such field"), ({"data": []}, "data", "not an object"), ({"data": {}}, "data.features", "missing"), ({"data": {"features": {}, "value": 1}}, "data.value", "no such field"),
    ({"data": {"features": {"x": float("nan")}}}, "data.features", "`x`: nan"), ({"data": {"features": {"x": float("inf")}}}, "data.features", "inf"), ({"data": {"features": {"x": 2**53}}}, "data.features", "too large"),
    ({"data": {"features": {"x": {}}}}, "data.features", "not a number"), ({"data": {"features": {"x": "y"*3000}}}, "data.features", "3,000 characters"), ({"data": {"features": {"x": "a\x00"}}}, "data.features", r"U\+0000"),
    ({"data": {"features": {"": 1}}}, "data.features", "empty"), ({"data": {"features": {i: 1 for i in range(3)}}}, "data.features", "not text"), ({"data": {"features": {str(i): 1 for i in range(3000)}}}, "data.features", "3,000 names"),
    ({"data": {"features": {}, "score": {}}}, "data.score", "without a class"), ({"data": {"features": {}, "model": "abc"}}, "data.model", "no digest"), ({"data": {"features": {}, "latency_ms": -1}}, "data.latency_ms", "negative"),
    ({"ahead": "yes"}, "ahead", "neither true nor false")])
def test_what_is_wrong_is_named(change, field, why):
    found = parse_event(prediction(1, 1) | change, NOW)
    assert isinstance(found, Refused) and found.field == field and re.search(why, found.why), found


def test_local_times_that_name_no_moment_are_refused_and_others_taken():
    zone, sent = find_zone("America/New_York"), prediction(1, 1)
    local = {"2013-11-03T01:30": "twice", "2013-03-10T02:30": "skipped", "2013-11-03T02:30": "2013-11-03T07:30:00Z", "2013-11-03T01:30-04:00": "2013-11-03T05:30:00Z", "2013-07-01T12:00": "2013-07-01T16:00:00Z"}
    for text, wanted in local.items():
        found = parse_event(sent | {"event_time": text, "known_at": None}, NOW, zone)
        assert wanted in found.why if isinstance(found, Refused) else iso(found.event_time) == wanted
    mixed = [parse_event(sent | {"event_time": t, "known_at": None}, NOW).event_time for t in ("2013-06-01T12:00+02:00", "2013-06-01T06:00-04:00", "2013-06-01T10:00Z")]
    assert len(set(mixed)) == 1
    aware = datetime(2013, 11, 3, 1, 30, tzinfo=zone)
    assert parse_event(sent | {"event_time": aware, "known_at": None}, NOW).field == "event_time"
    assert parse_event(sent | {"event_time": pd.Timestamp("2013-06-01T10:00Z"), "known_at": None}, NOW).event_time == mixed[0]
    assert parse_event(sent | {"event_time": pd.Timestamp("2013-06-01T10:00:00.000000001Z"), "known_at": None}, NOW).field == "event_time"


def test_a_stamp_never_lies_before_what_happened_and_is_no_content():
    sent = {k: v for k, v in prediction(1, 1).items() if k != "known_at"} | {"event_time": iso(NOW + timedelta(minutes=4))}
    first, second = (parse_event(sent, now) for now in (NOW, NOW + timedelta(days=1)))
    assert first.known_at == first.event_time and second.known_at == NOW + timedelta(days=1)
    assert first.digest == second.digest and conflict(first, second) == ""
    assert "known_at was" in conflict(first, parse_event(sent | {"known_at": iso(NOW + timedelta(minutes=4, seconds=1))}, NOW + timedelta(hours=1)))


# --- What was refused ---

def test_dead_letters_keep_what_was_sent_bounded_counted_and_listed(kept):
    odd = [prediction(1, 1) | {"id": "a\x00b"}, prediction(1, 1) | {"id": "\ud800"}, "no object", None, prediction(1, 1) | {"id": "x"*10_240}, {"data": b"bytes"}, {1: {2}}]
    for times in (1, 2, 3):
        got = kept.take([arrive(o, NOW, origin="odd\x00.jsonl", row=n) for n, o in enumerate(odd, 1)])
        assert (got.refused, got.accepted) == (len(odd), 0) and all(a.startswith("refused: ") for a in got.answers)
        listed = kept.letters(limit=100)
        assert sorted(letter["row"] for letter in listed) == list(range(1, len(odd) + 1)) and {letter["times"] for letter in listed} == {times}
    assert max(len(letter["raw"]) for letter in listed) == store_of.RAW and max(letter["size"] for letter in listed) > 10_240
    assert kept.letters(origin="odd\x00.jsonl", limit=1)[0]["origin"] == "odd\\x00.jsonl" and kept.letters(origin="other") == []
    with reading(kept.engine) as c: assert store_of.count_letters(c) == {"letters": len(odd), "times": 3*len(odd)}


def test_equal_content_is_harmless_and_other_content_is_refused_hot_and_sealed(kept):
    sent = prediction(1, 1, x=1)
    other = [sent | {"data": {"features": {"x": 2}}}, sent | {"subject": "else"}, sent | {"event_time": iso(hour(0))}, sent | {"known_at": iso(hour(2))}, prediction(1, 1, x=1, y=None, z=3)]
    assert kept.take([sent, sent, {k: v for k, v in sent.items() if k != "known_at"}]).answers == ("accepted", "already there", "already there")
    arrival = arrive(prediction(2, 2), NOW)
    assert kept.take([arrival, arrival]).answers == ("accepted", "already there") # The very same object twice
    for _ in range(2):
        got = kept.take([*other, sent | {"kind": "interaction", "data": {"name": "seen"}}, prediction(1, 1, x=1.0, y=None)])
        assert [a.split(":")[0] for a in got.answers[:-2]] == ["refused"]*len(other) and got.answers[-1] == "already there" # Another kind may have the same id
        kept.seal()
    assert {letter["times"] for letter in kept.letters()} == {2} and len(kept.read("prediction")) == 2


# --- A table is judged as its rows are one by one ---

def test_a_table_is_judged_as_its_rows_one_by_one(kept, empty, tmp_path):
    rng, n = random.Random(0), 400
    rows = [{"id": f"F{i % 370}", "subject": "s", "event_time": hour(i % 50), "known_at": hour(i % 50 + 1), "features.x": i/7, "features.carrier": "UA", "score": .5, "model": "ab"*32, "latency_ms": 1.5, "status": "ok", "arm": "champion"} for i in range(n)]
    faults = [("id", ["", "a\nb", "x"*300, None, " "]), ("subject", ["\x85", None]), ("event_time", [hour(10**5), None, datetime(1600, 1, 1, tzinfo=UTC)]), ("known_at", [hour(-5), hour(10**5), None]),
              ("features.x", [float("nan"), float("inf"), None, -0.0, 2.0**60]), ("features.carrier", ["a\x00", "y"*3000, None, "ü"]), ("score", [float("nan"), None]), ("model", ["abc", None]), ("latency_ms", [-1.0, None]),
              ("status", ["", None]), ("arm", ["\u2028", "z"*201])]
    for row in rng.sample(rows, 150):
        name, values = rng.choice(faults)
        row[name] = rng.choice(values)
    table = pa.table({k: pa.array([r[k] for r in rows], pa.timestamp("us", "UTC") if k.endswith(("_time", "_at")) else None) for k in rows[0]})
    shutil.copy(empty, tmp_path/"other.db")
    single = Kept(f"sqlite:///{tmp_path}/other.db", tmp_path/"other")
    def as_sent(r):
        data = {"features": {k[9:]: r[k] for k in ("features.x", "features.carrier")}, **{k: r[k] for k in ("score", "model", "latency_ms", "status", "arm")}}
        return {"kind": "prediction", **{k: r[k] for k in ("id", "subject", "event_time", "known_at") if r[k] is not None}, "data": data}
    for _ in range(2): # The second time all is there already
        whole = kept.table("prediction", table, origin="t.parquet").receipt
        one = single.take([arrive(as_sent(r), NOW, origin="t.parquet", row=i + 1) for i, r in enumerate(rows)])
        assert (whole.accepted, whole.there, whole.refused) == (one.accepted, one.there, one.refused) and min(one.accepted, one.refused) + one.there > 20
        told = [sorted((letter["row"], letter["field"], letter["reason"], letter["times"]) for letter in k.letters(limit=1000)) for k in (kept, single)]
        assert told[0] == told[1]
    pd.testing.assert_frame_equal(kept.read("prediction"), single.read("prediction"))
    assert kept.take([as_sent(r) for r in rows]).accepted == 0 and single.table("prediction", table).receipt.accepted == 0 # Each knows what came in by the other way
    single.engine.dispose()


def test_a_table_that_cannot_be_events_is_refused_whole_by_its_column(kept):
    good = as_table([prediction(n, n, x=n) for n in range(3)])
    bad = {"`event_time` holds times without a time zone": good.set_column(2, "event_time", good["event_time"].cast(pa.timestamp("us"))), "`event_time` is string": good.set_column(2, "event_time", pa.array(["2013-06-01"]*3)),
           "no column `id`": good.drop_columns(["id"]), "`x` is no field": good.rename_columns(["id", "subject", "event_time", "known_at", "x"]), "appears twice": good.rename_columns(["id", "id", "event_time", "known_at", "features.x"]),
           "`features.x` is list": good.set_column(4, "features.x", pa.array([[1]]*3)), "`id` holds numbers": good.set_column(0, "id", pa.array([1, 2, 3])), "Round times to microseconds": good.set_column(2, "event_time", pa.array([1, 2, 3], pa.timestamp("ns", "UTC"))),
           "`features.` is no field": good.rename_columns(["id", "subject", "event_time", "known_at", "features."]), "`arm.x` is no field": good.rename_columns(["id", "subject", "event_time", "known_at", "arm.x"]), "is no field": good.rename_columns(["id", "subject", "event_time", "known_at", "score.a\n"])}
    for said, table in bad.items():
        with pytest.raises(DataError, match=said): kept.table("prediction", table)
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")])
    with pytest.raises(DataError, match="damaged"): kept.table("prediction", good.slice(0, 1).set_column(1, "subject", broken))
    assert kept.read("prediction").empty and kept.letters() == []
    assert kept.table("prediction", good.slice(0, 0)).receipt.accepted == 0
    wide = columns_of("outcome", pa.table({"id": pa.array(["a"], pa.large_string()), "subject": pa.array(["b"]).dictionary_encode(), "event_time": good["event_time"][:1], "value": pa.array([True])}))
    assert wide.schema.field("value").type == pa.float64() and wide["subject"].to_pylist() == ["b"]


def test_every_kind_comes_back_as_it_was_hot_and_sealed(kept):
    data = {"prediction": {"features": {"a.b": 1, "t": "x"}, "score": {"yes": .25, "no": .75}, "model": "ab"*32, "arm": "shadow", "latency_ms": 1.5, "status": "ok"}, "outcome": {"value": "class 1"},
            "request": {"status": 200, "latency_ms": 3, "route": "/v1/score"}, "interaction": {"name": "click", "value": "on"}, "metric": {"name": "sales", "value": 12.5, "unit": "CHF"}}
    sent = [{"kind": k, "id": "1", "subject": "s", "event_time": iso(hour(1)), "known_at": iso(hour(2)), "data": d} for k, d in data.items()]
    sent += [s | {"id": "2", "data": {"value": None}} for s in sent if s["kind"] == "outcome"] + [sent[0] | {"id": "2", "data": {"features": {}, "score": .5}}]
    wanted = [parse_event(s, NOW) for s in sent]
    assert kept.take(sent).accepted == len(sent)
    for _ in range(2):
        for e in wanted:
            with reading(kept.engine) as c: assert kept.events.find(c, e.kind, [e.id]) == {e.id: e}
        assert kept.take(sent).there == len(sent)
        kept.seal()


def test_hashes_of_ids_are_what_they_were(): # Sealed hashes are searched by these: a pandas that hashes otherwise must not be used
    assert [hex(h) for h in id_hashes(["", "F0", "flight-ü", "x"*200])] == ["0x186da64456263a46", "0xc7058024986d861a", "0x78e46621d501ef54", "0xecff49800710411"]


def test_ids_with_equal_hashes_are_told_apart(kept, monkeypatch):
    for module in (store_of,): monkeypatch.setattr(module, "id_hashes", lambda ids: np.array([len(i) % 2 for i in ids], dtype="uint64"))
    sent = [prediction(n, n, x=n) for n in range(30)]
    assert kept.table("prediction", as_table(sent[:9])).receipt.accepted == 9
    assert kept.take(sent[5:15]).answers == ("already there",)*4 + ("accepted",)*6
    kept.seal()
    assert kept.table("prediction", as_table(sent)).receipt.accepted == 15
    assert sorted(kept.read("prediction")["features.x"]) == list(range(30))


# --- Damage ---

def test_a_flipped_bit_a_torn_file_and_a_missing_one_are_refused(kept):
    kept.take([prediction(n, n, x=n, carrier="UA") for n in range(50)])
    kept.seal()
    segment, rng = kept.noted[0], random.Random(1)
    for name, use in ((segment.segment, lambda: kept.read("prediction")), (segment.id_hashes, lambda: Kept.take(fresh(), [prediction(99, 1)]))):
        def fresh():
            kept.events = Events(kept.events.folder, kept.events.sealed) # One that has read nothing yet
            return kept
        path = kept.events.path(name)
        whole = path.read_bytes()
        places = [rng.randrange(len(whole)) for _ in range(25)]
        for data in [*(whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1:] for i in places), whole[:len(whole)//2], b""]:
            path.write_bytes(data)
            with pytest.raises(VerificationError, match="was changed"): use()
        path.unlink()
        with pytest.raises(VerificationError, match="is missing"): use()
        path.write_bytes(whole)
        use()


# --- Several at once ---

WRITER = """
import sys, random, time, json
sys.path.insert(0, sys.argv[4])
from test_events import *
book, me, many = open_workbench(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(me)
for turn in range(12):
    ids = [rng.randrange(many) for _ in range(20)]
    try:
        got = book.accept([arrive(prediction(n, n % 40, x=n), NOW) for n in ids], NOW)
        print(json.dumps({"ids": ids, "accepted": got.accepted, "refused": got.refused}), flush=True)
        if turn % 4 == me: book.seal_events(NOW)
        if turn % 4 == 3: book.accept_table("prediction", as_table([prediction(n, n % 40, x=n) for n in dict.fromkeys(ids[:5] + [rng.randrange(many)])]), NOW)
    except LockedError: pass
"""


@pytest.fixture
def book(new_database, tmp_path):
    furnish(tmp_path/"book", "toy")
    ini = tmp_path/"book"/"settings.ini"
    ini.write_text(ini.read_text().replace("[workbench]", f"[workbench]\ndatabase = {new_database()}"))
    made = open_workbench(tmp_path/"book")
    yield made
    made.engine.dispose()


def test_writers_and_sealers_at_once_keep_each_event_once(book):
    book.append("workbench.created", "created", {"name": "toy"}, NOW)
    many = 150
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(book.root), str(me), str(many), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True) for me in range(3)]
    told = [json.loads(line) for p in running for line in p.communicate(timeout=180)[0].splitlines()]
    assert [p.returncode for p in running] == [0]*3 and len(told) > 20 and not any(t["refused"] for t in told)
    ids = {n for t in told for n in t["ids"]}
    rows = book.signals()["parcel_id"].tolist()
    assert len(rows) == len(set(rows)) and set(rows) >= {f"F{n}" for n in ids}
    book.seal_events(NOW)
    assert book.signals()["parcel_id"].tolist() == rows
    assert audit_book(book)["verdict"] == "PASS"


def test_whoever_seals_second_is_told_and_nothing_is_lost(kept):
    kept.take([prediction(n, n) for n in range(20)])
    with reading(kept.engine) as c: first, second = kept.events.gather(c), kept.events.gather(c)
    kept.take([prediction(n, n) for n in range(20, 30)]) # Comes in between, and stays
    with kept.engine.begin() as c: kept.events.finish(c, first, NOW)
    kept.noted += first.segments
    with pytest.raises(LockedError, match="Try again"), kept.engine.begin() as c: kept.events.finish(c, second, NOW)
    assert len(kept.read("prediction")) == 30
    with reading(kept.engine) as c: table = kept.events.gather_table(c, "prediction", as_table([prediction(n, n) for n in range(25, 40)]), NOW)
    assert table.receipt.accepted == 10
    kept.take([prediction(35, 35)]) # The same event comes in by another way before the table is named
    with pytest.raises(LockedError, match="another way"), kept.engine.begin() as c: kept.events.finish(c, table, NOW)
    assert kept.table("prediction", as_table([prediction(n, n) for n in range(25, 40)])).receipt.accepted == 9 and len(kept.read("prediction")) == 40


# --- Killed ---

KILLED = """
import sys, os, json
sys.path.insert(0, sys.argv[2])
from test_events import *
book, start = open_workbench(sys.argv[1]), int(sys.argv[3])
for turn in range(10_000):
    first = start + turn*20
    book.accept([arrive(prediction(n, n % 40, x=n), NOW) for n in range(first, first + 20)], NOW)
    os.write(1, b"%d\\n" % first)
    if turn % 3 == 2: book.seal_events(NOW)
"""


def test_killed_at_any_moment_what_was_acknowledged_is_there_once(book):
    book.append("workbench.created", "created", {"name": "toy"}, NOW)
    rng, acknowledged, start = random.Random(0), set(), 0
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(book.root), str(Path(__file__).parent), str(start)], stdout=subprocess.PIPE, text=True)
        lines = [child.stdout.readline()]
        time.sleep(rng.random()*.4)
        child.send_signal(signal.SIGKILL)
        lines += child.communicate()[0].splitlines()
        assert child.returncode == -signal.SIGKILL
        firsts = [int(line) for line in lines if line.strip()]
        acknowledged |= {n for f in firsts for n in range(f, f + 20)}
        start = max(firsts) + 1000
        rows = book.signals()["parcel_id"].tolist()
        assert len(rows) == len(set(rows)) and set(rows) >= {f"F{n}" for n in acknowledged}
        assert len(rows) % 20 == 0 # No batch is there in part
        if rng.random() < .5: book.seal_events(NOW)
    assert len(book.ask(ledger.entries, kind="signals.sealed")) > 2
    assert audit_book(book)["verdict"] == "PASS"


# --- The house knows them ---

def toy_as_events(book): # The demo's rows as two tables
    frame = book.load("retrain_nb.demo.toy:rows")()
    features = [c for c in frame if c not in ("parcel_id", "due_time", "late", "known_time")]
    asked = frame.rename(columns={"parcel_id": "id", "due_time": "event_time", **{c: f"features.{c}" for c in features}}).assign(subject=frame.depot, known_at=frame.due_time).drop(columns=["late", "known_time"])
    came = pd.DataFrame({"id": "late:" + frame.parcel_id, "subject": frame.parcel_id, "event_time": frame.known_time, "known_at": frame.known_time, "value": frame.late}).dropna(subset=["value"])
    return [pa.Table.from_pandas(t.astype({c: str for c in t if t[c].dtype == "category"}), preserve_index=False) for t in (asked, came)]


def test_a_workbench_freezes_its_events_as_it_would_the_rows(tmp_path):
    furnish(tmp_path, "toy")
    book, as_of = open_workbench(tmp_path), datetime(2024, 3, 1, 12, tzinfo=UTC)
    rows = book.snapshots.read(book.freeze(as_of, NOW).digest)
    asked, came = toy_as_events(book)
    later = datetime(2025, 1, 1, tzinfo=UTC)
    assert book.accept_table("prediction", asked, later, "asked.parquet").accepted == len(asked)
    assert book.accept_table("outcome", came, later).accepted == len(came)
    ini = tmp_path/"settings.ini"
    ini.write_text(ini.read_text().replace("retrain_nb.demo.toy:rows", "signals"))
    ours = open_workbench(tmp_path)
    snapshot = ours.freeze(as_of, NOW)
    assert snapshot.digest == ours.freeze(as_of, later).digest
    got = ours.snapshots.read(snapshot.digest)
    key = lambda f: f.astype({"parcel_id": str, "depot": str}).sort_values(["due_time", "parcel_id"], ignore_index=True)
    pd.testing.assert_frame_equal(key(got)[list(rows)], key(rows))
    assert ours.newest() == book.newest()
    assert book.accept_table("outcome", came, later).there == len(came) # And once more
    with pytest.raises(DataError, match="no row before"): ours.freeze(datetime(2023, 1, 1, tzinfo=UTC), NOW)


def test_the_auditor_the_collector_and_an_export_know_sealed_files(tmp_path):
    furnish(tmp_path/"book", "toy")
    book = open_workbench(tmp_path/"book")
    book.accept([arrive(prediction(n, n), NOW) for n in range(40)], NOW)
    orphan = book.ask(book.events.gather) # Written, and never named
    book.accept([arrive(prediction(n, n), NOW) for n in range(40, 50)], NOW)
    book.seal_events(NOW)
    named = {s[k] for e in book.ask(ledger.entries, kind="signals.sealed") for s in e.body["segments"] for k in ("segment", "id_hashes")}
    unnamed = {getattr(s, k) for s in orphan.segments for k in ("segment", "id_hashes")} - named
    assert named and unnamed
    done = retention.collect(book, delete=True, now=datetime.now(UTC) + timedelta(days=3))
    left = {p.name for p in (book.store/"signals").rglob("*") if p.is_file()}
    assert left == named and done["files"] == len(unnamed)
    assert export(book, tmp_path/"out")["signal_files"] == len(named)
    for place in (book.root, tmp_path/"out"): assert verify(place)["verdict"] == "PASS"
    assert audit_book(book)["verdict"] == "PASS"
    for name in named:
        path = tmp_path/"out"/"signals"/name[:2]/name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        bad = verify(tmp_path/"out")["first_bad"]
        assert bad["damage"] == "changed file" and name in bad["what"]
        path.unlink()
        assert verify(tmp_path/"out")["first_bad"]["damage"] == "missing file"
        path.write_bytes(whole)
    kept = book.events.path(sorted(named)[0])
    kept.write_bytes(b"other")
    assert audit_book(book)["first_bad"]["damage"] == "changed file"


def test_settings_take_signals_as_a_source_and_nothing_like_it():
    text = (files("retrain_nb.demo")/"toy.ini").read_text()
    assert parse_settings(text.replace("retrain_nb.demo.toy:rows", "signals")).source.rows == "signals"
    with pytest.raises(RetrainError, match="accepted is `module:name`, or `signals`"): parse_settings(text.replace("retrain_nb.demo.toy:rows", "signal"))
