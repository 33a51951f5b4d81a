"""The whole loop on the toy stream: real kernels, real snapshots, a real ledger, through the command line."""
import json
import re
import shutil
import sqlite3
from pathlib import Path

import pytest

from retrain_nb.faces.cli import main
from retrain_nb.services.workbench import open_workbench
from retrain_nb.stores import ledger
from retrain_nb.windows import parse_time

MARCH, APRIL = "2024-03-01", "2024-03-22"


def call(capsys, root, *words):
    "Exit code and JSON of one command"
    capsys.readouterr()
    code = main([*words, "--root", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


def entries(root):
    book = open_workbench(root)
    return book.ask(ledger.entries)


def made(folder):
    "A toy workbench without profile and mirror, which have tests of their own"
    assert main(["init", str(folder), "--demo", "toy"]) == 0
    text = (folder/"settings.ini").read_text().replace("mode = offline", "mode = disabled")
    (folder/"settings.ini").write_text(text + "\n[run]\nprofile_rows = 0\n")
    return folder


@pytest.fixture
def parcels(first_night, tmp_path):
    return Path(shutil.copytree(first_night, tmp_path/"parcels"))


def change(root, name, before, after):
    path = root/name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_the_first_cycle_makes_a_champion_and_says_on_what_evidence(first_night, capsys):
    code, now = call(capsys, first_night, "status")
    champion = now["champion"]
    assert code == 0 and champion["decision"] == "bootstrap" and champion["since"] == f"{MARCH}T00:00:00Z"
    assert re.fullmatch("[0-9a-f]{64}", champion["model"]) and re.fullmatch("[0-9a-f]{64}", champion["snapshot"])
    assert now["last_cycle"]["verdict"] == "PASS" and now["last_cycle"]["run"] == champion["run"]
    assert any(leaf["name"] for leaf in now["last_cycle"]["reasons"])
    assert (first_night/now["report"]).is_file() and Path(now["reports"]).is_file()


def test_the_same_cycle_again_adds_nothing(parcels, capsys):
    before = entries(parcels)
    code, again = call(capsys, parcels, "cycle", "--now", MARCH)
    assert (code, again["verdict"], again["new"]) == (0, "PASS", False)
    assert entries(parcels) == before


def test_the_same_recipe_trained_twice_has_one_model_digest(parcels, capsys, tmp_path):
    other = made(tmp_path/"other")
    assert main(["cycle", "--now", MARCH, "--root", str(other)]) == 0
    models = [call(capsys, root, "status")[1]["champion"]["model"] for root in (parcels, other)]
    assert models[0] == models[1]


def test_a_later_cycle_refreshes_and_keeps_the_old_model(parcels, capsys):
    old = call(capsys, parcels, "status")[1]["champion"]
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    new = call(capsys, parcels, "status")[1]["champion"]
    if done["did"] == "refresh": assert code == 0 and new["model"] != old["model"] and new["decision"] == "refresh"
    else: assert new["model"] == old["model"]
    names = {leaf["name"] for part in done["reasons"][0]["parts"] for leaf in (part["parts"] or [part])}
    assert {"log_loss", "auc"} <= names
    assert open_workbench(parcels).artifacts.has(old["model"])


def test_nothing_new_in_the_source_trains_nothing(parcels, capsys):
    assert call(capsys, parcels, "cycle", "--now", "2024-04-03")[1]["run"]
    runs = len(call(capsys, parcels, "status")[1]["runs"])
    champion = call(capsys, parcels, "status")[1]["champion"]
    code, done = call(capsys, parcels, "cycle", "--now", "2024-04-04")
    if champion["since"].startswith("2024-04-03"): assert (code, done["did"], done["run"]) == (0, "nothing new", "")
    assert len(call(capsys, parcels, "status")[1]["runs"]) == runs or done["did"] != "nothing new"


def test_a_champion_that_learned_from_the_test_rows_is_no_fair_rival(parcels, capsys):
    done = call(capsys, parcels, "run", "retrain", "-p", "as_of", "2024-02-20")
    assert done[0] == 4 and "no news to it" in done[1]["verdict"]["reason"]


def test_a_champion_that_answers_another_question_is_no_rival(parcels, capsys):
    (parcels/"asks.py").write_text("from retrain_nb.demo import toy\nview = toy.view\ndef rows(): return toy.rows().assign(heavy=lambda f: (f.load > 1.2).astype(float))\n")
    change(parcels, "settings.ini", "retrain_nb.demo.toy:rows", "asks:rows")
    change(parcels, "settings.ini", "label = late", "label = heavy")
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["did"]) == (4, "kept") and "`champion for late`, which no gate knows" in done["reasons"][0]["reason"]


def test_other_code_that_gives_the_same_rows_is_another_origin_and_no_contradiction(parcels):
    (parcels/"gives.py").write_text("from retrain_nb.demo import toy\ndef rows(): return toy.rows()\n")
    as_of, at, frozen = parse_time(MARCH), parse_time(APRIL), []
    for entry in ("retrain_nb.demo.toy:rows", "gives:rows", "gives:rows"):
        change(parcels, "settings.ini", next(w for w in ("retrain_nb.demo.toy:rows", "gives:rows") if w in (parcels/"settings.ini").read_text()), entry)
        frozen.append(open_workbench(parcels).freeze(as_of, at).digest)
    told = [e.body["source"]["adapter"] for e in entries(parcels) if e.kind == "snapshot.frozen" and e.body["snapshot"] == frozen[0]]
    assert len(set(frozen)) == 1 and told == ["retrain_nb.demo.toy:rows", "gives:rows"]


def test_a_page_that_does_not_ask_whether_the_rows_are_new_to_the_champion_passes_nothing(parcels, capsys):
    change(parcels, "nbs/runs/retrain.ipynb", "*sound.parts, read", "*sound.parts[:3], *sound.parts[4:], read")
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["did"]) == (4, "kept") and "unspoiled: this check was not made" in done["reasons"][0]["reason"]


