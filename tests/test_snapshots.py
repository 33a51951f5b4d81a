"Snapshots under random frames, flipped bits, missing files, full disks and other processes"
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.records import DataError, UsageError, VerificationError, as_json, from_json
from retrain_nb.stores.snapshots import Snapshot, Snapshots


def flights(n=400, seed=0, days=100):
    rng = np.random.default_rng(seed)
    due = pd.Series(pd.to_datetime("2013-01-15T00:00Z") + pd.to_timedelta(rng.integers(0, days*24, n), unit="h")).dt.as_unit("us")
    texts = np.array(["UA", "DL", "B6", "ü", "", "naïve text\n"], dtype=object)
    frame = pd.DataFrame({"key": [f"F{i}" for i in rng.permutation(n)], "due": due, "carrier": pd.Categorical(rng.choice(texts, n)),
                          "distance": rng.normal(size=n), "count": rng.integers(0, 9, n), "small": rng.integers(0, 9, n).astype("int8"),
                          "half": rng.normal(size=n).astype("float32"), "flag": rng.random(n) < .5,
                          "whole": pd.array(rng.integers(2**60, 2**61, n), dtype="Int64"),
                          "maybe": pd.array(rng.random(n) < .5, dtype="boolean"),
                          "landed": due + pd.Timedelta("90min").as_unit("us")})
    holes = rng.random((n, 6)) < .1
    for i, name in enumerate(["carrier", "distance", "half", "whole", "maybe", "landed"]): frame.loc[holes[:, i], name] = None
    return frame


def as_kept(frame, time="due"):
    "What a snapshot promises to give back: sorted by time, text as a category of the values that occur, sorted"
    frame = frame.sort_values(time, kind="stable", ignore_index=True)
    for name in frame:
        if isinstance(frame[name].dtype, pd.CategoricalDtype) or frame[name].dtype == object:
            frame[name] = pd.Categorical(frame[name], categories=pd.Index(sorted(frame[name].dropna().unique()), dtype=object))
    return frame


def files(folder):
    return {str(p.relative_to(folder)): p.stat().st_ino for p in folder.rglob("*") if p.is_file()}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(0, 10_000), st.integers(1, 150))
def test_any_frame_comes_back_as_it_was(tmp_path_factory, n, seed, days):
    frame, store = flights(n, seed, days), Snapshots(tmp_path_factory.mktemp("store"))
    before = frame.copy(deep=True)
    kept = store.freeze(frame, "due")
    pd.testing.assert_frame_equal(frame, before)                       # The caller's frame is not touched
    pd.testing.assert_frame_equal(store.read(kept.digest), as_kept(frame))
    assert store.freeze(store.read(kept.digest), "due") == kept        # And back again
    assert from_json(Snapshot, as_json(kept)) == kept == store.describe(kept.digest)


@settings(max_examples=40, deadline=None)
@given(st.integers(-200, 3000), st.integers(-200, 3000), st.sampled_from([["key"], ["due"], ["flag", "carrier"], None]))
def test_a_window_is_the_same_rows_as_cutting_the_whole(store_of_flights, low, high, columns):
    store, name, whole = store_of_flights
    start, end = (datetime(2013, 1, 15, tzinfo=UTC) + timedelta(hours=h) for h in (low, high))
    got = store.read(name, columns=columns, start=start, end=end)
    want = whole[(whole.due >= start) & (whole.due < end)].reset_index(drop=True)[columns or list(whole)]
    assert list(got) == list(want)
    pd.testing.assert_frame_equal(got.astype({c: object for c in got if isinstance(got[c].dtype, pd.CategoricalDtype)}),
                                  want.astype({c: object for c in got if isinstance(got[c].dtype, pd.CategoricalDtype)}))


@pytest.fixture(scope="module")
def store_of_flights(tmp_path_factory):
    store = Snapshots(tmp_path_factory.mktemp("flights"))
    name = store.freeze(flights(), "due").digest
    return store, name, store.read(name)


def test_a_month_more_writes_one_file_and_one_manifest(tmp_path):
    store, frame = Snapshots(tmp_path), flights()
    first = store.freeze(frame[frame.due < "2013-04-01"], "due")
    before = files(tmp_path)
    second = store.freeze(frame, "due")
    after = files(tmp_path)
    assert len(first.parts) == 3 and second.parts[:3] == first.parts
    april = second.parts[3].sha256
    assert set(after) - set(before) == {f"files/{april[:2]}/{april}.parquet", f"manifests/{second.digest}.json"}
    assert {k: after[k] for k in before} == before                      # The same files, not equal ones
    assert store.freeze(frame, "due") == second and files(tmp_path) == after


