"What a reader of `13c_slices` should not see: known answers, error rates beside power floors (more in `test_error_rates`), groups that try to be seen, odd input"
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retrain_nb.records import FAIL, INSUFFICIENT, PASS, DataError, Estimate, SettingsError, as_json
from retrain_nb.stages.paired import Family, family
from retrain_nb.stages.privacy import hidden_groups
from retrain_nb.stages.slices import (
    RATES,
    Slice,
    fairness,
    halves,
    judge_slices,
    newcombe,
    rates,
    rows_of,
    slice_of,
    weak_slices,
)

KNOWN = json.loads((Path(__file__).parent/"known_answers"/"slices.json").read_text())


def band(rate, reps): return 3*math.sqrt(rate*(1 - rate)/reps) # Three standard errors of a share seen in `reps` repetitions


def customers(rng, n=3000, days=60): # -> rows, and the day of each
    frame = pd.DataFrame({"town": rng.choice(list("abcdef"), n), "kind": rng.choice(["new", "old"], n), "age": rng.integers(18, 90, n).astype(float)})
    return frame, np.arange(n)%days


def searched(frame, d, day, seed, margin=0.1, how="max-T"): # -> the verdict on slices found on half of the days
    look = halves(day, seed)
    found = weak_slices(frame[look], d[look], list(frame.columns))
    masks = np.stack([rows_of(s, frame[~look]) for s in found]) if found else np.zeros((0, int((~look).sum())), dtype=bool)
    return judge_slices([s.name for s in found], family(d[~look], masks, codes=day[~look], how=how, seed=seed), margin)


# --- Known answers ---

@pytest.mark.parametrize("row", KNOWN["newcombe"], ids=lambda r: f"{r['x1']}/{r['n1']}-{r['x2']}/{r['n2']}")
def test_newcombe_gives_the_published_intervals(row):
    assert newcombe(row["x1"], row["n1"], row["x2"], row["n2"]) == pytest.approx(row["interval"], abs=1e-9)


def test_gaps_are_those_of_fairlearn():
    known = KNOWN["gaps"]
    found = rates(np.array(known["y"]), np.array(known["pred"]), np.array(known["group"]))
    share = lambda rate, name: found[rate][name][0]/found[rate][name][1]
    assert abs(share("selection", "a") - share("selection", "b")) == pytest.approx(known["dp_diff"], abs=1e-9)
    assert max(abs(share(r, "a") - share(r, "b")) for r in ("true positive", "false positive")) == pytest.approx(known["eo_diff"], abs=1e-9)
    assert [share("true positive", g) for g in "ab"] == pytest.approx([known["tpr_by_group"][g] for g in "ab"], abs=1e-9)


def test_the_search_finds_what_trying_all_pairs_finds():
    rng = np.random.default_rng(0)
    frame, _ = customers(rng, 2000)
    d = rng.normal(0, 1, 2000) + 0.6*((frame.town == "c") & (frame.kind == "new"))
    found = weak_slices(frame, d.to_numpy(), ["town", "kind"], least=50, most=1)[0]
    masks = {f"town = {t}": (frame.town == t).to_numpy() for t in "abcdef"} | {f"kind = {k}": (frame.kind == k).to_numpy() for k in ("new", "old")}
    masks |= {f"town = {t} and kind = {k}": ((frame.town == t) & (frame.kind == k)).to_numpy() for t in "abcdef" for k in ("new", "old")}
    z = {name: d[m].mean()/d[m].std(ddof=0)*m.sum()**0.5 for name, m in masks.items()}
    assert found.name == max(z, key=z.get) == "town = c and kind = new"
    assert rows_of(slice_of(found.name), frame).tolist() == rows_of(found, frame).tolist() == masks[found.name].tolist()


# --- Error rates, each beside a power floor ---

@pytest.mark.parametrize("how", ["max-T", "Holm"])
def test_a_search_over_equal_models_blocks_one_time_in_twenty_and_finds_a_slice_that_is_worse(how):
    rng, reps, blocked, caught, same = np.random.default_rng(2), 200, 0, 0, 0
    for i in range(reps):
        frame, day = customers(rng)
        d = rng.standard_t(4, 3000) + rng.normal(0, 0.1, 60)[day] # Long tails, and days that are worse as a whole
        blocked += searched(frame, d, day, i, how=how).outcome == FAIL
        if i%5: continue
        worse = ((frame.town == "c") & (frame.kind == "new")).to_numpy() # One row in twelve
        verdict = searched(frame, d + 0.8*worse, day, i, how=how)
        caught += verdict.outcome == FAIL
        same += any("town = c" in v.name for v in verdict.leaves if v.outcome == FAIL)
    assert blocked/reps <= 0.05 + band(0.05, reps)
    assert caught/(reps/5) >= 0.9 and same/(reps/5) >= 0.85


