"Files as they come: what is read from each, and what is refused, naming file, row and column and no value"
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrain_nb.records import DataError, RetrainError, UsageError
from retrain_nb.services.tables import read_table, sniff


def put(folder, content, name="rows.csv"): # -> the path of a file
    path = Path(folder)/name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(folder, table, name="rows.parquet"):
    path = Path(folder)/name
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pandas(table, preserve_index=False), path)
    return path


def rows(path, **asked): # As `init` reads it: first sniffed, then read as declared
    how = sniff(path, **{"label": "y", "time": "t", **asked})
    return read_table(path, **how.arguments)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"), (b"\n \n", "is empty"), (b"t,y\n", "has a header and no rows"), (b"\x1f\x8b\x08\x00", "is packed"), (b"PK\x03\x04xl", "is packed"),
    ("t,y\n2024-01-01,1\n".encode("utf-16"), "UTF-16, from byte 0 on"), (b"t,y\n2024-01-01,1\nZ\xfcrich,0\n", "is not UTF-8: byte 18 is 0xFC"),
    (b"t,y,y\n2024-01-01,1,1\n", "columns 2 and 3 are both called `y`"), (b"t,y,a b,a:b\n2024-01-01,1,1,1\n", "columns `a b` and `a:b` both become `a_b`"),
    (b"t,y\n2024-01-01,1\n2024-01-02,1,7\n", "row 2 has 3 cells, and the header names 2 columns"), (b"t,y\n2024-01-01,1\n2024-01-02\n", "row 2 has 1 cell"),
    (b"t,y\n2024-01-01,1\n,0\n", "column `t`: row 2 is empty"), (b"t,y\n2024-01-01,1\nlater,0\n", "column `t` is written in a way that is not known"),
    (b"t,y\n03/04/2024,1\n05/06/2024,0\n", "could be written as %d/%m/%Y or as %m/%d/%Y"), (b"t,y\n1,1\n2,0\n", "numbers that are no moments between 1980 and 2100"),
    (b"t,y,x\n2024-01-01,1,1\n2024-01-02,0,inf\n", "column `x`: row 2 is infinite"), (b"t,y,x\n2024-01-01,1,-Infinity\n", "column `x`: row 1 is infinite"),
    (b"when,y\n2024-01-01,1\n", "has no column `t`"), (b"t,label\n2024-01-01,1\n", "has no column `y`"), (b"t,y,known_at\n2024-01-01,1,x\n", "has a column `known_at` already")])
def test_what_cannot_be_read_is_refused_by_name(tmp_path, content, words):
    with pytest.raises(RetrainError) as e: rows(put(tmp_path, content))
    assert words in str(e.value) and "rows.csv" in str(e.value) and e.value.cure


def test_a_hidden_value_is_not_in_the_error(tmp_path):
    path = put(tmp_path, "t,y,x\n2024-01-01,no,secret\nsecret,yes,1\n")
    for asked in ({"label": "y", "time": "t"}, {"label": "y", "time": "t", "values": ("no", "maybe")}):
        with pytest.raises(DataError) as e: read_table(path, **asked)
        assert "secret" not in str(e.value) and "row 2" in str(e.value)


@pytest.mark.parametrize(("array", "words"), [
    (pa.array([[1], [2]]), "column `x` holds list"), (pa.array([{"a": 1}, {"a": 2}]), "column `x` holds struct"), (pa.array([b"a", b"b"]), "column `x` holds binary"),
    (pa.array([1.0, float("inf")]), "column `x`: row 2 is infinite")])
def test_a_parquet_column_that_no_model_can_look_at_is_refused_by_name(tmp_path, array, words):
    path = parquet(tmp_path, pa.table({"t": pa.array([0, 1], pa.timestamp("s")), "y": [0, 1], "x": array}))
    with pytest.raises(DataError, match="rows.parquet") as e: rows(path)
    assert words in str(e.value)


