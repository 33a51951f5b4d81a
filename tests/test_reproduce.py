"""Runs recorded on the toy stream, run again; then one thing is changed at a time, and it must be the first that is named."""
import hashlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

import retrain_nb.loop.reproduce as room
from retrain_nb.digest import canonical, digest
from retrain_nb.faces.cli import main
from retrain_nb.loop.reproduce import find_run, model_gap, module_path, recorded, reproduce
from retrain_nb.records import UsageError, VerificationError
from retrain_nb.services.execute import execute
from retrain_nb.services.workbench import open_workbench
from retrain_nb.stores import ledger

MARCH = "2024-03-01"
MINE = """from retrain_nb.stages.features import FeatureView
from retrain_nb.demo import toy
import weather

rows = toy.rows
def derive(frame): return frame.assign(wet=weather.wet(frame["rain"]))
view = FeatureView(name="mine", numeric=("load", "wet", "hour"), categorical=("depot",), derive=derive)
"""
WEATHER = "def wet(rain): return rain*2.0\n"


def call(capsys, root, *words):
    "Exit code and JSON of one command"
    capsys.readouterr()
    code = main([*words, "--root", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A workbench with modules of its own, after its first cycle; tests take a copy"
    root = tmp_path_factory.mktemp("made")/"parcels"
    assert main(["init", str(root), "--demo", "toy"]) == 0
    text = (root/"settings.ini").read_text().replace("mode = offline", "mode = disabled")
    text = text.replace("retrain_nb.demo.toy:rows", "mine_parcels:rows").replace("retrain_nb.demo.toy:view", "mine_parcels:view")
    (root/"settings.ini").write_text(text + "\n[run]\nprofile_rows = 0\n")
    (root/"mine_parcels.py").write_text(MINE)
    (root/"weather.py").write_text(WEATHER)
    assert main(["cycle", "--now", MARCH, "--root", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def shelf_of_runs(tmp_path_factory): return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture(autouse=True)
def nothing_is_run_twice(shelf_of_runs, monkeypatch):
    "What was run before, in the same environment and from the same files to the last byte, is not run again: what it left then is laid out"
    folder, known = shelf_of_runs
    def remembering(page, parameters, out, cwd, limit, on_event):
        surroundings = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        given = digest(canonical([listing(cwd), str(page.relative_to(cwd)), parameters, surroundings]))
        if given in known: shutil.copytree(folder/given, cwd, dirs_exist_ok=True)
        else:
            known[given] = execute(page, parameters, out, cwd, limit, on_event)
            shutil.copytree(cwd, folder/given)
        return known[given]
    monkeypatch.setattr(room, "execute", remembering)


@pytest.fixture
def parcels(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path/"parcels"))


def shelf(root, name): return root/".retrain"/"artifacts"/name


def put(root, data): # -> the digest under which `data` now lies in the store
    name = digest(data)
    shelf(root, name).parent.mkdir(exist_ok=True)
    shelf(root, name).write_bytes(data)
    return name


def body(root, what):
    book = open_workbench(root)
    return book.ask(ledger.find_key, f"{find_run(book, 'champion')}:{what}").body


def forge(root, what, change, leaf=True):
    "Rewrite an entry of the champion's run in the database, as somebody who owns the machine could; with `leaf`, its hash too"
    book = open_workbench(root)
    key = f"{find_run(book, 'champion')}:{what}"
    entry = book.ask(ledger.find_key, key)
    new = change(json.loads(json.dumps(entry.body)))
    book.engine.dispose()
    with sqlite3.connect(root/".retrain"/"ledger.db") as db:
        for (name,) in db.execute("select name from sqlite_master where type = 'trigger'").fetchall(): db.execute(f"drop trigger {name}")
        hashed = ledger.entry_leaf(entry.seq, entry.kind, key, entry.at, canonical(new).decode()) if leaf else entry.leaf
        assert db.execute("update entries set body = ?, leaf = ? where key = ?", (canonical(new).decode(), hashed, key)).rowcount == 1


def forge_recipe(root, **fields):
    "Name another recipe in the ledger"
    recipe = json.loads(shelf(root, body(root, "planned")["recipe"]).read_bytes())
    forge(root, "planned", lambda b: {**b, "recipe": put(root, canonical({**recipe, **fields}))})


def forge_modules(root, **files):
    "Name other modules in the ledger"
    modules, packages = body(root, "planned")["source_code"]
    kept = json.loads(shelf(root, modules).read_bytes())
    kept["files"] |= {f"{name}.py": text for name, text in files.items()}
    forge(root, "planned", lambda b: {**b, "source_code": [put(root, canonical(kept)), packages]})


def listing(root): # -> every file below, with its digest, but for the database's own side files
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith("ledger.db-")}


def test_a_copy_reproduces_with_the_original_gone_and_its_settings_code_and_threads_changed(parcels, tmp_path, capsys, monkeypatch):
    copy = Path(shutil.copytree(parcels, tmp_path/"elsewhere"/"copy"))
    shutil.rmtree(parcels)
    settings = (copy/"settings.ini").read_text()
    assert "threads = 2" in settings
    (copy/"settings.ini").write_text(settings.replace("threads = 2", "threads = 1").replace("seed = 0", "seed = 5"))
    (copy/"mine_parcels.py").write_text(MINE.replace('"hour"', '"weekday"'))
    (copy/"weather.py").unlink()
    shutil.rmtree(copy/"nbs")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = listing(copy)
    code, done = call(capsys, copy, "reproduce", "champion")
    assert (code, done["verdict"], done["differs"]) == (0, "REPRODUCED", [])
    assert done["model"]["equal"] and done["metrics"]["compared"] == done["metrics"]["equal"] > 300
    assert listing(copy) == before


def test_a_turned_bit_in_a_snapshot_is_named_and_nothing_is_trained(parcels, capsys):
    part = sorted((parcels/".retrain"/"snapshots").rglob("*.parquet"))[1]
    data = bytearray(part.read_bytes())
    data[len(data)//2] ^= 1
    part.write_bytes(data)
    code, done = call(capsys, parcels, "reproduce", "last")
    assert (code, done["verdict"], done["metrics"]["compared"]) == (6, "DIFFERS", 0)
    assert done["differs"][0]["what"] == "data" and part.name in done["differs"][0]["by"]


@pytest.mark.parametrize("where, what", [(("planned", "parameters", "settings"), "settings"), (("planned", "recipe"), "settings"), (("planned", "source_code", 0), "code"),
                                         (("planned", "source_code", 1), "environment"), (("ended", "notebook"), "code"), (("ended", "record"), "run"), (("ended", "model"), "model")])
@pytest.mark.parametrize("damage", ["edited", "gone"])
def test_a_damaged_artifact_is_named(parcels, where, what, damage, monkeypatch):
    monkeypatch.setattr(room, "_run_again", lambda *a: {}) # What it would come to is another test's
    path = body(parcels, where[0])
    for step in where[1:]: path = path[step]
    path = shelf(parcels, path)
    if damage == "gone": path.unlink()
    else: path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    book = open_workbench(parcels)
    done = reproduce(book, find_run(book, "champion"))
    assert (done["verdict"], done["differs"][0]["what"]) == ("DIFFERS", what)
    assert path.name in done["differs"][0]["by"]


def test_a_damaged_model_is_told_from_one_that_comes_out_different(parcels, capsys):
    path = shelf(parcels, body(parcels, "ended")["model"])
    path.write_bytes(path.read_bytes().replace(b"leaf_value=-", b"leaf_value=", 1))
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert (code, done["model"]["equal"]) == (6, True)
    assert [d["what"] for d in done["differs"]] == ["model"] and "was changed" in done["differs"][0]["by"]


def test_another_version_of_a_package_is_named_first_and_the_model_is_compared_all_the_same(parcels, capsys):
    modules, packages = body(parcels, "planned")["source_code"]
    older = canonical({**json.loads(shelf(parcels, packages).read_bytes()), "lightgbm": "4.0.0"})
    forge_recipe(parcels, environment=put(parcels, older))
    forge(parcels, "planned", lambda b: {**b, "source_code": [modules, digest(older)]})
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert (code, done["model"]["equal"], done["metrics"]["compared"]) == (6, True, done["metrics"]["equal"])
    assert [d["what"] for d in done["differs"]] == ["environment"] and done["differs"][0]["by"].startswith("lightgbm 4.0.0 is ")


def test_other_code_of_this_package_is_named_by_file(parcels, capsys):
    modules, packages = body(parcels, "planned")["source_code"]
    kept = json.loads(shelf(parcels, modules).read_bytes())
    kept["package"]["stages/train.py"] = "0"*64
    forge_recipe(parcels, code=digest(kept["package"]))
    forge(parcels, "planned", lambda b: {**b, "source_code": [put(parcels, canonical(kept)), packages]})
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert (code, [d["what"] for d in done["differs"]]) == (6, ["code"]) and done["differs"][0]["by"].startswith("stages/train.py 000000000000 is ")


def test_an_edited_page_is_named_before_the_model_that_comes_of_it(parcels, capsys):
    nb = json.loads(shelf(parcels, body(parcels, "ended")["notebook"]).read_bytes())
    for cell in nb["cells"]: cell["source"] = "".join(cell["source"]).replace("taught[run.label], run.recipe.params", "1 - taught[run.label], run.recipe.params")
    forge(parcels, "ended", lambda b: {**b, "notebook": put(parcels, json.dumps(nb).encode())})
    code, done = call(capsys, parcels, "reproduce", "champion")
    first, *rest = done["differs"]
    assert (code, first["what"], first["field"], rest[0]["what"]) == (6, "code", "page", "model")
    assert rest[1]["what"].startswith("candidate.") and float(rest[1]["by"])


def test_another_seed_in_the_ledger_is_named_before_the_model_and_the_edited_entry_is_found(parcels, capsys):
    forge(parcels, "planned", lambda b: {**b, "parameters": {**b["parameters"], "seed": 5}}, leaf=False)
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert code == 6 and [d["what"] for d in done["differs"]] == ["seed", "model", "ledger"]
    assert [done["differs"][0][k] for k in ("recorded", "now", "by")] == [0, 5, "+5"]
    assert "seed" in done["differs"][1]["by"] and "entry" in done["differs"][2]["by"]


def test_other_code_of_a_view_is_named_before_the_model(parcels, capsys):
    forge_modules(parcels, mine_parcels=MINE.replace("weather.wet(frame[\"rain\"])", "-frame['load']"))
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert (code, done["differs"][0]["what"], done["differs"][0]["field"], done["differs"][1]["what"]) == (6, "code", "view_code", "model")
    assert "lines of its text differ" in done["differs"][1]["by"]


def test_what_a_view_imports_is_kept_with_it_and_what_is_not_there_is_named(parcels, capsys):
    assert "weather.py" in json.loads(shelf(parcels, body(parcels, "planned")["source_code"][0]).read_bytes())["files"]
    forge_modules(parcels, weather="import a_package_that_is_not_there")
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert (code, done["differs"][0]["what"], done["metrics"]["compared"]) == (6, "environment", 0) and "a_package_that_is_not_there" in done["differs"][0]["by"]


def test_another_number_of_threads_is_named(parcels, capsys):
    kept = json.loads(shelf(parcels, body(parcels, "planned")["parameters"]["settings"]).read_bytes())
    kept["policy"]["trainer"]["threads"] = 1
    forge(parcels, "planned", lambda b: {**b, "parameters": {**b["parameters"], "settings": put(parcels, canonical(kept))}})
    code, done = call(capsys, parcels, "reproduce", "champion")
    by = {d["field"]: d["by"] for d in done["differs"] if d["what"] == "settings"}
    assert code == 6 and done["differs"][0]["what"] == "settings" and by["params"] == "num_threads 2 is 1"


def test_a_metric_that_was_touched_up_is_named_and_by_how_much(parcels, capsys):
    record = json.loads(shelf(parcels, body(parcels, "ended")["record"]).read_bytes())
    true = record["evaluation"]["candidate"]["auc"]["value"]
    record["evaluation"]["candidate"]["auc"]["value"] = true + 0.01
    forge(parcels, "ended", lambda b: {**b, "record": put(parcels, canonical(record))})
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert code == 6 and done["model"]["equal"] and [d["what"] for d in done["differs"]] == ["candidate.auc.value"]
    assert float(done["differs"][0]["by"]) == pytest.approx(-0.01)


def test_a_run_of_the_first_format_is_run_with_the_modules_that_are_there(parcels, capsys):
    forge(parcels, "planned", lambda b: {k: v for k, v in b.items() if k not in ("source_code", "diff", "locks")})
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert (code, done["verdict"]) == (0, "REPRODUCED") and any("kept no modules" in note for note in done["notes"])


def test_a_run_that_broke_has_nothing_to_compare(parcels, capsys):
    forge(parcels, "ended", lambda b: {**b, "state": "killed", "cause": "out of memory"})
    code, done = call(capsys, parcels, "reproduce", "champion")
    assert (code, done["error"]) == (2, "UsageError") and "killed (out of memory)" in done["cause"]
    assert call(capsys, parcels, "reproduce", "ffffffff")[0] == 2
    with pytest.raises(UsageError, match="has not ended"): recorded(open_workbench(parcels), "retrain-0")


@pytest.mark.parametrize("name", ["../up.py", "/etc/x.py", "a/../../b.py", "settings.ini", "C:\\x.py", "sub/.env", ""])
def test_no_module_leaves_its_folder(name):
    with pytest.raises(VerificationError): module_path(name)


def test_models_of_other_shapes_are_compared_too():
    model = lambda text, cut="1": canonical({"booster": text, "cut": cut})
    assert model_gap(model("a"), model("a")) == ""
    assert "1 of 2 lines" in model_gap(model("a\nleaf_value=1"), model("a\nleaf_value=1 2"))
    assert model_gap(model("a"), model("a", "2")) == "cut '1' is '2'"
