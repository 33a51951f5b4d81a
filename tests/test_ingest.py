"Faults of files and of senders: what is torn, wrong, sent twice, too large, or killed half-way, and what must be there afterwards"
import gzip
import http.client
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain_nb.events import Event, Refused
from retrain_nb.loop import server
from retrain_nb.loop.ingest import file_source, ingest, query_source, take
from retrain_nb.mapping import Columns, declare
from retrain_nb.records import DataError, RetrainError, UsageError
from retrain_nb.services import intake
from retrain_nb.services.intake import Reader, look, read_csv
from retrain_nb.services.workbench import furnish, open_workbench
from retrain_nb.stores import ledger
from retrain_nb.stores.events import count_letters, dead_letters
from retrain_nb.windows import parse_time

NOW = parse_time("2017-09-01")
CLI = [sys.executable, "-c", "import sys; from retrain_nb.faces.cli import main; sys.exit(main())"]
STAYS = Columns(kind="prediction", id="booking", event_time="arrival", known_at="booked", zone="Europe/Lisbon", ahead=True, features="country, lead, rate, loyal")


@pytest.fixture
def book(tmp_path):
    furnish(tmp_path/"book", "toy")
    found = open_workbench(tmp_path/"book")
    yield found
    found.engine.dispose()


def kept(book, kind="prediction"): return book.ask(lambda c: book.events.read(c, kind, parse_time("2200-01-01")))


def state(book): # -> all that taking something could change
    hot, letters = (book.ask(lambda c, q=q: c.execute(sa.text(q)).all()) for q in ("SELECT * FROM events ORDER BY seq", "SELECT * FROM dead_letters ORDER BY digest"))
    return hot, letters, [(e.seq, e.leaf) for e in book.ask(ledger.entries)]


def stays(n=40, seed=0): # -> rows as a hotel has them; times without a zone, some values missing
    rng = random.Random(seed)
    pick = lambda *of: rng.choice(of)
    return [{"booking": f"b{i}", "arrival": f"2017-0{1 + i % 8}-{1 + i % 28:02} 14:00:00", "booked": f"2016-{1 + i % 12:02}-11 09:30:00", "country": pick("PRT", "GBR", None),
             "lead": pick(0, 12, 61, None), "rate": pick(80.5, 99.0, 1e-7, None), "loyal": pick(True, False), "guest": "x"} for i in range(n)]


# --- The same rows are the same events, whatever they come in ---