def test_without_leave_no_first_model_serves(tmp_path, capsys):
    root = made(tmp_path/"asks")
    change(root, "settings.ini", "bootstrap = gated", "bootstrap = refuse")
    code, done = call(capsys, root, "cycle", "--now", MARCH)
    assert (code, done["verdict"], done["did"], done["champion"]) == (4, "INSUFFICIENT", "kept", "")
    assert "without a person" in done["reasons"][0]["reason"]
    reports, page = root/"reports", (root/"reports"/"index.html").read_text()
    assert re.findall(r'class="pill [^>]*>(\w+)<', page) == ["INSUFFICIENT"] # As its report says, and not the PASS of its gates
    for file in (reports/"index.html", reports/done["run"]/"report.html"):
        assert [href for href in re.findall(r'href="([^"#:]+)"', file.read_text()) if not (file.parent/href).exists()] == []


def test_a_breach_of_contract_exits_3_and_shows_the_rows(parcels, capsys):
    old = call(capsys, parcels, "status")[1]["champion"]
    change(parcels, "contract.toml", "max = 20.0", "max = 2.0")
    change(parcels, "contract.toml", 'version = "1.0"', 'version = "2.0"')
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["verdict"], done["did"]) == (3, "FAIL", "kept")
    assert "load" in done["reasons"][0]["reason"]
    assert call(capsys, parcels, "status")[1]["champion"] == old
    html = (parcels/done["report"]).read_text()
    assert "FAIL" in html and re.search(r"P0\d{4}", html)