def test_a_late_label_writes_its_own_month_only(tmp_path):
    store, frame = Snapshots(tmp_path), flights()
    first = store.freeze(frame, "due")
    frame.loc[frame.due.idxmax(), "flag"] ^= True
    second = store.freeze(frame, "due")
    assert [a == b for a, b in zip(first.parts, second.parts, strict=True)] == [True, True, True, False]


def test_each_of_1000_flipped_bits_is_found(tmp_path):
    store = Snapshots(tmp_path)
    kept = store.freeze(flights(60), "due")
    rng, targets = np.random.default_rng(1), sorted(p for p in tmp_path.rglob("*") if p.is_file())
    for trial in range(1000):
        path = targets[trial % len(targets)]
        data = path.read_bytes()
        i = int(rng.integers(len(data)))
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i+1:])
        with pytest.raises(VerificationError, match="its digest is [0-9a-f]{64}, recorded is [0-9a-f]{64}") as error:
            store.read(kept.digest)
        assert path.name in str(error.value)
        path.write_bytes(data)
    assert len(store.read(kept.digest)) == 60


def few(): # Four rows over two months, one column of each kind
    due = pd.to_datetime(["2013-05-31T23:00Z", "2013-05-01T00:00Z", "2013-06-01T00:00Z", "2013-06-02T10:00Z"]).as_unit("us")
    return pd.DataFrame({"key": ["d", "a", "c", None], "due": due, "x": [1.5, np.nan, 0.0, -2.0], "n": [1, 2, 3, 4], "late": [True, False, False, True]})


def test_the_same_rows_have_the_digest_they_always_had(tmp_path):
    store = Snapshots(tmp_path)
    kept = store.freeze(few(), "due")
    assert kept.digest == "b99b15a644b29db64a55c5c270e752d72d44fcbe4e203df4a9ea455b8726ba8d" # Another one means that nothing frozen before would be found again: give the format a new number instead
    grown = Snapshots(tmp_path/"grown") # In two goes it is the same
    grown.freeze(few().iloc[:2], "due")
    assert grown.freeze(few(), "due") == kept


def test_a_missing_or_emptied_file_is_found(tmp_path):
    store = Snapshots(tmp_path)
    kept = store.freeze(flights(60), "due")
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        data = path.read_bytes()
        path.write_bytes(b"")
        with pytest.raises(VerificationError, match="was changed"): store.read(kept.digest)
        path.unlink()
        with pytest.raises(VerificationError, match=f"{path.name} is missing"): store.read(kept.digest)
        path.write_bytes(data)


def test_two_months_swapped_are_found(tmp_path):
    store = Snapshots(tmp_path)
    kept = store.freeze(flights(60), "due")
    a, b = (next(tmp_path.rglob(f"{p.sha256}.parquet")) for p in kept.parts[:2])
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)
    with pytest.raises(VerificationError): store.read(kept.digest)


def elsewhere(code, folder, told=""):
    "What `code` prints in a process of its own, with another order of hashing"
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(Path(__file__).parent)], input=told, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": "7"})
    return done.stdout


FREEZE = """
import sys
sys.path.insert(0, sys.argv[2])
from test_snapshots import flights
from retrain_nb.stores.snapshots import Snapshots
print(Snapshots(sys.argv[1]).freeze(flights(), "due").digest)
"""


def test_another_process_arrives_at_the_same_digest(tmp_path, store_of_flights):
    assert elsewhere(FREEZE, tmp_path).strip() == store_of_flights[1]


FULL_DISK = """
import json, resource, sys
sys.path.insert(0, sys.argv[2])
from test_snapshots import flights
from retrain_nb.records import RetrainError
from retrain_nb.stores.snapshots import Snapshots
store, frame = Snapshots(sys.argv[1]), flights(4_000)
sizes = json.loads(sys.stdin.read())                       # Of the files that the snapshot needs
for room in sorted({n + d for n in sizes for d in (-1, 0)} | {0, 1}):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try: print(json.dumps([room, store.freeze(frame, "due").digest, ""]))
    except RetrainError as e: print(json.dumps([room, store.digests(), f"{e.exit_code} {e}"]))
"""


