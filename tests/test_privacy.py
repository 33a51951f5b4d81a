"Does anything about a person get past the contract, and does the check leave the innocent alone?"
import ipaddress
import json
import re

import numpy as np
import pandas as pd
import pytest

from retrain_nb.faces.cli import main
from retrain_nb.records import FAIL, INSUFFICIENT, PASS, DataError, SettingsError
from retrain_nb.stages.features import fit_encoding
from retrain_nb.stages.privacy import KINDS, check_undeclared, hidden_groups, luhn, mod97, shown_groups, suspicions

RNG = np.random.default_rng(3)
digits = lambda n: "".join(map(str, RNG.integers(0, 10, n)))


def card():
    body = f"4{digits(14)}"
    return next(body + d for d in "0123456789" if luhn(body + d))


def iban():
    body = digits(18)
    return next(f"DE{c:02}{body}" for c in range(2, 99) if mod97(f"DE{c:02}{body}"))


MAKES = {"mail address": lambda: f"p{digits(5)}@example.org", "payment card": card, "bank account": iban, "phone number": lambda: f"+49 30 {digits(7)}",
         "network address": lambda: str(ipaddress.ip_address(int(RNG.integers(2**24, 2**30))))}
INNOCENT = {"order numbers of 16 digits": lambda: f"4{digits(15)}", "article codes": lambda: f"DE{digits(20)}", "versions": lambda: f"{digits(1)}.{digits(1)}.{digits(1)}",
            "dates": lambda: f"2013-{RNG.integers(1, 13):02}-{RNG.integers(1, 29):02}", "times": lambda: f"{RNG.integers(0, 24):02}:{digits(2)}:{digits(2)}", "words": lambda: "late again",
            "floats": lambda: f"{RNG.normal():.6f}", "digests": lambda: RNG.bytes(16).hex(), "uuids": lambda: f"{digits(8)}-{digits(4)}-4{digits(3)}-8{digits(3)}-{digits(12)}",
            "flight numbers": lambda: f"UA{digits(4)}", "coordinates": lambda: f"52.{digits(4)}, 13.{digits(4)}", "prices": lambda: f"1,{digits(3)},{digits(3)}.00"}


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("dressed", [lambda t: t, lambda t: f"please note: {t}, thank you"], ids=["bare", "in a sentence"])
@pytest.mark.parametrize("share", [1.0, 0.01])
def test_each_kind_is_found_by_name_also_when_it_is_rare(kind, dressed, share):
    values = [dressed(MAKES[kind]()) if i < 2000*share else f"nothing {i}" for i in range(2000)]
    found = suspicions(pd.Series(values, name="x").sample(frac=1, random_state=0))
    assert [s.kind for s in found] == [kind] and found[0].share == pytest.approx(share, abs=0.2*share)


@pytest.mark.parametrize("what", INNOCENT)
def test_20_columns_of_each_innocent_kind_raise_no_alarm(what):
    assert [suspicions(pd.Series([INNOCENT[what]() for _ in range(1000)], name="x")) for _ in range(20)] == [[]]*20


def test_the_published_examples_prove_themselves():
    assert all(map(luhn, ("79927398713", "4111111111111111", "5555555555554444", "378282246310005"))) # Wikipedia's example, and the test numbers of card networks
    assert all(map(mod97, ("GB82WEST12345698765432", "DE89370400440532013000", "SA0380000000608010167519", "CH9300762011623852957"))) # ISO 13616 registry


def test_a_verdict_never_repeats_a_value_and_a_crash_is_no_pass(monkeypatch):
    frame = pd.DataFrame({"a": ["grace@example.org"]*50, "b": ["fine"]*50})
    found = check_undeclared(frame, [])
    assert found.outcome == FAIL and "grace" not in json.dumps(found, default=str) and check_undeclared(frame, ["a"]).outcome == PASS
    def crash(*_): raise ValueError("grace@example.org")
    monkeypatch.setattr("retrain_nb.stages.privacy._texts", crash)
    found = check_undeclared(frame, ["a"])
    assert found.outcome == INSUFFICIENT and "ValueError" in found.reason and "grace" not in json.dumps(found, default=str)