def test_a_run_by_hand_of_what_a_cycle_refused_leaves_its_report_and_its_entries_as_they_were(parcels, capsys):
    change(parcels, "contract.toml", "max = 20.0", "max = 2.0")
    change(parcels, "contract.toml", 'version = "1.0"', 'version = "2.0"')
    refused = call(capsys, parcels, "cycle", "--now", APRIL)[1]
    def standing(): return {p: p.read_bytes() for p in (parcels/"reports").rglob("*") if p.is_file()}, entries(parcels)
    before = standing()
    assert "The candidate was not accepted" in (parcels/refused["report"]).read_text()
    code, done = call(capsys, parcels, "run", "retrain", "--now", APRIL)
    assert (code, done["run"], done["new"]) == (3, refused["run"], False) and standing() == before
    code, new = call(capsys, parcels, "run", "retrain", "--now", APRIL, "-p", "seed", "7")
    assert (code, new["new"]) == (3, True) and "Run by hand" in (parcels/new["report"]).read_text()
    before = standing()
    assert call(capsys, parcels, "run", "retrain", "--now", APRIL, "-p", "seed", "7")[1]["new"] is False
    assert standing() == before


def test_a_contract_that_changed_trains_nothing_until_its_version_says_so(parcels, capsys):
    champion = call(capsys, parcels, "status")[1]["champion"]
    change(parcels, "contract.toml", "max = 20.0", "max = 15.0")
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["did"], done["run"]) == (3, "kept", "") and "[columns.load] max tightened from 20.0 to 15.0 (major)" in done["reasons"][0]["reason"]
    change(parcels, "contract.toml", 'version = "1.0"', 'version = "1.1"')       # Not far enough
    assert call(capsys, parcels, "cycle", "--now", APRIL)[0] == 3
    assert call(capsys, parcels, "status")[1]["champion"] == champion
    change(parcels, "contract.toml", 'version = "1.1"', 'version = "2.0"')
    assert call(capsys, parcels, "cycle", "--now", APRIL)[1]["did"] == "refresh"
    assert call(capsys, parcels, "verify")[0] == 0


def test_stale_data_blocks_training(parcels, capsys):
    code, done = call(capsys, parcels, "cycle", "--now", "2024-06-01")
    assert (code, done["verdict"]) == (3, "FAIL")
    assert "day" in done["reasons"][0]["reason"]


def test_too_little_history_is_insufficient(tmp_path, capsys):
    root = made(tmp_path/"young")
    code, done = call(capsys, root, "cycle", "--now", "2024-01-18")
    assert (code, done["verdict"], done["champion"]) == (4, "INSUFFICIENT", "")


def test_no_row_before_the_moment_says_when_the_first_one_is(tmp_path, capsys):
    root = made(tmp_path/"early")
    code, done = call(capsys, root, "cycle", "--now", "2020-01-01")
    assert code == 3 and "2024-01-01" in done["cure"]


def test_one_class_of_label_is_insufficient(tmp_path, capsys):
    root = made(tmp_path/"calm")
    feed(root, "calm", "0.0")
    code, done = call(capsys, root, "cycle", "--now", MARCH)
    assert (code, done["verdict"]) == (4, "INSUFFICIENT")


def feed(root, name, late):
    (root/f"{name}.py").write_text(f"from retrain_nb.demo import toy\nview = toy.view\ndef rows(): return toy.rows().assign(late={late})\n")
    change(root, "settings.ini", "retrain_nb.demo.toy:rows", f"{name}:rows")


def test_no_label_at_all_is_insufficient_and_no_crash(tmp_path, capsys):
    root = made(tmp_path/"mute")
    feed(root, "mute", "float('nan')")
    code, done = call(capsys, root, "cycle", "--now", MARCH)
    assert (code, done["verdict"], done["did"]) == (4, "INSUFFICIENT", "kept") and "0 rows with a label" in done["cause"]


def test_a_label_of_text_is_refused_by_name_and_not_repeated(tmp_path, capsys):
    root = made(tmp_path/"wordy")
    feed(root, "wordy", "'grace@example.org'")
    code, done = call(capsys, root, "cycle", "--now", MARCH)
    assert code == 3 and "`late`" in done["cause"] and "grace" not in json.dumps(done)


def test_a_margin_of_nothing_can_be_held_and_drawn(parcels, capsys):
    change(parcels, "settings.ini", "margins = log_loss 0.02", "margins = log_loss 0")
    done = call(capsys, parcels, "cycle", "--now", APRIL)[1]
    assert done["state"] == "ok" and done["did"] in ("kept", "refresh")


