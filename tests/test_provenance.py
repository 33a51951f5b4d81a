"""Provenance that outside tools can read: the protobuf schemas of in-toto and SLSA, and OpenSSF's own verifier where it is installed."""
import base64
import copy
import json
import os
import shutil
import subprocess

import pytest

from retrain_nb.digest import digest
from retrain_nb.records import UsageError, VerificationError
from retrain_nb.services.provenance import bundle, check_statement, open_statement, p256_key, sign_statement, statement, write_bundle
from retrain_nb.stores.snapshots import Part, Snapshot

D = {name: digest({"toy": name}) for name in "model record notebook january snapshot page settings packages modules diff contract view policy code lock champion".split()}


class Key:
    def __init__(self, seed):
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        self.private = Ed25519PrivateKey.from_private_bytes(seed*32)
        self.public, self.sign = self.private.public_key().public_bytes_raw(), self.private.sign


def made(commit="c"*40, champion=D["champion"], kept=True):
    "A statement about a toy run"
    part = Part(period="2024-01", sha256=D["january"], rows=9, bytes=99, start="2024-01-01T00:00:00Z", end="2024-01-31T00:00:00Z")
    rows = Snapshot(digest=D["snapshot"], rows=9, columns=("passenger_name",), kinds=("text",), time="due_time", start=part.start, end=part.end, parts=(part,))
    recipe = {"snapshot": rows.digest, "contract": D["contract"], "view": "parcels", "view_code": D["view"], "trainer": "lightgbm 4.7.0", "params": {"rounds": 40, "learning_rate": 0.1},
              "seed": 0, "champion": champion, "policy": D["policy"], "environment": D["packages"], "code": D["code"], "commit": commit, "dirty": D["diff"] if commit else ""}
    planned = {"run": "retrain-1", "page": "retrain", "code": D["page"], "recipe": digest(recipe), "parameters": {"seed": 0, "settings": D["settings"]}}
    if kept: planned |= {"source_code": [D["modules"], D["packages"]], "diff": D["diff"] if commit else "", "locks": {"uv.lock": D["lock"]}}
    ended = {"model": D["model"], "record": D["record"], "notebook": D["notebook"], "report": "reports/retrain-1/report.html"}
    return statement(planned, ended, recipe, rows, {"adapter": "a:rows", "code": D["code"]}, ("2024-02-01T03:00:00Z", "2024-02-01T03:00:09.5+01:00"), {"python": "CPython 3.11"}, "retrain_nb/parcels")