def written(form, folder, rows): # -> the source of these rows, in this form
    frame = pd.DataFrame(rows).astype({"lead": "Int64"})
    times = {c: pd.to_datetime(frame[c]) for c in ("arrival", "booked")}
    if form == "csv": frame.to_csv(folder/"x", index=False)
    if form == "tabs": frame.to_csv(folder/"x", index=False, sep="\t", encoding="utf-8-sig", quoting=1)
    if form == "json": (folder/"x").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if form == "text times": frame.to_parquet(folder/"x")
    if form == "local times": frame.assign(**times).to_parquet(folder/"x")
    if form == "other zone": frame.assign(**{c: t.dt.tz_localize("Europe/Lisbon").dt.tz_convert("Asia/Tokyo") for c, t in times.items()}).to_parquet(folder/"x")
    if form == "epoch": frame.assign(**{c: t.dt.tz_localize("Europe/Lisbon").astype("int64")//10**(3 if t.dt.unit == "us" else 6) for c, t in times.items()}).to_parquet(folder/"x")
    if form == "query":
        with sqlite3.connect(folder/"x.db") as c: frame.astype({"loyal": int}).to_sql("stays", c, index=False)
        declared = declare({"url": f"sqlite:///{folder}/x.db", "query": "SELECT * FROM stays"}, STAYS)
        return query_source(declared), declared
    declared = declare({"tabs": {"separator": "tab"}, "epoch": {"epoch": "ms"}}.get(form, {}), STAYS)
    return file_source(folder/"x", declared), declared


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("form", ["csv", "tabs", "json", "text times", "local times", "other zone", "epoch", "query"])
def test_the_same_rows_are_the_same_events_in_every_form_and_by_both_ways(form, few, book, tmp_path):
    source, declared = written(form, tmp_path, stays())
    taken = take(book, source, declared, NOW, few=few)
    assert (taken.accepted, taken.there, taken.refused) == (40, 0, 0), book.ask(dead_letters, 3)
    again = ingest(book, stays(), NOW, kind="prediction", id="booking", event_time="arrival", known_at="booked", zone="Europe/Lisbon", ahead="true", features="country, lead, rate, loyal")
    assert (again.accepted, again.there, again.refused) == (0, 40, 0), book.ask(dead_letters, 3)


def test_a_frame_and_an_arrow_table_are_rows_too(book):
    frame = pd.DataFrame(stays(5)).assign(guest=[1, "two", None, 4.5, "x"])
    said = {k: v for k, v in dict(kind="prediction", id="booking", event_time="arrival", known_at="booked", zone="Europe/Lisbon", ahead="true", features="country").items()}
    with pytest.raises(DataError, match="column of no one type"): ingest(book, frame, NOW, **said)
    assert ingest(book, frame.drop(columns="guest"), NOW, **said).accepted == 5
    assert ingest(book, pa.Table.from_pandas(frame.drop(columns="guest")), NOW, **said).there == 5
    with pytest.raises(DataError, match="column `booking` appears twice"): ingest(book, pd.concat([frame, frame[["booking"]]], axis=1), NOW, **said)


# --- Nothing half-taken ---

HEAD, ROW = "booking,arrival,booked,country,lead,rate,loyal\n", "b1,2017-07-01,2017-05-01,PRT,61,80.5,True\n"
MANY = pa.table({k: [r[k] for r in stays(1000)] for k in stays(1)[0]})


def parquet(table, **how): # -> the bytes of a Parquet file
    pq.write_table(table, sink := pa.BufferOutputStream(), **how)
    return sink.getvalue().to_pybytes()


BAD = {
    "an empty file": (b"", "is empty"), "blank lines": (b"\n \n", "is empty"),
    "a header alone": (HEAD.encode(), "x has no row"), "a header without its line's end": (HEAD.strip().encode(), "x has no row"),
    "a byte that is not UTF-8": ((HEAD + ROW).encode() + "b2,2017-07-01,2017-05-01,Côte,1,1,True\n".encode("latin-1"), "x is not UTF-8: byte 115 is 0xF4"),
    "half a character at the end": ((HEAD + ROW).encode() + "ô".encode()[:1], "x is not UTF-8: byte 89 is 0xC3"),
    "half a character at the edge of a block": ((HEAD + ROW).encode().ljust((1 << 20) - 1, b"\n") + b"\xc3x", "x is not UTF-8: byte 1,048,575 is 0xC3"),
    "UTF-16": ((HEAD + ROW).encode("utf-16"), "x is UTF-16, from byte 0 on"), "gzip": (gzip.compress(HEAD.encode()), "compressed with gzip"),
    "another separator": ((HEAD + ROW).replace(",", ";").encode(), "--map separator=semicolon"),
    "a column twice": ((HEAD.replace("country", "lead") + ROW).encode(), "column `lead` appears twice"),
    "a column that is not there": ((HEAD.replace("lead", "lead_time") + ROW).encode(), "there is no column `lead`, which is to be `features`. Did you mean `lead_time`?"),
    "an open quote": ((HEAD + ROW + ROW.replace("PRT", '"PRT')).encode(), "line 3: a quote is opened and not closed"),
    "a cell without end": ((HEAD + ROW.replace("PRT", "P"*200_000)).encode(), "line 2: field larger than field limit"),
    "text after a quote": ((HEAD + ROW.replace("PRT", '"P"RT')).encode(), "line 2: ',' expected after '\"'"),
    "a torn last line": ((HEAD + ROW + ROW[:12]).encode(), "x ends in the middle of line 3"),
    "a torn last object": (json.dumps(stays(1)[0]).encode() + b"\n" + json.dumps(stays(2)[1]).encode()[:-5], "x ends in the middle of line 2"),
    "an array": (json.dumps(stays(2)).encode(), "x holds one JSON array"),
    "Parquet without its end": (parquet(MANY)[:-100], "x is no whole Parquet file"), "Parquet without anything": (b"PAR1", "x is no whole Parquet file"),
    "Parquet without rows": (parquet(MANY[:0]), "x has no row"),
    "Parquet with a column twice": (parquet(pa.table([[1], [2]], names=["booking", "booking"])), "column `booking` appears twice"),
    "Parquet with lists": (parquet(MANY.set_column(3, "country", pa.array([["PRT"]]*1000))), "column `country` is list"),
    "Parquet with other types": (parquet(MANY.set_column(3, "country", pa.array([b"PRT"]*1000))), "column `country` is binary"),
}


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("what", BAD)
def test_of_a_file_that_is_not_whole_or_not_right_nothing_is_taken(what, few, book, tmp_path):
    data, said = BAD[what]
    (tmp_path/"x").write_bytes(data)
    before = state(book)
    with pytest.raises(RetrainError) as caught: take(book, file_source(tmp_path/"x", STAYS), STAYS, NOW, few=few)
    assert said in str(caught.value) and caught.value.cure
    assert state(book) == before


@pytest.mark.parametrize("seed", range(25))
def test_a_parquet_file_with_flipped_bits_is_taken_whole_or_not_at_all(seed, book, tmp_path):
    rng, data = random.Random(seed), bytearray(parquet(MANY, row_group_size=100, compression="zstd", write_page_checksum=True))
    for _ in range(3): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (tmp_path/"x").write_bytes(data)
    before = state(book)
    try: taken = take(book, file_source(tmp_path/"x", STAYS), STAYS, NOW, few=0)
    except RetrainError: assert state(book) == before # Anything else than an error of ours fails the test
    else: assert taken.rows == 1000


def test_a_file_that_changes_while_it_is_read_is_not_taken(book, tmp_path):
    (tmp_path/"x").write_text(HEAD + ROW)
    source = file_source(tmp_path/"x", STAYS)
    (tmp_path/"x").write_text(HEAD + ROW + ROW.replace("b1", "b2"))
    with pytest.raises(DataError, match="x was written to while it was read"): take(book, source, STAYS, NOW)
    assert len(kept(book)) == 0


@pytest.mark.parametrize("path, said", [("no such file", "No such file"), (".", "Is a directory")])
def test_what_is_no_file_is_said(path, said, tmp_path):
    with pytest.raises(UsageError, match=said): look(tmp_path/path)


# --- Each row by itself ---

@pytest.mark.parametrize("few", [0, 10**6])
def test_each_wrong_row_is_a_dead_letter_with_its_line_its_column_and_the_reason(few, book, tmp_path):
    wrong = {"b1,2017-03-26 01:30,2016-05-01,PRT,1,1,True": ("arrival", "skipped"), "b2,2017-07-01,2016-10-30 01:30,PRT,1,1,True": ("booked", "showed 2016-10-30 01:30:00 twice"),
             "b3,1498910400,2017-05-01,PRT,1,1,True": ("arrival", "declare `epoch`"), "b4,2017-07-01,2117-05-01,PRT,1,1,True": ("booked", "is still to come"),
             "b5,2017-07-01,2017-05-01,PRT,inf,1,True": ("lead", "`inf` is no number"), "b6,2017-07-01,2017-05-01,PRT,1,1e999,True": ("rate", "inf is not a number that JSON has"),
             f"{'b'*10_000},2017-07-01,2017-05-01,PRT,1,1,True": ("booking", "10,000 characters"), ",2017-07-01,2017-05-01,PRT,1,1,True": ("booking", "it is empty"),
             "b7,2017-07-01,2017-05-01,PRT,1,1": ("row", "it has 6 cells, and the header 7"), "b8,,2017-05-01,PRT,1,1,True": ("arrival", "None is not a time"),
             "b9,2017-07-01,2017-05-01,PRT,9007199254740993,1,True": ("lead", "too large")}
    (tmp_path/"x").write_text(HEAD + ROW.replace("b1", "good") + "\n" + "\n".join(wrong) + "\n" + ROW.replace("b1", "fine"))
    taken = take(book, file_source(tmp_path/"x", STAYS), STAYS, NOW, few=few)
    assert (taken.accepted, taken.there, taken.refused) == (2, 0, len(wrong))
    letters = sorted(book.ask(dead_letters, 100), key=lambda x: x["row"])
    assert [x["row"] for x in letters] == list(range(4, 4 + len(wrong))) # The header is line 1, and an empty one is counted
    for letter, (column, why) in zip(letters, wrong.values(), strict=True): assert letter["field"] == column and why in letter["reason"], letter
    assert book.ask(count_letters) == {"letters": len(wrong), "times": len(wrong)}


def test_in_parquet_too_each_wrong_row_has_its_number_and_its_column(book, tmp_path):
    frame = pd.DataFrame(stays(60)).assign(rate=1.0, lead=pd.Series([1.0]*60))
    frame["arrival"] = pd.to_datetime(frame.arrival).dt.tz_localize("UTC").astype("datetime64[us, UTC]")
    frame.loc[7, "lead"], frame.loc[11, "booking"], frame.loc[13, "country"] = float("inf"), "b"*300, "x"*3000
    frame.drop(columns="booked").to_parquet(tmp_path/"x", row_group_size=10)
    declared = Columns(kind="prediction", id="booking", event_time="arrival", features="country, lead")
    taken = take(book, file_source(tmp_path/"x", declared), declared, NOW, few=0)
    assert (taken.accepted, taken.refused) == (57, 3)
    assert {(x["row"], x["field"]) for x in book.ask(dead_letters)} == {(8, "lead"), (12, "booking"), (14, "country")}


def test_times_that_python_cannot_hold_are_refused_by_row(book, tmp_path):
    table = pa.table({"booking": ["a", "b", "c"], "arrival": pa.array([0, 2**62, -2**62], pa.timestamp("ms", "UTC")), "lead": [1, 2, 3]})
    (tmp_path/"x").write_bytes(parquet(table))
    declared = Columns(kind="prediction", id="booking", event_time="arrival", features="lead")
    for few in (0, 10): assert (taken := take(book, file_source(tmp_path/"x", declared), declared, NOW, few=few, again=True)).refused == 2, taken


def test_what_a_cell_becomes_does_not_depend_on_the_cells_around_it(tmp_path):
    cells = ["1", "009", "1e3", "x", "", "True", "-.5", "NA", "12a", "1_000", "٣"]
    def found(order):
        (tmp_path/"x").write_text("id,event_time,features.c\n" + "".join(f"{i},2017-07-01T00:00Z,{cells[i]}\n" for i in order))
        reader, parts = read_csv(look(tmp_path/"x"), Columns(kind="prediction"), NOW)
        return {a.found.id: a.found.data["features"].get("c") for p in parts for a in p.arrivals}
    straight = found(range(len(cells)))
    assert straight == {str(i): v for i, v in enumerate([1, "009", 1000, "x", None, 1, -.5, "NA", "12a", "1_000", "٣"])}
    assert found(reversed(range(len(cells)))) == straight


def test_an_id_that_comes_twice_is_found_across_parts_and_ways(book, tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "CHUNK", 10)
    rows = stays(35)
    odd = [{**rows[3], "lead": 5000}, rows[4], {**rows[34], "rate": "dear"}] # One that differs, one that does not, one of another type
    lines = [json.dumps(r) for r in [*rows, *odd]]
    (tmp_path/"x").write_text("\n".join(lines) + "\n")
    taken = take(book, file_source(tmp_path/"x", STAYS), STAYS, NOW, few=0)
    assert (taken.accepted, taken.there, taken.refused) == (35, 1, 2)
    (tmp_path/"y").write_text("\n".join(reversed(lines[:35])) + "\n")
    again = take(book, file_source(tmp_path/"y", STAYS), STAYS, NOW)
    assert (again.accepted, again.there, again.refused) == (0, 35, 0)
    assert len(kept(book)) == 35 and kept(book).id.is_unique


def test_events_of_several_kinds_in_one_table(book, tmp_path):
    table = pa.table({"kind": ["outcome", "request", "outcome", "nonsense"], "id": list("abcd"), "event_time": ["2017-07-01T00:00Z"]*4, "value": [1.0, None, 0.0, 1.0], "status": [None, 200, None, None]})
    (tmp_path/"x").write_bytes(parquet(table))
    assert (taken := take(book, file_source(tmp_path/"x", Columns()), Columns(), NOW, few=0)).refused == 1 and taken.accepted == 3
    assert book.ask(dead_letters)[0]["reason"].startswith("'nonsense' is none of")
    (tmp_path/"y").write_bytes(parquet(table[:3]))
    assert take(book, file_source(tmp_path/"y", Columns()), Columns(), NOW, few=0).there == 3
    assert sorted(kept(book, "outcome").id) == ["a", "c"] and list(kept(book, "request").status) == ["200"]


def test_a_source_of_which_far_too_much_is_refused_is_not_taken(book, tmp_path, monkeypatch):
    monkeypatch.setattr("retrain_nb.loop.ingest.REFUSALS", 50)
    (tmp_path/"x").write_text(HEAD + "".join(ROW.replace("b1", f"b{i}").replace("2017-07-01", "noon") for i in range(60)))
    before = state(book)
    with pytest.raises(DataError, match="60 rows are no events; one is row 61, arrival: 'noon' is not a time"): take(book, file_source(tmp_path/"x", STAYS), STAYS, NOW, few=0)
    assert state(book) == before


JSONS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8)
PARTS = st.fixed_dictionaries({}, optional={k: JSONS for k in ("kind", "id", "subject", "event_time", "known_at", "data", "ahead", "value", "features")})


@settings(max_examples=300, deadline=None)
@given(JSONS | PARTS, st.sampled_from([Columns(), Columns(kind="prediction", features="*"), Columns(kind="outcome", epoch="ns", zone="Europe/Lisbon"), Columns(kind="value")]))
def test_whatever_somebody_sends_is_an_event_or_refused(sent, declared):
    assert isinstance(Reader(declared, NOW).arrival(1, sent).found, Event | Refused)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | JSONS.map(lambda v: json.dumps(v).encode()), st.sampled_from(["application/json", "application/x-ndjson"]))