@pytest.mark.parametrize("line, word", [("def rows(): return toy.rows().drop(columns='depot')", "depot"), ("def rows(): return toy.rows().assign(load='heavy')", "load")])
def test_a_missing_or_mistyped_column_fails_by_name(tmp_path, capsys, line, word):
    root = made(tmp_path/"odd")
    (root/f"odd_{word}.py").write_text(f"from retrain_nb.demo import toy\nview = toy.view\n{line}\n")
    change(root, "settings.ini", "retrain_nb.demo.toy:rows", f"odd_{word}:rows")
    code, done = call(capsys, root, "cycle", "--now", MARCH)
    assert (code, done["verdict"]) == (3, "FAIL") and word in done["reasons"][0]["reason"]


HOLES = """
from pathlib import Path
import pandas as pd
from retrain_nb.demo import toy
view = toy.view
def rows():
    frame = toy.rows()
    extra = frame.head(int(Path(__file__).with_name("holes.txt").read_text()))
    return pd.concat([frame, extra.assign(due_time=pd.Series(pd.NaT, extra.index, dtype=frame.due_time.dtype), parcel_id="X" + extra.parcel_id)], ignore_index=True)
"""


def test_rows_without_a_time_are_a_breach_of_contract_or_a_promise_and_counted(parcels, capsys):
    from retrain_nb.demo import toy
    (parcels/"holes.py").write_text(HOLES)
    change(parcels, "settings.ini", "retrain_nb.demo.toy:rows", "holes:rows")
    before, n = entries(parcels), len(toy.rows())
    (parcels/"holes.txt").write_text("60")
    for words in (("cycle",), ("run", "retrain")):
        code, done = call(capsys, parcels, *words, "--now", APRIL)
        assert code == 3 and f"60 of {n + 60:,} rows of source `holes:rows` have no `due_time`" in done["cause"]
    assert entries(parcels) == before
    change(parcels, "contract.toml", "[table]\n", "[table]\nmax_undated = 0.001\n")
    change(parcels, "contract.toml", 'version = "1.0"', 'version = "1.1"')
    assert call(capsys, parcels, "cycle", "--now", APRIL)[0] == 3                              # Promised, and broken
    change(parcels, "contract.toml", "max_undated = 0.001", done["cure"].split("`")[1])        # As we are told
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["did"]) == (0, "refresh")
    (parcels/"holes.txt").write_text("59")                                                     # One less, and the same snapshot
    call(capsys, parcels, "run", "retrain", "--now", APRIL)
    frozen = [e.body for e in entries(parcels) if e.kind == "snapshot.frozen" and "undated" in e.body]
    assert [body["undated"] for body in frozen] == [60, 59] and len({body["snapshot"] for body in frozen}) == 1
    assert call(capsys, parcels, "verify")[1]["verdict"] == "PASS"


def test_a_label_column_that_is_not_there_is_named_with_its_neighbour(tmp_path, capsys):
    root = made(tmp_path/"named")
    change(root, "settings.ini", "label = late", "label = lat")
    code, done = call(capsys, root, "cycle", "--now", MARCH)
    assert code == 3 and "`late`" in done["cure"]


def edit_page(root, cell, where="booster = train(", after=False):
    "Put a line of code before, or after, a cell of the page, ordinarily its training"
    path = root/"nbs"/"runs"/"retrain.ipynb"
    nb = json.loads(path.read_text())
    at = next(i for i, c in enumerate(nb["cells"]) if c["cell_type"] == "code" and where in "".join(c["source"])) + after
    nb["cells"].insert(at, {"cell_type": "code", "execution_count": None, "id": "deadbeef", "metadata": {}, "outputs": [], "source": [cell]})
    path.write_text(json.dumps(nb))