def test_odd_columns_are_looked_at_too():
    both = pd.DataFrame([["x", "ada@example.org"]]*30, columns=["a", "a"]) # Two columns of one name
    assert check_undeclared(both, []).outcome == FAIL
    mixed = pd.DataFrame({"m": [None, 1, b"x", {"a": 1}.keys(), "ada@example.org"]*9, "n": np.arange(45), "c": pd.Categorical(["ada@example.org", None, "u"]*15)})
    assert {p.name: p.outcome for p in check_undeclared(mixed[["n", "c"]], []).leaves} == {"c.undeclared": FAIL, "undeclared": PASS}
    assert check_undeclared(mixed, []).outcome != PASS
    unused = pd.DataFrame({"c": pd.Categorical(["u"]*9, categories=["u", "ada@example.org"])})
    assert check_undeclared(unused, []).outcome == PASS # Nobody of that name is among the rows


def test_a_shape_that_could_take_for_ever_does_not():
    import time
    start = time.monotonic()
    for bad in ("a"*1000 + "@", "a.b"*300 + "@" + "c."*300, "4"*1000, "0 "*500, ":"*1000, "GB82" + "A "*500):
        suspicions(pd.Series([bad + str(i) for i in range(200)], name="x"))
    assert time.monotonic() - start < 20 and len(KINDS) == 5


def test_what_is_not_shown_cannot_be_had_by_subtraction():
    for n in range(2000):
        rng = np.random.default_rng(n)
        counts = {g: int(c) for g, c in enumerate(rng.integers(0, 40, rng.integers(1, 8)))}
        gone = hidden_groups(counts)
        assert not any(c < 10 for g, c in counts.items() if g not in gone)
        assert len(gone) != 1 or len(counts) == 1
        assert bool(gone) == any(c < 10 for c in counts.values())
    table = pd.DataFrame({"v": range(3)}, index=list("abc"))
    assert shown_groups(table, pd.Series([10, 10, 10], index=list("abc")))[1] == ""
    assert len(shown_groups(table, pd.Series([10, 9, 20], index=list("abc")))[0]) == 1


# --- Through a real cycle ---

WHO = "zq7canary@example.org"
FEED = """from pathlib import Path
from retrain_nb.demo import toy
from retrain_nb.stages.features import FeatureView
def rows():
    who = Path(__file__).with_name("who.csv").read_text()
    return toy.rows().assign(addressee=[f"{i % 50}{who}" for i in range(5460)])
def peep(frame): return frame.assign(length=frame["addressee"].str.len().astype("float64"))
peeping = FeatureView(name="peeping", numeric=("load", "length"), categorical=(), derive=peep)
using = FeatureView(name="using", numeric=("load", "rain"), categorical=("depot", "addressee"))
def deeper(value): return {"nobody": 1}[value]
def telling(frame):
    how, first = Path(__file__).with_name("how.txt").read_text(), frame["addressee"].iloc[0]
    if how == "SystemExit": raise SystemExit(first)
    if how == "KeyError": deeper(first)
    try: float(first)
    except ValueError as e: raise RuntimeError(f"cannot use {first}") from e
gossip = FeatureView(name="gossip", numeric=("load", "length"), categorical=(), derive=telling)
"""


@pytest.fixture
def parcels(tmp_path):
    root = tmp_path/"parcels"
    assert main(["init", str(root), "--demo", "toy"]) == 0
    path = root/"settings.ini"
    path.write_text(path.read_text().replace("retrain_nb.demo.toy:rows", "private_feed:rows"))
    (root/"private_feed.py").write_text(FEED)
    (root/"who.csv").write_text(WHO)
    return root


def cycle(root, capsys, now="2024-03-01"):
    capsys.readouterr()
    code = main(["cycle", "--now", now, "--root", str(root), "--json"])
    printed = capsys.readouterr()
    assert WHO[:9] not in printed.out + printed.err
    return code, json.loads(printed.out)


