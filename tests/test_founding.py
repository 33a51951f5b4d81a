"A workbench for one's own file: made from the command line, and a first cycle that runs unedited"
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retrain_nb.faces.cli import main
from retrain_nb.records import SettingsError
from retrain_nb.services.workbench import open_workbench
from retrain_nb.settings import load_settings, parse_settings, policy
from retrain_nb.stages.contract import check_contract
from retrain_nb.stages.proposal import propose_aim, propose_key, role_of

NOW = datetime.now(UTC)


def stream(n=3000, days=60, ends=datetime(2021, 3, 1), seed=0): # -> features that tell something, a time, and a score behind the labels
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"t": pd.date_range(end=ends, periods=n, freq=f"{days*1440//n}min"), "load": rng.normal(10, 3, n).round(2), "rooms": rng.integers(1, 6, n), "town": rng.choice(["Basel", "Genf", "Zug"], n),
                          "gap": np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n).round(3))})
    return frame, (frame["load"] - 10)/3 + (frame.town == "Zug")*1.5 + rng.normal(size=n)


def call(capsys, *words):
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def made(capsys, root, path, *words):
    code, done = call(capsys, "init", root, "--data", path, "--label", "y", *words)
    assert code == 0, done
    return done, {c["column"]: c["role"] for c in done["columns"]}


def fast(root): # Neither profile nor mirror, which have tests of their own
    text = (root/"settings.ini").read_text().replace("mode = offline", "mode = disabled").replace("rounds = 200", "rounds = 40")
    (root/"settings.ini").write_text(text + "\n[run]\nprofile_rows = 0\n")


def written(frame, path, **how):
    frame.to_parquet(path, index=False) if path.suffix == ".parquet" else frame.to_csv(path, index=False, **how)
    return path


def binary(folder): # A spreadsheet of years ago: semicolons, decimal commas, days first, yes and no, a leak, a mail address, remarks
    frame, score = stream()
    late = score > 0.7
    frame = frame.assign(t=frame.t.dt.strftime("%d.%m.%Y %H:%M"), y=np.where(late, "yes", "no"), fine=(np.where(late, 30, 0) + np.arange(len(frame)) % 7*0.1).round(1), order=[f"A-{i}" for i in range(len(frame))],
                         mail=[f"u{i}@example.org" for i in range(len(frame))], note=[f"rang at {i} o'clock" for i in range(len(frame))], shop="north")
    return written(frame, folder/"orders.csv", sep=";", decimal=","), ["--time", "t", "--zone", "Europe/Zurich"]


def multiclass(folder): # Fresh rows, labels a day late, nulls, a code
    frame, score = stream(ends=NOW.replace(tzinfo=None, microsecond=0))
    known = frame.t + pd.Timedelta("1D")
    frame = frame.assign(y=pd.Series(np.select([score > 1.2, score < -0.3], ["air", "road"], "rail")).where(known < pd.Timestamp(NOW).tz_localize(None)), known=known, item_id=np.arange(len(frame)) % 40)
    return written(frame, folder/"parcels.parquet"), ["--time", "t", "--label-time", "known"]


def regression(folder): # No time, and numbers that are milliseconds of something else
    frame, score = stream(n=2500)
    return written(frame.drop(columns="t").assign(y=(20 + 5*score).round(2), seen_ms=np.arange(2500)*7 % 1013), folder/"rents.csv"), []


@pytest.mark.parametrize(("kind", "task", "roles"), [
    (binary, "binary", {"fine": "leak suspect", "mail": "personal", "note": "free text", "order": "key", "shop": "constant", "town": "category", "load": "number", "gap": "number"}),
    (multiclass, "multiclass", {"item_id": "category", "row_number": "key", "known": "label time"}),
    (regression, "regression", {"due": "time", "known_at": "label time", "row_number": "key", "town": "category", "seen_ms": "number"})])