def test_whatever_a_body_holds_is_events_refusals_or_one_answer(body, media):
    try: found = server.said(body, media, Reader(Columns(), NOW))
    except server.Problem as e: assert e.status in (400, 413)
    else: assert found and all(isinstance(a.found, Event | Refused) for a in found)


# --- The same again ---

@pytest.mark.parametrize("few", [0, 10**6])
def test_a_file_that_is_delivered_twice_changes_nothing(few, book, tmp_path):
    (tmp_path/"x").write_text(HEAD + ROW + ROW.replace("b1", "b2") + ROW.replace("2017-07-01", "noon"))
    assert take(book, file_source(tmp_path/"x", STAYS), STAYS, NOW, few=few).accepted == 2
    before = state(book)
    again = take(book, file_source(tmp_path/"x", STAYS), STAYS, parse_time("2017-09-02"), few=few)
    assert (again.accepted, again.there, again.refused, again.before) == (0, 2, 1, "2017-09-01T00:00:00Z")
    assert state(book) == before
    forced = take(book, file_source(tmp_path/"x", STAYS), STAYS, parse_time("2017-09-03"), few=few, again=True)
    assert (forced.accepted, forced.there, forced.refused) == (0, 2, 1)
    assert book.ask(count_letters) == {"letters": 1, "times": 2}