def tag(root, word):
    path = root/"contract.toml"
    path.write_text(path.read_text().split("\n[columns.addressee]")[0] + f'\n[columns.addressee]\nkind = "text"\ntag = "{word}"\n')


def places(root): # Files that hold the value; in the snapshots and in the source it belongs
    kept = [p for p in root.rglob("*") if p.is_file() and "snapshots" not in p.parts and p.name != "who.csv"]
    assert {"report.html", "profile.html", "index.html"} <= {p.name for p in kept} and any("mirrors" in p.parts for p in kept)
    return [p for p in kept if WHO[:9].encode() in p.read_bytes()]


def test_a_value_planted_in_a_column_is_nowhere_but_in_the_snapshot(parcels, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(parcels))
    code, done = cycle(parcels, capsys)                                        # Nobody declared it: the run stops, and its views hide it
    assert code == 3 and "addressee" in done["sentence"] + json.dumps(done["reasons"]) and 'tag = \\"personal\\"' in json.dumps(done["reasons"])
    assert places(parcels) == []
    tag(parcels, "personal")
    code, done = cycle(parcels, capsys, "2024-03-02")
    assert (code, done["did"]) == (0, "bootstrap") and places(parcels) == []


def test_a_run_that_breaks_before_it_was_asked_for_personal_data_shows_none_either(parcels, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(parcels))
    path = parcels/"nbs"/"runs"/"retrain.ipynb"
    path.write_text(path.read_text().replace('"frame = run.read()', '"frame = run.read(); 1/0'))
    code, done = cycle(parcels, capsys)
    assert (code, done["did"], done["state"]) == (1, "interrupted", "failed") and places(parcels) == []
    assert "depot" in (parcels/"reports"/done["run"]/"profile.html").read_text()


@pytest.mark.parametrize("how", ["SystemExit", "KeyError", "RuntimeError"])
def test_an_error_in_derive_tells_its_type_and_place_and_no_value(parcels, capsys, monkeypatch, how):
    monkeypatch.syspath_prepend(str(parcels))
    tag(parcels, "granted")
    (parcels/"settings.ini").write_text(re.sub(r"view = .*", "view = private_feed:gossip", (parcels/"settings.ini").read_text()))
    (parcels/"how.txt").write_text(how)
    code, done = cycle(parcels, capsys)
    words, name = {"SystemExit": ("raise SystemExit", "telling"), "KeyError": ('{"nobody"', "deeper"), "RuntimeError": ("raise RuntimeError", "telling")}[how]
    line = next(i for i, text in enumerate(FEED.splitlines(), 1) if words in text)
    assert (code, done["state"]) == (1, "failed") and f"`derive` of view `gossip` raised {how} at line {line} of private_feed.py, in {name}." in done["cause"]
    assert places(parcels) == []
    report = (parcels/"reports"/done["run"]/"report.html").read_text()
    assert how in report and "private_feed.py" in report


def test_a_view_sees_no_personal_column_unless_a_person_granted_it(parcels, monkeypatch):
    from retrain_nb.services.session import open_session
    from retrain_nb.services.workbench import open_workbench
    monkeypatch.syspath_prepend(str(parcels))
    text = (parcels/"settings.ini").read_text()
    def session(view, word):
        tag(parcels, word)
        (parcels/"settings.ini").write_text(re.sub(r"view = .*", f"view = private_feed:{view}", text))
        return open_session(open_workbench(parcels), as_of="2024-03-01T00:00:00Z")
    with pytest.raises(SettingsError, match="addressee, which the contract tags"): session("using", "personal")
    run = session("peeping", "personal")
    with pytest.raises(DataError, match="`derive` of view `peeping` raised KeyError at line .* of private_feed.py, in peep"): fit_encoding(run.book.view, run.split_rows(run.read())[0])
    for view in ("using", "peeping"):
        run = session(view, "granted")
        assert fit_encoding(run.book.view, run.split_rows(run.read())[0])