def test_a_torn_parquet_file_is_refused_wherever_it_is_torn(tmp_path):
    whole = parquet(tmp_path, pd.DataFrame({"t": pd.date_range("2024-01-01", periods=500, freq="h"), "y": [0, 1]*250, "x": np.arange(500.0)})).read_bytes()
    for cut in range(4, len(whole) - 1, max(1, len(whole)//40)):
        with pytest.raises(DataError, match="torn.parquet is no whole Parquet file"): rows(put(tmp_path, whole[:cut], "torn.parquet"))
    twice = pa.Table.from_arrays([pa.array([0, 1], pa.timestamp("s")), pa.array([0, 1]), pa.array([0, 1])], names=["t", "y", "y"])
    with pytest.raises(DataError, match="columns 2 and 3 are both called `y`"): rows(parquet(tmp_path, twice))
    with pytest.raises(DataError, match="has no rows"): rows(parquet(tmp_path, pa.table({"t": pa.array([], pa.timestamp("s")), "y": pa.array([], pa.int64())})))


def test_every_type_of_parquet_becomes_a_number_a_text_or_a_time(tmp_path):
    from datetime import date, time, timedelta
    from decimal import Decimal
    made = {"t": pa.array([0, 1], pa.timestamp("ns")), "y": pa.array([True, None]), "day": pa.array([date(2024, 1, 1), None]), "clock": pa.array([time(1, 2), None]), "wait": pa.array([timedelta(hours=1), None]),
            "price": pa.array([Decimal("1.50"), None]), "name": pa.array(["a", None]).dictionary_encode(), "codes": pa.array([7, None]).dictionary_encode(), "none": pa.nulls(2), "whole": pa.array([1, None], pa.int8()), "zone": pa.array([0, None], pa.timestamp("us", "Asia/Tokyo"))}
    found = rows(parquet(tmp_path, pa.table(made)))
    assert [found[c][0] for c in ("y", "wait", "price", "name", "whole", "codes")] == [1.0, 3600.0, 1.5, "a", 1.0, 7.0]
    assert {str(found[c].dtype) for c in ("t", "day", "zone", "due" if "due" in found else "t")} == {"datetime64[us, UTC]"} and str(found.clock[0]).startswith("01:02")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_marks_and_line_ends_are_sniffed(tmp_path, separator, mark, end):
    lines = [["t", "y", "name", "n"], ["2024-01-02 10:00", "1", f'"a{separator}b ""c"""', "1.5"], ["2024-01-01 10:00", "0", '"two\nlines"', ""]]
    found = rows(put(tmp_path, mark + end.join(separator.join(line) for line in lines).encode()))
    assert found.name.tolist() == ["two\nlines", f'a{separator}b "c"'] and found.row_number.tolist() == [2, 1] and found.y.tolist() == [0, 1] and np.isnan(found.n[0])


def test_codes_keep_their_zeros_long_ids_their_digits_and_mixed_columns_are_text(tmp_path):
    found = rows(put(tmp_path, "t,y,zip,card,mixed,plus,flag\n2024-01-01,1,07001,12345678901234567,1,+1,true\n2024-01-02,0,80331,12345678901234568,a,-2e3,FALSE\n"))
    assert found.zip.tolist() == ["07001", "80331"] and found.card.tolist() == ["12345678901234567", "12345678901234568"] and found.mixed.tolist() == ["1", "a"]
    assert found.plus.tolist() == [1.0, -2000.0] and found.flag.tolist() == [True, False]


def test_decimal_commas_are_seen_where_something_else_separates_and_stay_text_elsewhere(tmp_path):
    found = sniff(put(tmp_path, "t;y;x\n2024-01-01;1;1,5\n2024-01-02;0;-2,25\n"), "y", "t")
    assert found.arguments["decimal"] == "," and read_table(tmp_path/"rows.csv", **found.arguments).x.tolist() == [1.5, -2.25]
    assert rows(put(tmp_path, 't,y,x\n2024-01-01,1,"1,5"\n2024-01-02,0,"2,5"\n')).x.tolist() == ["1,5", "2,5"]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/Sao_Paulo", "UTC"])
def test_hours_that_a_clock_showed_twice_or_never_are_refused_by_row(tmp_path, zone):
    for bad in ("2024-10-27 02:30", "2024-03-31 02:30"):
        path = put(tmp_path, f"t,y\n2024-06-01 12:00,1\n{bad},0\n")
        if zone == "Europe/Berlin":
            with pytest.raises(DataError, match="column `t`: row 2 is in an hour that clocks in Europe/Berlin showed twice, or never"): rows(path, zone=zone)
        else: assert len(rows(path, zone=zone)) == 2
        assert len(rows(put(tmp_path, f"t,y\n2024-06-01 12:00,1\n{bad}+01:00,0\n"), zone=zone)) == 2 # With its offset it is a moment
    with pytest.raises(UsageError, match="no time zone is called Mars/Base"): rows(path, zone="Mars/Base")


MOMENTS = pd.Series(pd.to_datetime(["2024-01-31 23:59:58", "2024-12-13 00:00:01", "2001-09-09 01:46:40"], utc=True))


@pytest.mark.parametrize("how", ["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M:%S", "%d/%m/%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p", "%Y/%m/%d %H:%M:%S", "%d %b %Y %H:%M:%S", "s", "ms", "us", "ns"])
@pytest.mark.parametrize("binary", [False, True])
def test_a_time_is_the_same_moment_however_it_was_written(tmp_path, how, binary):
    written = MOMENTS.dt.strftime(how) if "%" in how else MOMENTS.astype(f"datetime64[{how}, UTC]").astype("int64")
    frame = pd.DataFrame({"t": written, "y": [0, 1, 0]})
    found = rows(parquet(tmp_path, frame) if binary else put(tmp_path, frame.to_csv(index=False)))
    assert found.t.tolist() == sorted(MOMENTS.tolist())


def test_days_written_as_numbers_are_days(tmp_path):
    assert [str(t)[:10] for t in rows(put(tmp_path, "t,y\n20240102,1\n20231231,0\n")).t] == ["2023-12-31", "2024-01-02"]


VALUES = {"number": st.floats(allow_nan=False, allow_infinity=False), "whole": st.integers(-10**14, 10**14), "text": st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)}


@given(st.data(), st.integers(1, 30), st.sampled_from([",", ";", "\t", "|"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read(tmp_path, data, n, separator):
    frame = pd.DataFrame({"t": pd.date_range("2024-01-01", periods=n, freq="h"), "y": [i % 2 for i in range(n)], **{name: data.draw(st.lists(kind, min_size=n, max_size=n)) for name, kind in VALUES.items()}})
    text = io.StringIO()
    frame.to_csv(text, index=False, sep=separator)
    found = read_table(put(tmp_path, text.getvalue()), label="y", time="t", separator=separator, missing=())
    assert np.array_equal(found.number.astype("float64"), frame.number) and found.whole.tolist() == frame.whole.tolist()
    if not pd.api.types.is_numeric_dtype(found.text): assert found.text.astype(str).tolist() == frame.text.tolist()


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_bring_anything_but_an_answer(tmp_path, junk):
    for content in (junk, b"t,y\n2024-01-01,1\n" + junk, b"PAR1" + junk):
        try: rows(put(tmp_path, content))
        except RetrainError as e: assert e.cure


def test_five_hundred_columns_and_ten_thousand_names(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(300, 500)), columns=[f"sensor {i} (mV)" for i in range(500)]).assign(t=pd.date_range("2024-01-01", periods=300), y=[0, 1]*150)
    found = rows(put(tmp_path, frame.to_csv(index=False)))
    assert found.shape == (300, 504) and "sensor_7_(mV)" in found
    many = pd.DataFrame({"t": pd.date_range("2024-01-01", periods=20_000, freq="min"), "y": [0, 1]*10_000, "who": [f"n{i % 10_000}" for i in range(20_000)]})
    assert rows(put(tmp_path, many.to_csv(index=False))).who.nunique() == 10_000


def test_long_names_long_cells_and_odd_bytes_are_read_or_refused(tmp_path):
    found = rows(put(tmp_path, f"t,y,id\n2024-01-01,1,{'a'*10_240}\n2024-01-02,0,b\n"))
    assert [len(v) for v in found.id] == [10_240, 1]
    for content in ("t,y," + "x"*300_000 + "\n2024-01-01,1,1\n", "t,y,x\n2024-01-01,1," + "x"*300_000 + "\n", "t\0,y\n2024-01-01,1\n", "\n\nt,y\n\n2024-01-01,1\n", '"t,y\n2024-01-01,1\n'):
        try: assert len(rows(put(tmp_path, content))) == 1
        except RetrainError as e: assert e.cure


def test_the_order_of_rows_is_a_time_that_stays_as_rows_are_added(tmp_path):
    one = rows(put(tmp_path, "y,x\n1,5\n0,6\n"), time="")
    two = rows(put(tmp_path, "y,x\n1,5\n0,6\n1,7\n"), time="")
    assert one.equals(two[:2]) and two.row_number.tolist() == [1, 2, 3] and str(two.due[2]) == "1970-01-04 00:00:00+00:00"


def test_a_file_that_changed_its_ways_is_refused_and_not_read_in_another_way(tmp_path):
    how = sniff(put(tmp_path, "t;y\n13.06.2024;yes\n12.06.2024;no\n"), "y", "t").arguments | {"values": ("no", "yes")}
    assert read_table(tmp_path/"rows.csv", **how).y.tolist() == [0.0, 1.0]
    for content, words in (("t,y\n13.06.2024,yes\n", "has one column"), ("t;y\n06/13/2024;yes\n", "row 1 is no time written as %d.%m.%Y"), ("t;y\n13.06.2024;oui\n", "row 1 is neither of the two values"), ("t;late\n13.06.2024;yes\n", "has no column `y`")):
        with pytest.raises(DataError, match="rows.csv") as e: read_table(put(tmp_path, content), **how)
        assert words in str(e.value)