def test_a_first_cycle_runs_unedited_on_rows_nobody_has_seen(tmp_path, capsys, kind, task, roles):
    path, words = kind(tmp_path)
    root = tmp_path/"bench"
    done, found = made(capsys, root, path, *words)
    book = open_workbench(root)
    assert roles.items() <= found.items() and book.settings.source.task == task
    assert set(book.view.columns) == {c for c, role in found.items() if role in ("category", "number")} and {"load", "town"} <= set(book.view.columns)
    assert book.settings.window.anchor == ("now" if kind is multiclass else "newest")
    for column, role in found.items():
        if role in ("leak suspect", "personal", "free text", "constant"): assert all(f"{column} ({role}): " in (root/name).read_text() for name in ("source.py", "contract.toml"))
    assert "rang at" not in (root/"contract.toml").read_text() and "@example.org" not in "".join((root/name).read_text() for name in ("contract.toml", "source.py", "settings.ini", "nbs/source.ipynb")) + json.dumps(done)
    fast(root)
    code, turn = call(capsys, "cycle", "--root", root)
    assert (code, turn["verdict"], turn["did"]) == (0, "PASS", "bootstrap"), turn["reasons"][0]["reason"]
    if kind is binary: # The file is as it was: the next night has nothing to do
        assert book.contract.hidden == ("mail",) and "@example.org" not in (root/turn["report"]).read_text()
        code, again = call(capsys, "cycle", "--root", root, "--now", (NOW + timedelta(days=2)).isoformat())
        assert (code, again["did"]) == (0, "nothing new")


def test_the_notebook_exported_again_gives_the_module_that_is_there(tmp_path, capsys):
    path, words = multiclass(tmp_path)
    root = tmp_path/"bench"
    made(capsys, root, path, *words)
    before = (root/"source.py").read_bytes()
    book = json.loads((root/"nbs"/"source.ipynb").read_text())
    last = "".join(book["cells"][-1]["source"])
    assert last.startswith("#| eval: false") and 'export_source("source.ipynb")' in last
    (root/"source.py").unlink()
    subprocess.run([sys.executable, "-c", last], cwd=root/"nbs", check=True, capture_output=True)
    assert (root/"source.py").read_bytes() == before
    code = "".join("".join(c["source"]) + "\n" for c in book["cells"] if c["cell_type"] == "code" and "eval: false" not in "".join(c["source"]))
    subprocess.run([sys.executable, "-c", code], cwd=root/"nbs", check=True, capture_output=True) # Its lessons run too


def test_a_change_of_the_source_is_what_the_next_cycle_reads(tmp_path, capsys):
    path, words = multiclass(tmp_path)
    one, two = tmp_path/"one", tmp_path/"two"
    for root in (one, two): made(capsys, root, path, *words)
    text = (two/"source.py").read_text()
    (two/"source.py").write_text(text.replace("'load', ", ""))
    views = [open_workbench(root).view for root in (one, two, one)] # Each its own `source`, in one process
    assert ["load" in view.columns for view in views] == [True, False, True]


@pytest.mark.parametrize("there", ["settings.ini", "contract.toml", "source.py", "nbs/source.ipynb"])
def test_what_is_there_is_never_written_over(tmp_path, capsys, there):
    path, words = regression(tmp_path)
    root = tmp_path/"bench"
    (root/there).parent.mkdir(parents=True)
    (root/there).write_text("mine")
    code, done = call(capsys, "init", root, "--data", path, "--label", "y", *words)
    assert code == 2 and there in done["cause"] and "there already" in done["cause"]
    assert [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()] == [there] and (root/there).read_text() == "mine"


def test_the_same_again_changes_nothing(tmp_path, capsys):
    path, words = regression(tmp_path)
    made(capsys, tmp_path/"bench", path, *words)
    assert made(capsys, tmp_path/"bench", path, *words)[0]["made"] == []