def test_the_ledger_says_what_was_taken_and_by_whom_and_verifies(book, tmp_path):
    from retrain_nb.loop.audit import verify
    pd.DataFrame(stays(500)).to_parquet(tmp_path/"x")
    take(book, file_source(tmp_path/"x", STAYS), STAYS, NOW, by="ada", few=0)
    body = book.ask(ledger.newest, "signals.taken").body
    assert (body["accepted"], body["by"], body["origin"], body["declared"]["id"]) == (500, "ada", "x", "booking")
    assert body["digest"] == look(tmp_path/"x").digest
    told = verify(book.root)
    assert told["verdict"] == "PASS", told


# --- Killed ---

SCRIPT = """
import sys
from retrain_nb.loop.ingest import file_source, take
from retrain_nb.mapping import Columns
from retrain_nb.services import intake
from retrain_nb.services.workbench import open_workbench
from retrain_nb.windows import parse_time
intake.CHUNK = 2000
book, declared = open_workbench(sys.argv[1]), Columns(kind="outcome")
source = file_source(sys.argv[2], declared)
book.ask(lambda c: None)
print("ready", flush=True)
print(take(book, source, declared, parse_time("2017-09-01"), few=int(sys.argv[3])), flush=True)
"""


@pytest.mark.parametrize("few", [0, 10**6])
def test_a_file_is_taken_whole_or_not_at_all_also_when_the_taker_is_killed(few, book, tmp_path):
    n, found = 4000, set()
    (tmp_path/"x").write_text("id,event_time,value\n" + "".join(f"o{i},2017-0{1 + i % 8}-01T00:00Z,{i % 2}\n" for i in range(n)))
    kept(book, "outcome") # Makes the tables
    def taking(root):
        taker = subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), str(tmp_path/"x"), str(few)], stdout=subprocess.PIPE, text=True)
        assert taker.stdout.readline() == "ready\n"
        return taker
    furnish(tmp_path/"rehearsal", "toy")
    with taking(tmp_path/"rehearsal") as taker: # How long it takes on this machine, to what it says
        start = time.monotonic()
        assert taker.stdout.readline()
        whole = time.monotonic() - start
    for share in (.2, .6, .85, .95, 1.05):
        taker = taking(book.root)
        try: taker.wait(timeout=whole*share)
        except subprocess.TimeoutExpired: taker.send_signal(signal.SIGKILL)
        said = taker.communicate()[0]
        count = len(kept(book, "outcome"))
        assert count in (0, n), f"{count} of {n} after {share}"
        if said: assert count == n # What was said is true
        found.add(count)
        if count: break
    if not count: assert take(book, file_source(tmp_path/"x", Columns(kind="outcome")), Columns(kind="outcome"), NOW, few=few).accepted == n
    assert 0 in found and book.ask(ledger.newest, "signals.taken").body["accepted"] == n


