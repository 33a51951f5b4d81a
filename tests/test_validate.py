"A second person: the same numbers by other code, signed by another key, demanded before a candidate serves, and looked at by verify"
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retrain_nb import auditor
from retrain_nb.digest import canonical
from retrain_nb.faces.cli import main
from retrain_nb.loop.reproduce import recorded
from retrain_nb.loop.validate import look_again
from retrain_nb.notes import sign_envelope
from retrain_nb.records import PASS
from retrain_nb.services.attestation import PAYLOAD
from retrain_nb.services.workbench import open_workbench
from retrain_nb.stores import catalog, ledger
from retrain_nb.stores.keys import load_key, make_key
from retrain_nb.windows import parse_time

MARCH, JUNE = "2024-03-01", parse_time("2024-06-01")


def call(capsys, root, *words):
    "Exit code and JSON of one command"
    capsys.readouterr()
    code = main([*words, "--root", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def parcels(first_night, tmp_path): return Path(shutil.copytree(first_night, tmp_path/"parcels"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ana", "bob"): make_key(folder/name, name)
    return folder


def entries(root, kind): return open_workbench(root).ask(ledger.entries, kind=kind)


def test_a_second_look_finds_the_same_numbers_and_is_kept_under_its_own_signature(parcels, keys, capsys):
    code, bare = call(capsys, parcels, "validate", "champion")
    assert (code, bare["verdict"], bare["attestation"], entries(parcels, "run.validated")) == (0, "VALIDATED", "", [])
    code, seen = call(capsys, parcels, "validate", "champion", "--key", str(keys/"ana"))
    assert (code, seen["verdict"], seen["differs"]) == (0, "VALIDATED", []) and seen["compared"] == seen["equal"] >= 20
    (entry,) = entries(parcels, "run.validated")
    assert entry.body["result"] == "VALIDATED" and entry.body["validator"].split()[1] == (keys/"ana.pub").read_text().split()[1]
    assert call(capsys, parcels, "validate", "champion", "--key", str(keys/"ana"))[1] == seen and len(entries(parcels, "run.validated")) == 1
    assert call(capsys, parcels, "verify")[1]["checked"]["attestations"] == 1
    assert seen["validator"] in call(capsys, parcels, "show", seen["run"])[1]["validation"]
    assert seen["validator"] in call(capsys, parcels, "live")[1]["evidence"]["validation"]
    up = call(capsys, parcels, "show", seen["attestation"])[1]["lineage"]["up"]
    assert up[0]["id"] == seen["run"]


def test_the_ledgers_own_key_is_no_second_person(parcels, capsys):
    code, wrong = call(capsys, parcels, "validate", "champion", "--key", str(parcels/".retrain"/"keys"/"ledger"))
    assert code == 2 and "signs this ledger" in wrong["cause"] and entries(parcels, "run.validated") == []


def test_an_artifact_that_was_replaced_is_not_even_scored(parcels, keys, capsys):
    run = call(capsys, parcels, "status")[1]["champion"]["run"]
    book = open_workbench(parcels)
    path = book.artifacts.path(book.ask(catalog.run, run)["record"])
    path.chmod(0o644)
    record = json.loads(path.read_bytes())
    record["evaluation"]["candidate"]["auc"]["value"] = 0.99
    path.write_bytes(canonical(record))
    code, seen = call(capsys, parcels, "validate", run, "--key", str(keys/"ana"))
    assert (code, seen["verdict"]) == (6, "DIFFERS") and "record" in seen["differs"][0] and entries(parcels, "run.validated")[0].body["result"] == "DIFFERS"


def forged(parcels, change): # -> what a second look finds in a run that somebody with the ledger's key made up
    book = open_workbench(parcels)
    told = recorded(book, book.ask(catalog.champion)["run"])
    bodies = {e.kind: json.loads(json.dumps(e.body)) for e in told.entries}
    record = json.loads(book.artifacts.get(told.ended["record"]))
    change(bodies["run.ended"], record)
    bodies["run.ended"]["record"] = book.artifacts.put(canonical(record), "record")
    for kind, body in bodies.items(): book.append(kind, f"retrain-forged:{kind.removeprefix('run.')}", {**body, "run": "retrain-forged"}, JUNE)
    return look_again(book, recorded(book, "retrain-forged"))[1]


def better_in_the_ledger(ended, record): ended["metrics"]["auc"]["value"] = 0.99
def better_everywhere(ended, record): ended["metrics"]["auc"]["value"] = record["evaluation"]["candidate"]["auc"]["value"] = 0.99
def fewer_rows(ended, record): record["evaluation"]["positives"] += 1
def a_pass_that_is_none(ended, record):
    gap = record["evaluation"]["difference"]["log_loss"]
    gap["high"] = 0.5
    for leaf in record["verdict"]["parts"]:
        if leaf["name"] == "log_loss": leaf["interval"] = [gap["low"], 0.5]


@pytest.mark.parametrize("change, first", [(better_in_the_ledger, "ledger.auc was recorded as 0.99"), (better_everywhere, "candidate.auc was recorded as 0.99"),
                                           (fewer_rows, "positives was recorded"), (a_pass_that_is_none, "verdict.log_loss.outcome was recorded as PASS")])
def test_what_was_made_up_is_named(parcels, change, first):
    assert forged(parcels, change)[0].startswith(first)


def test_a_candidate_waits_for_a_person_who_may_and_then_serves(tmp_path, first_night, keys, capsys):
    root = tmp_path/"parcels"
    assert main(["init", str(root), "--demo", "toy"]) == 0
    text = (first_night/"settings.ini").read_text().replace("bootstrap = gated", "bootstrap = gated\nvalidation = required\nvalidators = validators.pub")
    (root/"settings.ini").write_text(text)
    (root/"validators.pub").write_text(f"# risk\n{(keys/'ana.pub').read_text()}{(root/'.retrain'/'keys'/'ledger.pub').read_text()}")
    code, done = call(capsys, root, "cycle", "--now", MARCH)
    assert (code, done["did"], done["champion"]) == (4, "waits", "") and f"validate {done['run']} --key" in done["reasons"][0]["reason"]
    now = call(capsys, root, "status")[1]
    assert (now["champion"], now["waiting"]["run"], now["last_cycle"]) == (None, done["run"], None)
    count = len(open_workbench(root).ask(ledger.entries))
    assert call(capsys, root, "cycle", "--now", MARCH)[1]["did"] == "waits" and len(open_workbench(root).ask(ledger.entries)) == count
    code, wrong = call(capsys, root, "validate", done["run"], "--key", str(keys/"bob"))
    assert code == 5 and "none of the 1 keys" in wrong["cause"]
    assert call(capsys, root, "validate", done["run"], "--key", str(keys/"ana"))[0] == 0
    code, later = call(capsys, root, "cycle", "--now", MARCH)
    assert (code, later["did"], later["verdict"], later["new"]) == (0, "bootstrap", PASS, True) and later["reasons"][0]["parts"][-1]["name"] == "validation"
    now = call(capsys, root, "status")[1]
    assert (now["champion"]["run"], now["waiting"]) == (done["run"], None)
    assert "validation" in re.sub("<[^>]+>", "", (root/later["report"]).read_text()) and call(capsys, root, "verify")[0] == 0


def test_verify_finds_a_validation_that_its_validator_did_not_sign(parcels, keys, capsys):
    seen = call(capsys, parcels, "validate", "champion", "--key", str(keys/"ana"))[1]
    book = open_workbench(parcels)
    body, ana = entries(parcels, "run.validated")[0].body, load_key(keys/"ana", "ana")
    for n, (signer, about) in enumerate(((load_key(keys/"bob", "bob"), body), (ana, {**body, "model": "0a"*32}))):
        said = canonical({"_type": auditor.STATEMENT, "predicateType": auditor.TEST_RESULT, "subject": [{"name": "model", "digest": {"sha256": about["model"]}}], "predicate": {"n": n}})
        kept = book.artifacts.put(canonical(sign_envelope(said, PAYLOAD, signer.public, signer.sign)), "attestation")
        book.append("run.validated", f"bad {n}", {**body, "attestation": kept}, JUNE)
    book.append("run.validated", "own", {**body, "validator": book.signer.ssh}, JUNE)
    code, told = call(capsys, parcels, "verify")
    assert code == 6 and [f["damage"] for f in told["findings"]] == ["bad attestation"]*3
    alone = subprocess.run([sys.executable, auditor.__file__, str(parcels)], capture_output=True, text=True)
    assert alone.returncode == 6 and alone.stdout.count("bad attestation") >= 1 and seen["verdict"] == "VALIDATED"