@pytest.mark.parametrize(("change", "words", "cause"), [
    (lambda f: f.assign(y=1), [], "there is nothing to learn"), (lambda f: f.assign(y=[f"c{i}" for i in range(len(f))]), [], "too many to be classes"), (lambda f: f, ["--task", "binary"], "a binary task has two"),
    (lambda f: f, ["--task", "ranking"], "no task `ranking`"), (lambda f: f, ["--time", "when"], "no column `when`"), (lambda f: f, ["--entity", "who"], "no column `who`"), (lambda f: f, ["--key", "rooms"], "names 2,495 rows that an earlier one has named"),
    (lambda f: f[["y"]].assign(a=1, b="x"), [], "no column is left to learn from: `a` is constant, `b` is constant"), (lambda f: f.assign(t="2199-01-01"), ["--time", "t"], "has no row before"), (lambda f: f.assign(y=f.y.where(f.index > 1, np.inf)), [], "row 1 is infinite"),
    (lambda f: f.assign(mail=[f"u{i}@example.org" for i in range(len(f))]), ["--key", "mail"], "`mail` seems to hold mail addresses")])
def test_what_cannot_be_made_leaves_nothing_behind(tmp_path, capsys, change, words, cause):
    path, _ = regression(tmp_path)
    written(change(pd.read_csv(path)), path)
    code, done = call(capsys, "init", tmp_path/"bench", "--data", path, "--label", "y", *words)
    assert code in (2, 3) and cause in done["cause"] and done["cure"] and not (tmp_path/"bench").exists()
    assert "example.org" not in json.dumps(done)


def test_without_a_label_or_with_two_beginnings_it_asks(tmp_path, capsys):
    for words in (["--data", "x.csv"], ["--demo", "toy", "--data", "x.csv"], []): assert call(capsys, "init", tmp_path/"bench", *words)[0] == 2
    assert call(capsys, "init", tmp_path/"bench", "--data", tmp_path/"no.csv", "--label", "y")[1]["cause"].endswith("cannot be read: No such file or directory.")


def test_a_person_hears_what_was_inferred_and_why(tmp_path, capsys):
    path, words = binary(tmp_path)
    assert main(["init", str(tmp_path/"bench"), "--data", str(path), "--label", "y", *words]) == 0
    said = capsys.readouterr().out
    for line in ("it cuts the header and the first rows", "%d.%m.%Y %H:%M", "Europe/Zurich", "the label has two values", "and 0 is no", "the newest row is", "alone it tells the label with an AUC of 1.000", "it seems to hold mail addresses", "these stay out", "cycle"): assert line in said, line
    assert "@example.org" not in said


def test_five_hundred_columns_of_which_few_say_anything(tmp_path, capsys):
    frame, score = stream(n=1500)
    noise = pd.DataFrame(np.random.default_rng(1).normal(size=(1500, 500)).round(3), columns=[f"sensor {i} [mV]" for i in range(500)])
    path = written(pd.concat([frame, noise.assign(**{"sensor 7 [mV]": np.nan})], axis=1).assign(y=(score > 0).astype(int)), tmp_path/"wide.csv")
    done, found = made(capsys, tmp_path/"bench", path, "--time", "t")
    assert found["sensor_7_mV_"] == "empty" and sum(role == "number" for role in found.values()) >= 495
    book = open_workbench(tmp_path/"bench")
    assert check_contract(book.load("source:rows")(), book.contract, NOW).verdict.outcome == "PASS"


def test_whoever_was_named_stays_out_and_so_does_what_was_filled_in_later(tmp_path, capsys):
    frame, score = stream()
    closed = frame.t + pd.to_timedelta(np.random.default_rng(3).gamma(2, 20, len(frame)), "h")
    path = written(frame.assign(y=(score > 0).astype(int), who=np.arange(len(frame)) % 300, closed=closed, in_time=closed < frame.t + pd.Timedelta("40h")), tmp_path/"jobs.parquet")
    done, found = made(capsys, tmp_path/"bench", path, "--time", "t", "--entity", "who")
    assert any(row["what"] == "entity" and row["why"].startswith("100.0% of the test rows are about one that training rows are about too") for row in done["proposed"])
    assert (found["who"], found["closed"], found["in_time"]) == ("entity", "time", "leak suspect")
    assert "how long it took until `closed` tells it" in (tmp_path/"bench"/"source.py").read_text()