def test_judged_by_the_rows_that_were_searched_it_would_block_far_too_often():
    rng, blocked = np.random.default_rng(3), 0
    for i in range(60):
        frame, day = customers(rng)
        frame = frame.assign(**{f"x{j}": rng.random(3000) for j in range(5)}) # The more there is to look through, the more chance there is to find
        d = rng.standard_t(4, 3000)
        found = weak_slices(frame, d, list(frame.columns))
        blocked += judge_slices([s.name for s in found], family(d, np.stack([rows_of(s, frame) for s in found]), codes=day, seed=i), 0.1).outcome == FAIL
    assert blocked/60 > 0.05 + band(0.05, 60)


def test_a_group_is_passed_by_mistake_one_time_in_twenty():
    rng, group, y, reps = np.random.default_rng(5), np.repeat(["a", "b"], [3000, 3000]), np.ones(6000), 500
    passed = lambda p: fairness(y, (rng.random(6000) < np.where(group == "a", 0.5, p)).astype(float), group, 0.05, set(), ["selection"]).outcome == PASS
    assert np.mean([passed(0.45) for _ in range(reps)]) <= 0.05 + band(0.05, reps)
    assert np.mean([passed(0.5) for _ in range(100)]) >= 0.9


# --- Small groups ---

def village(k=7):
    rng, group = np.random.default_rng(6), np.repeat(["north", "south", "tiny hamlet", "tiny village"], [500, 400, 300, k])
    return (rng.random(len(group)) < 0.5).astype(float), (rng.random(len(group)) < 0.5).astype(float), group


def test_a_group_of_seven_is_insufficient_and_never_shown():
    y, said, group = village()
    said[group == "tiny village"] = 0.0 # However it was treated
    hidden = hidden_groups(pd.Series(group).value_counts().to_dict())
    verdict = fairness(y, said, group, 0.2, hidden)
    assert verdict.outcome == INSUFFICIENT and hidden == {"tiny village", "tiny hamlet"}
    assert "tiny" not in json.dumps(as_json(verdict)) and "307" not in json.dumps(as_json(verdict))
    assert "2 groups cannot be judged" in verdict.reason
    assert {v.outcome for v in verdict.leaves if v.name in [f"{r}: south" for r in RATES]} == {PASS}
    assert "tiny" in json.dumps(as_json(fairness(y, said, group, 0.2, set()))) # And the check above can fail


def test_a_rate_of_few_rows_is_not_shown_even_in_a_large_group():
    y, said, group = village(0)
    y[group == "south"] = 0.0
    y[np.flatnonzero(group == "south")[:9]] = 1.0
    verdict = {v.name: v for v in fairness(y, said, group, 0.2, set()).leaves}
    assert verdict["true positive: south"].outcome == INSUFFICIENT and verdict["true positive: south"].value is None and "9" not in verdict["true positive: south"].reason
    assert verdict["false positive: south"].value is not None


def test_a_slice_that_is_hidden_leaves_no_trace():
    e = Estimate(value=0.7654321, low=0.5, high=0.9, n=7, clusters=5, level=0.9, method="m", detectable=0.1)
    judged = Family(estimates=(e, e), adjusted=(0.001, 0.001), alpha=0.05, how="Holm")
    verdict = judge_slices(["town = one house", "town = other house"], judged, 0.01, {"town = one house", "town = other house"})
    assert verdict.outcome == INSUFFICIENT and not any(word in json.dumps(as_json(verdict)) for word in ("house", "0.76", "0.001"))


# --- Verdicts ---

@pytest.mark.parametrize("low, high, p, able, outcome", [
    (-0.1, 0.005, 0.9, 0.1, PASS), (0.001, 0.009, 0.01, 0.004, PASS), # At most the margin, shown or not
    (0.001, 0.1, 0.01, 0.05, FAIL), (-0.01, 0.011, 0.4, 0.009, PASS), # Harm is shown; none is, and it would have been
    (-0.01, 0.011, 0.4, 0.02, INSUFFICIENT)])
def test_each_outcome_has_its_reason(low, high, p, able, outcome):
    e = Estimate(value=(low + high)/2, low=low, high=high, n=900, clusters=30, level=0.9, method="m", detectable=able)
    verdict = judge_slices(["town = a"], Family(estimates=(e,), adjusted=(p,), alpha=0.05, how="Holm"), 0.01).leaves[0]
    assert (verdict.outcome, verdict.n, verdict.threshold, verdict.interval) == (outcome, 900, 0.01, (low, high))
    assert ("after correction" in verdict.reason) == (outcome == FAIL) and ("not tested" in verdict.reason) == (outcome == INSUFFICIENT)
    assert "detectable" in verdict.method