@pytest.mark.parametrize("few", [0, 10**6])
def test_two_who_take_the_same_at_once_take_it_once(few, database_url, tmp_path):
    furnish(tmp_path/"book", "toy")
    settings_file = tmp_path/"book"/"settings.ini"
    settings_file.write_text(settings_file.read_text().replace("[workbench]", f"[workbench]\ndatabase = {database_url}"))
    book = open_workbench(tmp_path/"book")
    kept(book, "outcome") # Makes the tables
    for name in "xy": (tmp_path/name).write_text("id,event_time,value\n" + "".join(f"o{i},2017-07-01T00:00Z,{i}\n" for i in range(3000)) + "\n"*(name == "y")) # Other bytes, same rows
    takers = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(book.root), str(tmp_path/name), str(few)], stdout=subprocess.PIPE, text=True) for name in "xyx"]
    said = [re.findall(r"(\d[\d,]*) events? accepted, ([\d,]+) already there, 0 refused", t.communicate()[0])[0] for t in takers]
    counts = sorted(tuple(int(n.replace(",", "")) for n in pair) for pair in said)
    assert counts == [(0, 3000), (0, 3000), (3000, 0)] and all(t.returncode == 0 for t in takers)
    assert len(kept(book, "outcome")) == 3000
    book.engine.dispose()


def test_memory_does_not_grow_with_the_file(book, tmp_path):
    def peak(n): # -> MB that taking so many rows needed at most
        (tmp_path/f"{n}").write_text("id,event_time,value\n" + "".join(f"{n}-{i},2017-07-01T00:00Z,{i}\n" for i in range(n)))
        code = SCRIPT + "import resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)"
        done = subprocess.run([sys.executable, "-c", code, str(book.root), str(tmp_path/f"{n}"), "0"], capture_output=True, text=True, check=True)
        return float(done.stdout.splitlines()[-1])
    small, large = peak(8000), peak(64_000)
    assert large - small < 25, f"{small:.0f} MB, then {large:.0f} MB" # The rows themselves, as events, are over 60 MB


# --- A database of somebody else ---