@pytest.mark.parametrize("cell, word", [("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "kernel"), ("import sys; sys.exit(0)", "SystemExit"), ("1/0", "ZeroDivisionError")])
def test_a_run_that_breaks_is_recorded_as_broken_and_changes_nothing(parcels, capsys, cell, word):
    old = call(capsys, parcels, "status")[1]["champion"]
    edit_page(parcels, cell)
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["verdict"], done["did"]) == (1, "INSUFFICIENT", "interrupted")
    assert word.lower() in done["reasons"][0]["reason"].lower()
    shown = call(capsys, parcels, "show", done["run"])[1]
    assert shown["state"] in ("failed", "killed")
    assert call(capsys, parcels, "status")[1]["champion"] == old
    shutil.copy(Path(__file__).parents[1]/"nbs"/"runs"/"retrain.ipynb", parcels/"nbs"/"runs"/"retrain.ipynb")
    assert call(capsys, parcels, "cycle", "--now", APRIL)[1]["state"] == "ok"


def test_a_page_that_stops_on_purpose_after_its_record_promotes_nobody(parcels, capsys):
    old = call(capsys, parcels, "status")[1]["champion"]
    edit_page(parcels, "from retrain_nb.records import combine; run.require(combine('late check', []))", "run.finish(", after=True)
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["verdict"], done["did"], done["state"]) == (4, "INSUFFICIENT", "kept", "failed")
    assert call(capsys, parcels, "status")[1]["champion"] == old
    assert json.loads((parcels/"reports"/done["run"]/"record.json").read_text())["verdict"]["outcome"] == "PASS" # What it must not be believed


@pytest.mark.parametrize("line, word", [("seed = 9", "seed"), ("champion = ''", "champion"), ("as_of = '2024-03-21'", "as_of")])
def test_a_page_that_works_by_another_recipe_than_was_planned_decides_nothing(parcels, capsys, line, word):
    old = call(capsys, parcels, "status")[1]["champion"]
    edit_page(parcels, line, "book = open_workbench(")
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["did"], done["state"]) == (1, "interrupted", "failed")
    assert "another recipe" in done["cause"] and word in done["cause"].split(" in ")[1]
    assert call(capsys, parcels, "status")[1]["champion"] == old
    assert call(capsys, parcels, "show", done["run"])[1]["model"] in ("", None)


def test_a_score_that_is_nan_fails_the_sanity_gate(parcels, capsys):
    path = parcels/"nbs"/"runs"/"retrain.ipynb"
    nb = json.loads(path.read_text())
    for cell in nb["cells"]: cell["source"] = ["".join(cell["source"]).replace("predict(booster, unfamiliar, classes)", "predict(booster, unfamiliar, classes)*float('nan')")]
    path.write_text(json.dumps(nb))
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["verdict"], done["did"]) == (3, "FAIL", "kept")
    assert "NaN" in done["reasons"][0]["reason"] or "finite" in done["reasons"][0]["reason"]