VARIANTS = [{}, {"commit": "", "champion": ""}, {"kept": False}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_schemas_of_in_toto_and_slsa_take_it_with_no_unknown_field_and_lose_nothing(variant):
    from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as Schema
    said = made(**variant)
    parsed = ParseDict(said, Schema())
    Statement.copy_from_pb(parsed).validate()
    assert MessageToDict(ParseDict(said["predicate"], Provenance()))["buildDefinition"]["resolvedDependencies"] == said["predicate"]["buildDefinition"]["resolvedDependencies"]
    odd = copy.deepcopy(said["predicate"])
    odd["runDetails"]["metadata"]["startedAt"] = odd["runDetails"]["metadata"].pop("startedOn")
    with pytest.raises(ParseError): ParseDict(odd, Provenance())


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_the_model_was_made_from_is_named_and_no_column(variant):
    said = made(**variant)
    found = {r["name"]: r for r in said["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert len(found) == len(said["predicate"]["buildDefinition"]["resolvedDependencies"])
    assert {"snapshot", "snapshot/2024-01.parquet", "source a:rows", "page", "page as run", "settings", "contract", "view parcels", "retrain_nb", "trainer", "packages"} <= set(found)
    assert ("diff" in found, "repository" in found) == (variant.get("commit") != "",)*2 and ("champion" in found) == (variant.get("champion") != "")
    assert found["trainer"]["uri"] == "pkg:pypi/lightgbm@4.7.0"
    assert "passenger_name" not in json.dumps(said) and "due_time" not in json.dumps(said)


def cut(said, path): # -> a copy without what is at `path`
    said = copy.deepcopy(said)
    here = said
    for step in path[:-1]: here = here[step]
    del here[path[-1]]
    return said


@pytest.mark.parametrize("path", ["_type", "subject", "predicateType", "predicate", "predicate buildDefinition", "predicate buildDefinition buildType", "predicate buildDefinition externalParameters",
                                  "predicate buildDefinition resolvedDependencies", "predicate runDetails", "predicate runDetails builder", "predicate runDetails builder id",
                                  "predicate runDetails metadata startedOn", "predicate runDetails metadata finishedOn", "predicate runDetails metadata invocationId"])
def test_a_statement_that_lacks_a_field_is_refused_before_and_after_signing(path):
    less = cut(made(), path.split())
    with pytest.raises(VerificationError, match="missing or malformed"): sign_statement(less, Key(b"1"))


@pytest.mark.parametrize("change", [{"subject": []}, {"subject": [{"name": "model"}]}, {"subject": [{"name": "model", "digest": {"sha256": "xyz"}}]}, {"subject": "model"}, {"predicate": []}, {"_type": "https://in-toto.io/Statement/v0.1"}])
def test_a_malformed_statement_is_refused(change):
    with pytest.raises(VerificationError): check_statement({**made(), **change})


@pytest.mark.parametrize("odd", [None, [], "text", 7, {"subject": 7}])
def test_what_is_no_statement_at_all_is_refused_in_words(odd):
    with pytest.raises(VerificationError, match="no SLSA provenance"): check_statement(odd)


def test_no_byte_of_an_envelope_can_change():
    key = Key(b"1")
    sealed = sign_statement(made(), key)
    assert open_statement(sealed, [Key(b"2").public, key.public], D["model"]) == made()
    for at in range(0, len(sealed), 37): # 37 apart: each field is hit, and 200 signatures take no second
        spoiled = bytearray(sealed)
        spoiled[at] ^= 1
        try: said = open_statement(bytes(spoiled), [key.public])
        except VerificationError: continue
        assert said == made() and json.loads(spoiled)["payload"] == json.loads(sealed)["payload"] # Only the key's name is not signed
    with pytest.raises(VerificationError, match="another model"): open_statement(sealed, [key.public], D["record"])
    with pytest.raises(UsageError, match="no key"): open_statement(sealed, [])


def test_an_envelope_of_another_kind_is_no_provenance():
    from retrain_nb.notes import sign_envelope
    key = Key(b"1")
    with pytest.raises(VerificationError, match="holds text/plain"): open_statement(json.dumps(sign_envelope(b"hello", "text/plain", key.public, key.sign)).encode(), [key.public])
    with pytest.raises(VerificationError, match="no JSON"): open_statement(b"hello", [key.public])


@pytest.fixture
def folder(tmp_path):
    "A model to be handed on, with names that sort differently as text and as paths"
    root = tmp_path/"parcels"
    for name in ("model.json", "a/b", "a-b", "a.b", ".hidden", "übung.txt"):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(name)
    return root


def test_a_bundle_lists_every_file_and_its_key_stays_private(folder, tmp_path):
    key = p256_key(tmp_path/"keys"/"k")
    sealed = json.loads(write_bundle(folder, key).read_bytes())
    said = json.loads(base64.b64decode(sealed["dsseEnvelope"]["payload"]))
    assert [r["name"] for r in said["predicate"]["resources"]] == [".hidden", "a/b", "a-b", "a.b", "model.json", "übung.txt"]
    assert (tmp_path/"keys"/"k").stat().st_mode & 0o77 == 0
    assert p256_key(tmp_path/"keys"/"k").private_numbers() == key.private_numbers()


def test_links_other_keys_and_empty_folders_are_refused(folder, tmp_path):
    key = p256_key(tmp_path/"k")
    (folder/"link").symlink_to("model.json")
    with pytest.raises(UsageError, match="is a link"): write_bundle(folder, key)
    (tmp_path/"empty").mkdir()
    with pytest.raises(UsageError, match="no file"): write_bundle(tmp_path/"empty", key)
    from cryptography.hazmat.primitives import serialization as s
    (tmp_path/"ed").touch(0o600)
    (tmp_path/"ed").write_bytes(Key(b"1").private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    with pytest.raises(UsageError, match="no P-256 key"): p256_key(tmp_path/"ed")
    (tmp_path/"ed").write_text("nonsense")
    with pytest.raises(UsageError, match="no private key"): p256_key(tmp_path/"ed")
    with pytest.raises(UsageError, match="no digest"): bundle({"model.json": "short"}, "x", key)


VERIFIER = os.environ.get("MODEL_SIGNING") or shutil.which("model_signing")

@pytest.mark.skipif(not VERIFIER, reason="OpenSSF's `model_signing` is not installed: it brings Sigstore with it, and does not import without pyOpenSSL, which it does not ask for; name its command in MODEL_SIGNING")
def test_the_verifier_of_openssf_accepts_the_bundle_and_refuses_one_changed_byte_one_more_file_and_another_key(folder, tmp_path):
    sealed = write_bundle(folder, p256_key(tmp_path/"k"))
    p256_key(tmp_path/"other")
    def verify(public="k.pub"):
        return subprocess.run([str(VERIFIER), "verify", "key", str(folder), "--signature", str(sealed), "--public_key", str(tmp_path/public)], capture_output=True, text=True)
    assert verify().returncode == 0, verify().stderr
    assert verify("other.pub").returncode != 0
    (folder/"a.b").write_text("a.c")
    assert verify().returncode != 0
    (folder/"a.b").write_text("a.b")
    (folder/"more").write_text("")
    assert verify().returncode != 0
    (folder/"more").unlink()
    assert verify().returncode == 0


FEED = """from pathlib import Path
from retrain_nb.demo import toy
def rows(): return toy.rows().assign(addressee=Path(__file__).with_name("names.csv").read_text())
"""


@pytest.fixture(scope="module")
def parcels(tmp_path_factory):
    "A real cycle in a repository with uncommitted work, a view and a column of its own that the contract calls personal"
    from retrain_nb.faces.cli import main
    root = tmp_path_factory.mktemp("made")/"parcels"
    assert main(["init", str(root), "--demo", "toy"]) == 0
    path = root/"settings.ini"
    text = path.read_text().replace("mode = offline", "mode = disabled").replace("retrain_nb.demo.toy:rows", "feed_of_parcels:rows")
    path.write_text(text + "\n[run]\nprofile_rows = 0\n")
    contract = root/"contract.toml"
    contract.write_text(contract.read_text() + '\n[columns.addressee]\nkind = "text"\ntag = "personal"\n')
    (root/"feed_of_parcels.py").write_text(FEED)
    (root/"names.csv").write_text("Ada Lovelace\n")
    (root/".gitignore").write_text("*.secret\n.retrain/\nreports/\n")
    git = lambda *words: subprocess.run(["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.com", *words], check=True, capture_output=True)
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]): git(*words)
    (root/"feed_of_parcels.py").write_text((root/"feed_of_parcels.py").read_text() + "# a change that nobody committed\n")
    (root/"names.csv").write_text("Grace Hopper\n")
    (root/"token.secret").write_text("hunter2")
    assert main(["cycle", "--now", "2024-03-01", "--root", str(root)]) == 0
    return root


def test_every_digest_that_a_real_statement_gives_is_that_of_something_kept(parcels):
    from retrain_nb.services.workbench import open_workbench
    from retrain_nb.stores import catalog, ledger
    book = open_workbench(parcels)
    run = book.ask(catalog.champion)["run"]
    planned, ended = (book.ask(ledger.find_key, f"{run}:{what}").body for what in ("planned", "ended"))
    said = open_statement(book.artifacts.get(ended["provenance"]), [book.signer.public], ended["model"])
    found = {r["name"]: r.get("digest", {}) for r in said["predicate"]["buildDefinition"]["resolvedDependencies"]}
    kept = {k for k in found if "sha256" in found[k] and book.artifacts.has(found[k]["sha256"])}
    assert kept == {"page as run", "settings", "modules", "packages", "diff"}
    assert {found[k]["sha256"] for k in found if k.startswith("snapshot/")} == {p.sha256 for p in book.snapshots.describe(planned["parameters"]["snapshot"]).parts}
    head = subprocess.run(["git", "-C", str(parcels), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert found["repository"] == {"gitCommit": head} and found["diff"]["sha256"] == planned["diff"] == json.loads(book.artifacts.get(planned["recipe"]))["dirty"]
    changes = json.loads(book.artifacts.get(planned["diff"]))
    assert list(changes["files"]) == ["feed_of_parcels.py", "names.csv"] and "+# a change that nobody committed" in changes["patch"]
    assert "# a change that nobody committed" in json.loads(book.artifacts.get(planned["source_code"][0]))["files"]["feed_of_parcels.py"]


def test_a_model_is_handed_on_with_its_provenance_under_a_signature_of_its_own(parcels, tmp_path, capsys):
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from retrain_nb.faces.cli import main
    hand = lambda folder, *more: main(["export", str(folder), "--model", "champion", "--root", str(parcels), *more])
    assert hand(tmp_path/"m") == 0 and hand(tmp_path/"m") == 2
    assert "is not empty" in capsys.readouterr().err
    sealed = json.loads((tmp_path/"m.sig").read_bytes())["dsseEnvelope"]
    payload = base64.b64decode(sealed["payload"])
    listed = {r["name"]: r["digest"] for r in json.loads(payload)["predicate"]["resources"]}
    assert listed == {p.name: digest(p.read_bytes()) for p in (tmp_path/"m").iterdir()} and set(listed) == {"booster.txt", "model.json", "provenance.json"}
    public = serialization.load_pem_public_key((tmp_path/"m.pub").read_bytes())
    said = b"DSSEv1 %d %s %d %s" % (len(sealed["payloadType"]), sealed["payloadType"].encode(), len(payload), payload)
    public.verify(base64.b64decode(sealed["signatures"][0]["sig"]), said, ec.ECDSA(hashes.SHA256()))
    assert "is there already" in (hand(tmp_path/"m2"), (tmp_path/"n.sig").write_text(""), hand(tmp_path/"n"), capsys.readouterr().err)[-1]
    (parcels/".retrain"/"keys"/"model_signing").chmod(0o644)
    assert hand(tmp_path/"o") == 2 and "open to others" in capsys.readouterr().err and not (tmp_path/"o").exists()
    (parcels/".retrain"/"keys"/"model_signing").chmod(0o600)


def test_the_auditor_takes_it(parcels):
    from retrain_nb.auditor import audit
    told = audit(parcels)
    assert (told["verdict"], told["findings"]) == ("PASS", []) and told["checked"]["provenance"] == 1


def test_no_personal_column_no_row_and_no_ignored_file_is_in_what_is_kept_for_provenance(parcels):
    from retrain_nb.services.workbench import open_workbench
    from retrain_nb.stores import catalog, ledger
    book = open_workbench(parcels)
    run = book.ask(catalog.champion)["run"]
    planned, ended = (book.ask(ledger.find_key, f"{run}:{what}").body for what in ("planned", "ended"))
    payload = base64.b64decode(json.loads(book.artifacts.get(ended["provenance"]))["payload"])
    assert b"addressee" not in payload
    for data in (payload, *(book.artifacts.get(d) for d in (planned["diff"], *planned["source_code"]))):
        for word in (b"hunter2", b"token.secret", b"Lovelace", b"Hopper"): assert word not in data, word


def test_a_run_from_a_dirty_tree_is_reproduced_after_the_tree_was_reset(parcels):
    from retrain_nb.loop.reproduce import find_run, reproduce
    from retrain_nb.services.workbench import open_workbench
    subprocess.run(["git", "-C", str(parcels), "checkout", "-q", "--", "."], check=True)
    book = open_workbench(parcels)
    done = reproduce(book, find_run(book, "champion"))
    assert done["differs"] == [] and done["verdict"] == "REPRODUCED" and any("uncommitted changes" in note for note in done["notes"])