def test_a_query_can_change_nothing_and_its_password_is_nowhere(book, postgres_server, monkeypatch, capfd):
    url = postgres_server.address.format("postgres")
    engine = sa.create_engine(url)
    with engine.begin() as c:
        c.exec_driver_sql("DROP TABLE IF EXISTS stays; DROP SEQUENCE IF EXISTS numbers; CREATE SEQUENCE numbers")
        c.exec_driver_sql("CREATE TABLE stays AS SELECT i::text AS id, timestamptz '2017-07-01' + i * interval '1 minute' AS due, mod(i, 7)::numeric(8, 2) / 2 AS value FROM generate_series(1, 30000) i")
    monkeypatch.setenv("SHOP_PASSWORD", "hunter2hunter2")
    declared = Columns(kind="outcome", event_time="due", url=url, query="SELECT id, due, value FROM stays WHERE id::int > 0", password_env="SHOP_PASSWORD")
    taken = take(book, query_source(declared), declared, NOW)
    assert (taken.accepted, taken.refused) == (30_000, 0)
    for query, said in (("SELECT nextval('numbers') AS id, now() AS due, 1 AS value", "read-only"), ("DELETE FROM stays RETURNING id, due, value", "syntax error"),
                        ("SELECT id, due, value FROM stays; COMMIT; DELETE FROM stays", "."), ("SELECT id, due FROM nowhere", "nowhere"), ("SELECT id, id, due FROM stays", "column `id` appears twice")):
        odd = declare({"query": query}, declared)
        with pytest.raises(DataError, match=said): take(book, query_source(odd), odd, NOW)
    away = declare({"url": "postgresql://shop@127.0.0.1:1/shop"}, declared)
    with pytest.raises(RetrainError) as caught: take(book, query_source(away), away, NOW)
    with engine.connect() as c: assert c.execute(sa.text("SELECT count(*) FROM stays")).scalar() == 30_000
    engine.dispose()
    everything = str(caught.value) + "".join(capfd.readouterr()) + str([e.body for e in book.ask(ledger.entries)])
    assert "hunter2" not in everything and "SHOP_PASSWORD" in everything
    monkeypatch.delenv("SHOP_PASSWORD")
    with pytest.raises(UsageError, match="SHOP_PASSWORD is empty or not set"): query_source(declared).open(NOW)


# --- The server ---