def test_no_margin_still_catches_harm_and_passes_nothing_without_evidence():
    rng = np.random.default_rng(7)
    masks, day = np.eye(2, dtype=bool).repeat(500, axis=1), np.arange(1000)%50
    d = rng.normal(0, 1, 1000)
    d += 0.5*masks[1] - d[:500].mean()*masks[0] # The first slice is no different, exactly
    assert [v.outcome for v in judge_slices(["a = 1", "a = 2"], family(d, masks, codes=day), 0).leaves] == [INSUFFICIENT, FAIL]
    assert judge_slices(["a = 1"], family(d[:1], np.ones((1, 1), dtype=bool)), 0.01).outcome == INSUFFICIENT


def test_one_group_or_none_is_no_evidence():
    ones = np.ones(50)
    assert fairness(ones, ones, np.repeat("a", 50), 0.1, set()).outcome == INSUFFICIENT
    assert fairness(ones, ones, np.repeat(None, 50), 0.1, set()).outcome == INSUFFICIENT
    assert fairness(np.array([]), np.array([]), np.array([]), 0.1, set()).outcome == INSUFFICIENT
    assert fairness(ones, ones, np.array(["a", "b"]*25), 0.1, set(), []).outcome == INSUFFICIENT


# --- Odd input ---

@pytest.mark.parametrize("text", ["", "carrier", "= 3", "carrier =", "hour = a .. b", "hour = 5 .. 5", "hour = 9 .. 3", "a = 1 and b"])
def test_what_is_no_slice_is_refused(text):
    if text == "a = 1 and b": # Read as one value with an `and` in it
        assert slice_of(text).wanted[0][1] == "1 and b"
    else:
        with pytest.raises(SettingsError): slice_of(text)


def test_values_are_read_as_they_are_written():
    frame = pd.DataFrame({"n": [1, 2, 3], "x": [1.0, 2.5, None], "flag": [True, False, True], "c": pd.Categorical(["u", "v", None]), "big": pd.array([1, None, 3], dtype="Int64")})
    for text, rows in (("n = 1", [1, 0, 0]), ("x = 1", [1, 0, 0]), ("x = 2.5", [0, 1, 0]), ("x = missing", [0, 0, 1]), ("flag = True", [1, 0, 1]), ("c = v", [0, 1, 0]),
                       ("c = missing", [0, 0, 1]), ("big = missing", [0, 1, 0]), ("big = 3", [0, 0, 1]), ("n = 2 ..", [0, 1, 1]), ("x = .. 2.5", [1, 0, 0]), ("n = -1 .. 2", [1, 0, 0])):
        assert rows_of(slice_of(text), frame).astype(int).tolist() == rows, text
    assert not rows_of(slice_of("c = w"), frame).any() and rows_of(slice_of("n = 1"), frame[:0]).shape == (0,)


def test_quarters_of_a_number_share_no_row_and_lose_none():
    rng = np.random.default_rng(8)
    frame = pd.DataFrame({"x": np.where(rng.random(4000) < 0.1, np.nan, rng.integers(0, 30, 4000))})
    found = weak_slices(frame, np.ones(4000) + rng.normal(0, 0.1, 4000), ["x"], least=50)
    assert sum(rows_of(s, frame).astype(int) for s in found).tolist() == [1]*4000 and "x = missing" in [s.name for s in found]


def test_halves_keep_days_whole_and_depend_on_the_seed_alone():
    day = np.random.default_rng(9).integers(0, 31, 900)
    half = halves(day, 3)
    assert not set(day[half]) & set(day[~half]) and len(set(day[half])) == 15
    assert (halves(day, 3) == half).all() and (halves(day, 4) != half).any() and halves(np.array([]), 0).shape == (0,)


def test_nothing_to_find_is_nothing_found():
    rng = np.random.default_rng(10)
    frame, day = customers(rng, 100)
    assert weak_slices(frame, rng.normal(size=100), ["town"], least=90) == () and weak_slices(frame, -np.ones(100), ["town"], least=5) == ()
    assert searched(frame, rng.normal(size=100), day, 0).outcome == INSUFFICIENT


@pytest.mark.parametrize("call, says", [
    (lambda: rates([0, 2], [0, 1], ["a", "b"]), "not all 0 or 1"), (lambda: rates([0, np.nan], [0, 1], ["a", "b"]), "not all 0 or 1"),
    (lambda: rates([0, 1], [0, 1], ["a"]), "One|one of each"), (lambda: newcombe(3, 2, 1, 2), "not two rates")])
def test_bad_input_is_refused_with_a_cure(call, says):
    with pytest.raises(DataError, match=says): call()


def test_a_slice_of_an_unknown_column_is_refused():
    with pytest.raises(SettingsError, match="there is no column `zone`"): rows_of(Slice("zone = a", (("zone", "a", -math.inf, math.inf),)), pd.DataFrame({"town": ["a"]}))