def test_where_the_test_ends_is_part_of_the_policy_and_old_recipes_keep_their_digest(small_settings):
    assert policy(parse_settings(small_settings)) == policy(parse_settings(small_settings + "[window]\nanchor = now\n")) and "anchor" not in policy(parse_settings(small_settings))["window"]
    assert policy(parse_settings(small_settings + "[window]\nanchor = newest\n"))["window"]["anchor"] == "newest"
    with pytest.raises(SettingsError, match="anchor"): parse_settings(small_settings + "[window]\nanchor = oldest\n")


@pytest.mark.parametrize(("as_of", "anchor", "end"), [("2026-01-01T00:00Z", "newest", "2021-03-02"), ("2026-01-01T00:00Z", "now", "2026-01-01"), ("2021-02-10T12:00Z", "newest", "2021-02-10T12:00")])
def test_a_test_ends_after_the_newest_row_and_never_after_what_was_known(tmp_path, capsys, as_of, anchor, end):
    frame, score = stream()
    made(capsys, tmp_path/"bench", written(frame.assign(y=(score > 0).astype(int)), tmp_path/"a.parquet"), "--time", "t")
    text = (tmp_path/"bench"/"settings.ini").read_text()
    (tmp_path/"bench"/"settings.ini").write_text(text.replace("anchor = newest", f"anchor = {anchor}"))
    book = open_workbench(tmp_path/"bench")
    assert load_settings(tmp_path/"bench").window.anchor == anchor
    moment = datetime.fromisoformat(as_of)
    assert book.split(moment, book.freeze(moment, moment)).test.end == datetime.fromisoformat(f"{end}Z" if "T" in end else f"{end}T00:00Z")


@pytest.mark.parametrize(("values", "task", "pair"), [(["Y", "N"], "binary", ("N", "Y")), ([True, False], "binary", ()), ([1.0, 0.0], "binary", ()), ([-1, 1], "binary", (-1.0, 1.0)), (["1", "0"], "binary", ("0", "1")),
                                                     ([1, 2, 3], "multiclass", ()), ([1.5, 2, 3], "regression", ()), (range(11), "regression", ()), (pd.Categorical(["a", "b", "c"]), "multiclass", ())])
def test_the_label_says_what_is_to_be_learned(values, task, pair):
    aim = propose_aim(pd.Series(values, name="y"))
    assert (aim.task, aim.values) == (task, pair)


@pytest.mark.parametrize(("column", "role"), [([None]*50, "empty"), ([1.0]*50, "constant"), ([1.0, None]*25, "number"), (["a"]*49 + [None], "category"), ([f"k{i}" for i in range(50)], "identifier"), ([[1]]*50, "other"), ([1, "a"]*25, "other"),
                                             (pd.Categorical(["x", "y"]*25), "category"), ([True, None]*25, "number"), (pd.date_range("2024-01-01", periods=50, tz="UTC"), "time"), ([f"text no {i}" for i in range(50)], "free text")])
def test_a_column_has_a_role(column, role): assert role_of(pd.Series(column, name="x"))[0] == role


def test_a_key_never_repeats_and_is_no_measure():
    frame = pd.DataFrame({"price": [10**6*i for i in range(1, 9)], "name": list("abcdefga"), "customer_id": range(0, 8000, 1000), "code": list("abcdefgh")})
    assert propose_key(frame, [])[0] == "customer_id" and propose_key(frame, ["customer_id"])[0] == "code" and propose_key(frame, ["customer_id", "code"])[0] == ""
    assert propose_key(frame.assign(customer_id=[None, *range(7)]), ["code"])[0] == ""


def test_the_path_of_the_file_is_found_from_anywhere(tmp_path, capsys, monkeypatch):
    path, words = regression(tmp_path)
    monkeypatch.chdir(tmp_path)
    made(capsys, "bench", path.name, *words)
    monkeypatch.chdir("/")
    assert len(open_workbench(tmp_path/"bench").load("source:rows")()) == 2500 and str(Path(tmp_path).resolve()) in (tmp_path/"bench"/"source.py").read_text()