def test_a_disk_that_is_full_at_each_of_its_files_leaves_no_manifest_and_older_snapshots_whole(tmp_path):
    store, spare = Snapshots(tmp_path/"store"), Snapshots(tmp_path/"spare")
    wanted, kept = spare.freeze(flights(4_000), "due"), store.freeze(flights(50), "due")
    sizes = [p.stat().st_size for p in (tmp_path/"spare").rglob("*") if p.is_file()]
    assert len(sizes) == 5                                 # Four months and the manifest
    said = [json.loads(line) for line in elsewhere(FULL_DISK, tmp_path/"store", json.dumps(sizes)).splitlines()]
    for room, there, why in said[:-1]:                     # One step of the ladder after the other, ever more files are there
        assert why.startswith("1 no room for ") and "Free some space" in why and there == [kept.digest], room
    assert len(said) == 12 and said[-1] == [max(sizes), wanted.digest, ""]
    assert not [p for p in tmp_path.rglob("*.tmp")]
    assert len(store.read(kept.digest)) == 50
    pd.testing.assert_frame_equal(store.read(wanted.digest), spare.read(wanted.digest))


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda f: f[:0], "empty window.*later `as_of`"),
    (lambda f: f.drop(columns="due"), "no time column `due`"),
    (lambda f: f.assign(due=f.due.dt.tz_localize(None)), "`due` holds times without a time zone"),
    (lambda f: f.assign(landed=f.landed.dt.tz_localize(None)), "`landed` holds times without a time zone"),
    (lambda f: f.assign(due=f.due.astype(str)), "the time column `due` is object"),
    (lambda f: f.assign(due=f.due.where(f.index > 2)), "3 rows have no `due`"),
    (lambda f: pd.concat([f, f[["flag"]]], axis=1), "`flag` appears twice"),
    (lambda f: f.rename(columns={"flag": 7}), "column name 7 is not text"),
    (lambda f: f.assign(key=[*f.key[:-1], 17]), "`key` holds int values"),
    (lambda f: f.assign(key=[{"a": 1}]*len(f)), "`key` holds dict values"),
    (lambda f: f.assign(key=[b"x"]*len(f)), "`key` holds bytes values"),
    (lambda f: f.assign(key=pd.Categorical(range(len(f)))), "`key` holds int values"),
    (lambda f: f.assign(key=f.landed - f.due), "`key` holds"),
    (lambda f: f.assign(key=["\ud800"]*len(f)), "`key` cannot be stored exactly"),
    (lambda f: f.assign(landed=f.landed.dt.as_unit("ns") + pd.Timedelta("1ns")), "`landed` cannot be stored exactly"),
])
def test_what_does_not_survive_is_refused_by_name_and_nothing_is_written(tmp_path, spoil, says):
    with pytest.raises(DataError, match=says): Snapshots(tmp_path).freeze(spoil(flights(20)), "due")
    assert not [p for p in tmp_path.rglob("*.json")]


def test_other_time_zones_become_utc(tmp_path):
    frame = flights(30)
    local = frame.assign(due=frame.due.dt.tz_convert("America/New_York"), landed=frame.landed.dt.tz_convert("Europe/Zurich"))
    assert Snapshots(tmp_path).freeze(local, "due") == Snapshots(tmp_path).freeze(frame, "due")


def test_text_that_is_all_missing_comes_back_missing(tmp_path):
    store, frame = Snapshots(tmp_path), flights(30).assign(key=None)
    back = store.read(store.freeze(frame, "due").digest, columns=["key"])
    assert back.key.isna().all() and len(back.key.cat.categories) == 0


def test_wrong_requests_are_refused(store_of_flights):
    store, name, _ = store_of_flights
    with pytest.raises(UsageError, match="Did you mean `distance`"): store.read(name, columns=["distanze"])
    with pytest.raises(UsageError, match="no time zone"): store.read(name, start=datetime(2013, 1, 1))
    for bad in ("../x", name[:12], name.upper(), ""):
        with pytest.raises(UsageError, match="is no digest"): store.read(bad)


def test_importing_the_store_loads_neither_pandas_nor_pyarrow():
    code = "import sys, retrain_nb.stores.snapshots, retrain_nb.stores.artifacts; print({'pandas', 'pyarrow', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