def test_an_edited_byte_in_a_snapshot_is_refused(parcels, capsys):
    snapshot = call(capsys, parcels, "status")[1]["champion"]["snapshot"]
    part = sorted((parcels/".retrain"/"snapshots").rglob("*.parquet"))[0]
    data = bytearray(part.read_bytes())
    data[len(data)//2] ^= 1
    part.chmod(0o644)
    part.write_bytes(bytes(data))
    code, done = call(capsys, parcels, "run", "retrain", "-p", "snapshot", snapshot, "-p", "seed", "9", "--now", MARCH)
    assert code == 6 and part.name[:12] in done["cause"]


def test_a_cycle_killed_between_run_and_decision_is_carried_on(parcels, capsys, monkeypatch):
    import retrain_nb.loop.cycle as room
    monkeypatch.setattr(room, "_settle", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["cycle", "--now", APRIL, "--root", str(parcels)]) == 130
    monkeypatch.undo()
    runs = len(call(capsys, parcels, "status")[1]["runs"])
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert code in (0, 3, 4) and done["state"] == "ok"
    assert len(call(capsys, parcels, "status")[1]["runs"]) == runs


def cycle_interrupted_at(kind, root, monkeypatch, now=APRIL):
    "Somebody presses Ctrl-C when an entry of this kind is to be written"
    from retrain_nb.services import workbench
    real = workbench._Pen.enter
    def enter(pen, what, key, body):
        if what == kind: raise KeyboardInterrupt
        return real(pen, what, key, body)
    monkeypatch.setattr(workbench._Pen, "enter", enter)
    assert main(["cycle", "--now", now, "--root", str(root)]) == 130
    monkeypatch.undo()


def test_a_decision_and_the_end_of_its_cycle_are_written_together_or_not_at_all(parcels, capsys, monkeypatch):
    old = call(capsys, parcels, "status")[1]["champion"]
    cycle_interrupted_at("cycle.ended", parcels, monkeypatch)
    assert call(capsys, parcels, "status")[1]["champion"] == old
    done = call(capsys, parcels, "cycle", "--now", APRIL)[1]
    assert done["did"] == "refresh" and (parcels/done["report"]).is_file()


@pytest.mark.parametrize("next_turn", [APRIL, "2024-03-23"])
def test_a_cycle_killed_between_its_decision_and_its_report_is_carried_on(parcels, capsys, monkeypatch, next_turn):
    import retrain_nb.loop.cycle as room
    monkeypatch.setattr(room, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["cycle", "--now", APRIL, "--root", str(parcels)]) == 130
    monkeypatch.undo()
    run = call(capsys, parcels, "status")[1]["champion"]["run"]
    assert not (parcels/"reports"/run/"report.html").exists()
    call(capsys, parcels, "cycle", "--now", next_turn)
    assert "serves from now on, in place of" in (parcels/"reports"/run/"report.html").read_text()
    assert run in (parcels/"reports"/"index.html").read_text()
    before = entries(parcels)
    call(capsys, parcels, "cycle", "--now", next_turn)
    assert entries(parcels) == before


def test_a_run_by_hand_publishes_what_a_killed_cycle_did_not(parcels, capsys, monkeypatch):
    import retrain_nb.loop.cycle as room
    snapshot = call(capsys, parcels, "status")[1]["champion"]["snapshot"]
    monkeypatch.setattr(room, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["cycle", "--now", APRIL, "--root", str(parcels)]) == 130
    monkeypatch.undo()
    run = call(capsys, parcels, "status")[1]["champion"]["run"]
    done = call(capsys, parcels, "run", "retrain", "-p", "snapshot", snapshot, "-p", "seed", "9", "--now", MARCH)[1]
    assert done["new"] and "Run by hand" in (parcels/done["report"]).read_text()
    assert "serves from now on, in place of" in (parcels/"reports"/run/"report.html").read_text()


def test_a_run_whose_process_died_becomes_lost_at_the_next_turn(parcels, capsys):
    from datetime import UTC, datetime
    book = open_workbench(parcels)
    now = datetime.now(UTC)
    book.append("run.planned", "retrain-dead:planned", {"run": "retrain-dead", "page": "retrain", "recipe": "", "parameters": {}, "as_of": "", "cycle": ""}, now)
    book.append("run.started", "retrain-dead:started", {"run": "retrain-dead", "attempt": 1, "pid": 1, "host": "x", "lease_until": "2024-01-01T00:00:00Z"}, now)
    call(capsys, parcels, "cycle", "--now", APRIL)
    assert call(capsys, parcels, "show", "retrain-dead")[1]["state"] == "lost"
    assert "without a word" in (parcels/"reports"/"retrain-dead"/"report.html").read_text()


def test_a_run_killed_before_it_began_becomes_lost_at_the_next_turn(parcels, capsys, monkeypatch):
    cycle_interrupted_at("run.started", parcels, monkeypatch)
    run = call(capsys, parcels, "status")[1]["runs"][0]
    assert run["state"] == "planned"
    code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert (code, done["state"], done["run"]) == (0, "ok", f"{run['run']}-2")
    states = {r["run"]: r["state"] for r in call(capsys, parcels, "status")[1]["runs"]}
    assert states[run["run"]] == "lost" and "planned" not in states.values()
    assert "never began" in call(capsys, parcels, "show", run["run"])[1]["cause"]
    assert "without a word; it was planned and never began" in (parcels/"reports"/run["run"]/"report.html").read_text()
    code, told = call(capsys, parcels, "reproduce", run["run"])
    assert code == 2 and "it was lost" in told["cause"]
    assert [e.kind for e in entries(parcels) if e.body.get("run") == run["run"]][:2] == ["run.planned", "run.ended"]
    assert call(capsys, parcels, "verify")[1]["verdict"] == "PASS"
    assert [p.name for p in (parcels/"mirrors").rglob(f"{run['run']}-*.json") if "-2-" not in p.name] == [f"{run['run']}-abort.json"]


def test_a_second_cycle_leaves_at_once_while_the_first_holds_the_lock(parcels, capsys):
    with open_workbench(parcels).lock():
        code, done = call(capsys, parcels, "cycle", "--now", APRIL)
    assert code == 75 and "Try again" in done["cure"]


def test_an_unknown_parameter_is_refused_before_a_kernel_starts(parcels, capsys):
    before = entries(parcels)
    code, done = call(capsys, parcels, "run", "retrain", "-p", "sed", "1")
    assert code == 2 and "seed" in done["cause"] + done["cure"]
    assert entries(parcels) == before


def test_the_same_page_run_by_hand_leaves_the_same_record(parcels, capsys):
    import nbformat
    from nbclient import NotebookClient
    champion = call(capsys, parcels, "status")[1]["champion"]
    path = parcels/"reports"/champion["run"]/"retrain.ipynb"
    nb = nbformat.read(path, 4)
    NotebookClient(nb, resources={"metadata": {"path": str(path.parent)}}, timeout=120).execute()
    assert champion["model"][:12] in str(nb.cells[-1].outputs)


def test_a_page_run_by_hand_on_other_data_says_what_differs(parcels, capsys):
    champion = call(capsys, parcels, "status")[1]["champion"]
    record = parcels/"reports"/champion["run"]/"record.json"
    kept = json.loads(record.read_bytes())
    kept["model"] = "0"*64
    record.write_text(json.dumps(kept))
    import nbformat
    from nbclient import NotebookClient
    path = record.parent/"retrain.ipynb"
    with pytest.raises(Exception, match="differs from the recorded one in its model"):
        NotebookClient(nbformat.read(path, 4), resources={"metadata": {"path": str(path.parent)}}, timeout=120).execute()


def test_doctor_finds_a_source_that_is_gone(parcels, capsys):
    assert call(capsys, parcels, "doctor")[0] == 0
    change(parcels, "settings.ini", "retrain_nb.demo.toy:rows", "gone:rows")
    code, done = call(capsys, parcels, "doctor")
    assert code == 3 and [c["check"] for c in done["checks"] if c["outcome"] == "FAIL"] == ["source"]


def test_show_finds_by_the_first_digits_and_refuses_what_is_not_there(parcels, capsys):
    champion = call(capsys, parcels, "status")[1]["champion"]
    assert call(capsys, parcels, "show", champion["model"][:12])[0] == 0
    assert call(capsys, parcels, "show", champion["run"])[1]["model"] == champion["model"]
    assert call(capsys, parcels, "show", "ffffffffffff")[0] == 2


@pytest.mark.parametrize("damage", ["UPDATE runs SET verdict = '{'", "ALTER TABLE runs DROP COLUMN cause", "DROP TABLE refusals", "UPDATE runs SET outcome = 'FAIL'",
                                    "DELETE FROM champions", "DROP INDEX ix_runs_seq", "INSERT INTO cycles (cycle, seq, last) VALUES ('cycle-forged', 1, 1)"])
def test_a_damaged_view_is_named_even_where_it_cannot_be_read(parcels, capsys, damage):
    assert call(capsys, parcels, "verify")[1]["verdict"] == "PASS"
    with sqlite3.connect(parcels/".retrain"/"ledger.db") as connection: connection.execute(damage)
    connection.close()
    code, done = call(capsys, parcels, "verify")
    assert (code, done["verdict"], done["first_bad"]["damage"]) == (6, "FAIL", "changed view")