@contextmanager
def serving(root, *more): # -> (process, port, token) of a real server
    process = subprocess.Popen([*CLI, "serve", "--root", str(root), "--port", "0", *more], stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        found = re.search(r":(\d+) takes events", line)
        assert found, line + process.stderr.read()
        yield process, int(found[1]), (root/".retrain"/"keys"/"http-token").read_text().strip()
    finally:
        process.kill()
        process.wait()


def send(port, token, body, media="application/x-ndjson", path="/v1/events", method="POST", **headers): # -> (status, answer, headers)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": media, **({"Authorization": f"Bearer {token}"} if token else {}), **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null"), answer.headers
    finally: connection.close()


def outcome(id, value=1): return json.dumps({"kind": "outcome", "id": id, "subject": id, "event_time": "2017-07-01T00:00Z", "known_at": "2017-07-02T00:00Z", "data": {"value": value}})


def load(port, token, acknowledged, odd, senders=6, most=400): # -> threads that send batches until nobody answers any more
    def run(s):
        for n in range(most):
            ids = [f"{port}-{s}-{n}-{i}" for i in range(20)]
            try: status, answer, _ = send(port, token, "\n".join(map(outcome, ids)).encode())
            except (OSError, http.client.HTTPException): return
            if status != 200 or answer["answers"] != ["accepted"]*20: odd.append((status, answer))
            else: acknowledged.extend(ids)
    threads = [threading.Thread(target=run, args=(s,)) for s in range(senders)]
    for t in threads: t.start()
    return threads


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_every_acknowledged_event_is_there_after_the_server_was_killed_under_load(how, book):
    acknowledged, odd = [], []
    for _ in range(2): # The second server finds what the first left
        with serving(book.root) as (process, port, token):
            threads, goal = load(port, token, acknowledged, odd), len(acknowledged) + 600
            wait_for(lambda goal=goal: len(acknowledged) >= goal)
            process.send_signal(how)
            for t in threads: t.join()
            code = process.wait(timeout=60)
        assert code == (-9 if how == signal.SIGKILL else 0)
        ids = set(kept(book, "outcome").id)
        assert set(acknowledged) <= ids and not odd
        assert len(ids) % 20 == 0 # A request is there whole or not at all
    with serving(book.root) as (_, port, token):
        status, answer, _ = send(port, token, "\n".join(map(outcome, acknowledged[:100])).encode())
        assert (status, answer["already_there"]) == (200, 100)


INBOX = "\n[ingest.late]\nfiles = inbox/*.csv\nkind = outcome\nid = booking\nevent_time = arrival\nvalue = is_canceled\nzone = UTC\n"


def declare_inbox(book, more=""): # -> the folder that every cycle looks into
    ini = book.root/"settings.ini"
    ini.write_text(ini.read_text() + INBOX + more)
    (book.root/"inbox").mkdir()
    return book.root/"inbox"


def test_a_cycle_takes_in_what_the_settings_declare_while_two_servers_seal_and_nothing_is_lost_or_doubled(book):
    inbox = declare_inbox(book, "[ingest.maybe]\nrequired = no\nfiles = inbox/*.parquet\nkind = outcome\n")
    (inbox/"july.csv").write_text("booking,arrival,is_canceled\n" + "".join(f"j{i},2017-07-{1 + i:02} 14:00,1\n" for i in range(9)))
    (inbox/"torn.parquet").write_bytes(b"PAR1")
    acknowledged, odd, often = [], [], ("--seal-every", "0.2")
    with serving(book.root, *often) as (_, one, token), serving(book.root, *often) as (_, two, _):
        threads = [t for port in (one, two) for t in load(port, token, acknowledged, odd, senders=2, most=60)]
        done = subprocess.run([*CLI, "cycle", "--now", "2024-03-01", "--root", str(book.root)], capture_output=True, text=True)
        for t in threads: t.join()
        wait_for(lambda: book.ask(lambda c: c.execute(sa.text("SELECT count(*) FROM events")).scalar()) == 0)
    assert done.returncode == 0 and "july.csv: 9 events accepted" in done.stderr and "[ingest.maybe] left out: torn.parquet" in done.stderr, done.stderr
    ids = list(kept(book, "outcome").id)
    assert not odd and len(acknowledged) == 4*60*20 and sorted(ids) == sorted([*acknowledged, *(f"j{i}" for i in range(9))])
    sealed = [e for e in book.ask(ledger.entries) if e.kind == "signals.sealed"]
    assert len(sealed) > 1 and sum(s["rows"] for e in sealed for s in e.body["segments"]) == len(ids)
    assert subprocess.run([*CLI, "verify", "--root", str(book.root)], capture_output=True).returncode == 0
    again = subprocess.run([*CLI, "cycle", "--now", "2024-03-01", "--root", str(book.root)], capture_output=True, text=True)
    assert again.returncode == 0 and "july.csv" not in again.stderr and "decided before" in again.stdout


def test_a_cycle_that_comes_second_takes_nothing_in_and_no_source_is_so_optional_that_a_damaged_ledger_is_passed_over(book):
    inbox = declare_inbox(book, "required = no\n")
    (inbox/"july.csv").write_text("booking,arrival,is_canceled\nj1,2017-07-01 14:00,1\n")
    book.append("workbench.created", "created", {"name": "book"}, NOW)
    with book.lock(): second = subprocess.run([*CLI, "cycle", "--now", "2024-03-01", "--root", str(book.root)], capture_output=True, text=True)
    assert second.returncode == 75 and len(kept(book, "outcome")) == 0
    with sqlite3.connect(book.root/".retrain"/"ledger.db") as c: # By somebody who knows how
        for trigger, in c.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall(): c.execute(f"DROP TRIGGER {trigger}")
        c.execute("DELETE FROM heads")
    damaged = subprocess.run([*CLI, "cycle", "--now", "2024-03-01", "--root", str(book.root)], capture_output=True, text=True)
    assert damaged.returncode == 6 and "left out" not in damaged.stderr and len(kept(book, "outcome")) == 0


def test_a_source_that_a_cycle_needs_and_cannot_read_stops_it_before_anything_is_decided(book):
    inbox = declare_inbox(book)
    (inbox/"july.csv").write_text("booking;arrival;is_canceled\nj1;2017-07-01 14:00;1\n")
    done = subprocess.run([*CLI, "cycle", "--now", "2024-03-01", "--root", str(book.root)], capture_output=True, text=True)
    assert done.returncode == 3 and "[ingest.late]" in done.stderr and "july.csv" in done.stderr and "separator" in done.stderr and "required = no" in done.stderr
    assert [e.kind for e in book.ask(ledger.entries) if e.kind.startswith(("run.", "cycle.", "signals."))] == []


def test_each_wrong_request_has_its_answer_and_changes_nothing(book):
    with serving(book.root) as (_, port, token):
        before = state(book)
        good = outcome("o1").encode()
        for status, said in {
            401: [dict(token=""), dict(token="guess"), dict(token=token, Authorization="Basic eDp5")], 404: [dict(path="/v1/secrets")], 405: [dict(method="PUT")],
            415: [dict(media="text/csv"), dict(media=""), dict(media="application/json; charset=latin-1"), {"Content-Encoding": "br"}],
            400: [dict(body=b""), dict(body=b"{", media="application/json"), dict(body=b"[]", media="application/json"), dict(body=b"\xff{}", media="application/json"),
                  dict(body=b"["*100_000, media="application/json"), {"body": b"no gzip", "Content-Encoding": "gzip"}],
            413: [dict(body=bytes(server.BODY + 1)), {"body": gzip.compress(bytes(200 << 20)), "Content-Encoding": "gzip"}, dict(body=iter([good + b"\n"]*40_000 + [bytes(1 << 20)]*11)),
                  dict(body=b"\n".join([good]*10_001))]}.items():
            for one in said:
                try: found, answer, headers = send(port, **{"token": token, "body": good, **one})
                except (BrokenPipeError, ConnectionResetError): # It was told to stop before it had sent all of it
                    assert status == 413
                    continue
                assert found == status, (one.keys(), answer)
                if status not in (404, 405): assert answer["error"] and answer["cure"]
                if status == 401: assert headers["WWW-Authenticate"] == "Bearer"
        assert state(book) == before
        status, answer, _ = send(port, token, b'{"kind": "outcome", "id": "o1"}\nnonsense\n')
        assert (status, answer["refused"]) == (422, 2) and answer["answers"][1].startswith("refused: line: it is no JSON")
        assert {(x["origin"], x["row"]) for x in book.ask(dead_letters)} == {("http", 1), ("http", 2)}
        status, answer, _ = send(port, token, good + b"\nnonsense\n")
        assert (status, answer["answers"][0]) == (200, "accepted")
        assert send(port, "", None, path="/v1/health", method="GET")[0] == 200
        assert (book.store/"keys"/"http-token").stat().st_mode & 0o777 == 0o600


def test_while_the_disk_is_taken_requests_wait_in_bounded_number_and_then_share_a_transaction(book):
    with serving(book.root) as (_, port, token):
        assert send(port, token, outcome("warm").encode())[0] == 200
        other, statuses = sqlite3.connect(book.store/"ledger.db", isolation_level=None), []
        other.execute("BEGIN IMMEDIATE")
        big = lambda s: "\n".join(outcome(f"{s}-{i}") + " "*60_000 for i in range(150)).encode() # Some 9 MB each, and 64 are allowed in all
        threads = [threading.Thread(target=lambda s=s: statuses.append(send(port, token, big(s)))) for s in range(12)]
        for t in threads: t.start()
        wait_for(lambda: any(s == 429 for s, *_ in statuses), 25)
        assert all(s == 429 and h["Retry-After"] == "1" for s, _, h in statuses) # Nobody was told anything else while nothing was on the disk
        other.execute("ROLLBACK")
        for t in threads: t.join()
        assert sum(s == 200 for s, *_ in statuses) >= 5 and {s for s, *_ in statuses} == {200, 429}
        assert send(port, token, big("after"))[0] == 200 # What was under way is counted down again
        assert len(kept(book, "outcome")) == 1 + 150*(1 + sum(s == 200 for s, *_ in statuses))


@pytest.mark.parametrize("who", ["sender", "server"])
def test_a_connection_outlives_some_seconds_in_which_sender_or_server_stood_still(who, book):
    with serving(book.root) as (process, port, token): # After five seconds, the usual patience, both were reset
        connection, statuses = http.client.HTTPConnection("127.0.0.1", port, timeout=60), []
        for i in range(2):
            if i and who == "server": process.send_signal(signal.SIGSTOP)
            if i and who == "sender": time.sleep(6)
            connection.request("POST", "/v1/events", outcome(f"o{i}").encode(), {"Content-Type": "application/x-ndjson", "Authorization": f"Bearer {token}"})
            if i and who == "server":
                time.sleep(6)
                process.send_signal(signal.SIGCONT)
            statuses.append((answer := connection.getresponse()).status)
            answer.read()
        connection.close()
    assert statuses == [200, 200]


def test_a_port_that_is_taken_and_a_token_that_others_may_read_are_said(book):
    with serving(book.root) as (_, port, _):
        done = subprocess.run([*CLI, "serve", "--root", str(book.root), "--port", str(port)], capture_output=True, text=True)
        assert done.returncode == 2 and f"127.0.0.1:{port} cannot be had: Address already in use" in done.stderr
    (book.store/"keys"/"http-token").chmod(0o640)
    done = subprocess.run([*CLI, "serve", "--root", str(book.root), "--port", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "is open to others than its owner (mode 640)" in done.stderr


def test_the_command_says_what_it_did_and_lists_what_it_did_not(book, tmp_path):
    (tmp_path/"x.csv").write_text("id,event_time,value\na,2017-07-01T00:00Z,1\nb,noon,1\n")
    run = lambda *words: subprocess.run([*CLI, *words, "--root", str(book.root), "--json"], capture_output=True, text=True)
    done = run("ingest", str(tmp_path/"x.csv"), "--kind", "outcome")
    told = json.loads(done.stdout)
    assert (done.returncode, told["accepted"], told["refused"], told["letters"][0]["row"]) == (3, 1, 1, 3), done.stderr
    assert json.loads(run("ingest", str(tmp_path/"x.csv"), "--kind", "outcome").stdout)["before"]
    listed = json.loads(run("ingest", "--refused").stdout)
    assert (listed["letters"], listed["shown"][0]["reason"][:6]) == (1, "'noon'")
    assert run("ingest", str(tmp_path/"x.csv"), "--kind", "outcom").returncode == 3
    assert run("ingest", str(tmp_path/"x.csv"), "--map", "zone=Mars").returncode == 2
    assert run("ingest", "sqlite:///nowhere.db", "--query", "SELECT 1", "--kind", "outcome").returncode == 2


def test_the_command_finds_a_feature_that_a_service_computes_in_another_unit(book, tmp_path, capsys):
    from retrain_nb.demo import toy
    from retrain_nb.faces.cli import main
    columns = ["parcel_id", "due_time", "depot", "load", "rain", "hour", "weekday"]
    rows = toy.rows().astype({"depot": str})[columns].tail(2000)
    words = ["--kind", "prediction", "--map", "id=parcel_id", "--map", "event_time=due_time", "--map", "known_at=due_time", "--map", f"features={','.join(columns[2:])}"]
    for name, frame, since, code, amiss in (("right", rows.head(1000), "2024-02-01", 0, []), ("inches", rows.tail(1000).assign(rain=lambda f: f.rain/25.4), rows.due_time.iloc[1000].isoformat(), 3, ["rain"])):
        frame.to_csv(tmp_path/f"{name}.csv", index=False)
        assert main(["ingest", str(tmp_path/f"{name}.csv"), *words, "--root", str(book.root)]) == 0
        capsys.readouterr()
        assert main(["skew", "--since", since, "--root", str(book.root), "--json"]) == code
        assert [c["column"] for c in json.loads(capsys.readouterr().out)["columns"] if c["unequal"]] == amiss
