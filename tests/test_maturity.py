"""A hotel's bookings through the whole loop: a booking is "not cancelled" until it is, and that a guest stayed is known when he came.

Real kernels, a real ledger, the command line. What is immature is INSUFFICIENT, in words, and is not scored in silence."""
import json
from html import unescape

import pytest

from retrain_nb.faces.cli import main
from retrain_nb.services.workbench import open_workbench
from retrain_nb.stores import ledger

SOURCE = '''
import numpy as np
import pandas as pd
from retrain_nb.stages.features import FeatureView

view = FeatureView(name="bookings", numeric=("price", "nights"), categorical=("channel",))

def rows():
    rng = np.random.default_rng(5)
    booked = pd.Series(pd.date_range("2023-01-01T00:12Z", periods=400*60, freq="24min", unit="us"))
    n = len(booked)
    channel, price, nights = rng.integers(0, 3, n), rng.gamma(4.0, 25, n).round(2), rng.integers(1, 8, n).astype("float64")
    odds = -2.0 + 0.012*(price - 100) + np.array([0.0, 1.5, 2.2])[channel]
    cancelled = rng.random(n) < 1/(1 + np.exp(-odds))
    hours = np.where(cancelled, rng.exponential(8, n), 24*rng.gamma(9, 2, n)) # Cancelled within hours; a guest comes some eighteen days later
    return pd.DataFrame({"booking": [f"B{i:05d}" for i in range(n)], "booked": booked, "cancelled": cancelled.astype("float64"), "told": booked + pd.to_timedelta((60*hours).round(), unit="min").astype("timedelta64[us]"),
        "guest": [f"G{i//GUEST:05d}" for i in range(n)], "channel": pd.Categorical.from_codes(channel, pd.Index(["desk", "phone", "web"])), "price": price, "nights": nights})
'''
SETTINGS = """
[workbench]
name = hotel
[source]
rows = hotel_feed:rows
key = booking
time = booked
label = cancelled
label_time = told
[features]
view = hotel_feed:view
[window]
holdout_days = 14
[trainer]
rounds = 30
threads = 2
params = learning_rate 0.1, num_leaves 7
[gates]
min_rows = 300
min_positives = 50
margins = log_loss 0.05
[champion]
bootstrap = gated
[tracking]
mode = disabled
[run]
profile_rows = 0
"""
CONTRACT = 'version = "1.0"\n[table]\nkey = "booking"\ntime = "booked"\nmin_rows = 300\n[columns.cancelled]\nkind = "flag"\n[columns.guest]\nkind = "text"\n'


def hotel(root, window="", guest=1, contract=CONTRACT): # -> the root of its workbench
    assert main(["init", str(root), "--demo", "toy"]) == 0
    (root/"hotel_feed.py").write_text(SOURCE.replace("GUEST", str(guest)))
    (root/"settings.ini").write_text(SETTINGS.replace("holdout_days = 14", f"holdout_days = 14\n{window}"))
    (root/"contract.toml").write_text(contract)
    return root


@pytest.fixture(autouse=True)
def fresh_feed(monkeypatch): # Each workbench has a module of that name, and in this process only the first would be read
    import sys
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("hotel_feed", None)
    yield
    sys.modules.pop("hotel_feed", None)


def turn(root, capsys, now="2024-01-01"): # -> exit code and answer of one cycle
    capsys.readouterr()
    code = main(["cycle", "--now", now, "--root", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


def leaves(reasons): # -> by name, the verdicts that have no parts
    return {v["name"]: v for r in reasons for v in (leaves_of(r))}


def leaves_of(verdict): return [v for part in verdict["parts"] for v in leaves_of(part)] if verdict["parts"] else [verdict]


def test_a_fortnight_of_open_bookings_is_insufficient_in_words_and_nothing_serves(tmp_path, capsys):
    root = hotel(tmp_path/"hotel")
    code, done = turn(root, capsys)
    found = leaves(done["reasons"])
    assert (code, done["verdict"]) == (4, "INSUFFICIENT")
    assert found["labelled"]["outcome"] == "INSUFFICIENT" and "test rows have no label yet, at most 5.0% may" in found["labelled"]["reason"]
    words = found["completeness"]["reason"]
    assert found["completeness"]["outcome"] == "INSUFFICIENT" and "the labels `0` that will ever come are known, 95.0% wanted" in words and "and younger rows cannot judge" in words
    assert main(["status", "--root", str(root), "--json"]) == 0 and json.loads(capsys.readouterr().out)["champion"] is None
    report = unescape((root/"reports"/done["run"]/"report.html").read_text())
    for sentence in (words, found["labelled"]["reason"], "The wait depends on the outcome", "periods are mature; the first that is not begins on"): assert sentence in report
    assert words in json.dumps([e.body for e in open_workbench(root).ask(ledger.entries)], ensure_ascii=False)


def test_with_the_wait_declared_the_same_bookings_are_judged_and_only_mature_ones_teach(tmp_path, capsys):
    root = hotel(tmp_path/"hotel", "wait_days = 45")
    code, done = turn(root, capsys)
    found = leaves(done["reasons"])
    assert (code, done["verdict"]) == (0, "PASS"), {n: v["reason"] for n, v in found.items() if v["outcome"] != "PASS"}
    assert found["completeness"]["outcome"] == found["labelled"]["outcome"] == found["training tail"]["outcome"] == "PASS"
    assert "no training row is younger than that at the cut" in found["training tail"]["reason"]
    record = json.loads((root/"reports"/done["run"]/"record.json").read_text())
    assert (record["recipe"]["cut"], record["recipe"]["end"]) == ("2023-11-03T00:00:00Z", "2023-11-17T00:00:00Z")
    assert abs(record["evaluation"]["calibration"]["slope"]["value"] - 1) < 0.35 # The share of cancellations is learned right
    assert main(["reproduce", "champion", "--root", str(root), "--json"]) == 0


@pytest.mark.parametrize("guest, outcome", [(1, "PASS"), (20_000, "FAIL")])
def test_who_the_contract_tags_as_group_may_not_be_in_training_and_test_both(tmp_path, capsys, guest, outcome):
    root = hotel(tmp_path/"hotel", "wait_days = 45", guest, CONTRACT + 'tag = "group"\n')
    _, done = turn(root, capsys)
    found = {n: v for n, v in leaves(done["reasons"]).items() if n.split(":")[0] == "group"}
    assert [v["outcome"] for v in found.values()] == [outcome] and done["verdict"] == outcome, found
    if outcome == "FAIL": assert "that training rows are about too" in found["group: guest"]["reason"]
