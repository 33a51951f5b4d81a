"""Damaged model files: refused by their digest, all of them; and without its help, by the process that may break.

A thousand go through the store; sixty through a throw-away process each, as if they had been damaged before they were put."""
import collections
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from retrain_nb.digest import canonical
from retrain_nb.records import FAIL, INSUFFICIENT, PASS, DataError, Model, VerificationError, as_json
from retrain_nb.services import vetting
from retrain_nb.services.vetting import vet
from retrain_nb.stages.train import canary, fixed_params, questions, train
from retrain_nb.stores.artifacts import Artifacts

KINDS, ASKED = ("cut", "bit", "digit", "swap"), 60


def flights(n, seed):
    rng = np.random.default_rng(seed)
    X = pd.DataFrame({"hour": rng.integers(0, 24, n).astype(float), "distance": rng.exponential(800, n).round(), "wind": rng.normal(10, 5, n).round(1),
                      "carrier": pd.Categorical(rng.choice([f"C{i}" for i in range(12)], n), categories=[f"C{i}" for i in range(12)])})
    X.loc[rng.random(n) < .1, "wind"] = np.nan
    late = X.hour/12 - 1 + X.wind.fillna(14)/15 - 1 + (X.carrier.cat.codes % 3 == 0) - (X.distance > 1000) + rng.logistic(size=n)
    return X, (late > 0).astype(int)


@pytest.fixture(scope="module")
def model():
    X, y = flights(4000, 0)
    booster = train(X, y, fixed_params({"rounds": 20, "num_leaves": 15}, 1, seed=0))
    return Model(booster=booster, view="flights", encoding={}, target="late", cut="2013-05-18T00:00:00Z", canary=canary(booster))


def damage(data, line, trial, rng):
    "One of four kinds of damage, in turn: cut off, one bit, one digit, two lines swapped; never none"
    lines, digits = data.split(line), [i for i, c in enumerate(data) if 48 <= c <= 57]
    while True:
        i, kind = int(rng.integers(len(data))), KINDS[trial % 4]
        if kind == "cut": wrong = data[:i]
        elif kind == "bit": wrong = data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i+1:]
        elif kind == "digit":
            i = digits[int(rng.integers(len(digits)))]
            wrong = data[:i] + b"%d" % ((data[i] - 48 + int(rng.integers(1, 10))) % 10) + data[i+1:]
        else:
            a, b = sorted(int(x) for x in rng.choice(len(lines), 2, replace=False))
            wrong = line.join([*lines[:a], lines[b], *lines[a+1:b], lines[a], *lines[b+1:]])
        if wrong != data: return wrong


def test_1000_of_1000_damaged_model_files_are_refused_before_a_byte_is_parsed(tmp_path, model, monkeypatch):
    store, rng, data, started = Artifacts(tmp_path), np.random.default_rng(6), canonical(as_json(model)), []
    name = store.put(data, "model")
    refused = 0
    with monkeypatch.context() as watch:
        watch.setattr(vetting, "_ask", lambda *_: started.append(1))
        for trial in range(1000):
            store.path(name).write_bytes(damage(data, b"\\n", trial, rng))
            try: vet(store.get(name))
            except VerificationError: refused += 1
    print(f"{refused} of 1000 damaged model files refused, {len(started)} parsed")
    assert (refused, started) == (1000, [])
    store.path(name).write_bytes(data)
    assert vet(store.get(name)).outcome == PASS


SCORE = """
import json, sys
import pandas as pd
sys.path.insert(0, sys.argv[1])
from test_vetting import flights
from retrain_nb.stages.train import predict
X, _ = flights(4000, 1)                                    # Rows that no model has seen
print(json.dumps([predict(text, X).tolist() for text in json.load(sys.stdin)]), file=sys.stderr) # LightGBM prints warnings to the other
"""


def test_of_60_models_damaged_before_they_were_put_none_that_passes_predicts_otherwise(model):
    "As if the damage came before the digest was taken; the canary is all there is"
    rng, text = np.random.default_rng(7), model.booster.encode()
    damaged = [damage(text, b"\n", trial, rng) for trial in range(ASKED)]
    readable = [d.decode("utf-8", errors="replace") for d in damaged] # A record is text; what is not UTF-8 would not have got this far
    ask = lambda booster: vet(canonical(as_json(replace(model, booster=booster))), seconds=10)
    with ThreadPoolExecutor(2) as pool: verdicts = list(pool.map(ask, readable))
    counts = collections.Counter("passed" if v.outcome == PASS else how(v.reason) for v in verdicts)
    passed = [b for b, v in zip(readable, verdicts) if v.outcome == PASS]
    done = subprocess.run([sys.executable, "-c", SCORE, str(Path(__file__).parent)], input=json.dumps([model.booster, *passed]), capture_output=True, text=True, check=True)
    right, *others = json.loads(done.stderr.splitlines()[-1])
    print(f"{ASKED} asked: {dict(counts)}; of those that passed {sum(o != right for o in others)} predict otherwise")
    assert all(o == right for o in others)
    assert counts["grammar"] and counts["another answer"] and counts["passed"], counts # Else this would not have tried each


def how(reason):
    return "grammar" if "no LightGBM model text" in reason else "another answer" if "canary differ" in reason else "the process died or hung" if re.search("killed by|still busy", reason) else reason


def test_whatever_the_parameters_a_trained_model_keeps_the_grammar_and_passes():
    X, y = flights(3000, 2)
    kinds = [{}, {"boosting": "dart"}, {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": .5}, {"monotone_constraints": [1, 0, 0, 0]},
             {"use_quantized_grad": True}, {"data_sample_strategy": "goss"}, {"zero_as_missing": True}, {"use_missing": False}, {"min_data_in_leaf": 2000},
             {"min_data_in_leaf": 1, "num_leaves": 200, "learning_rate": .9}, {"lambda_l1": 9., "extra_trees": True}, {"max_cat_to_onehot": 40}]
    frames = [X, X[["hour"]], X[["carrier"]], X.assign(hour=1.0), X.rename(columns={"wind": "Böen"}),
              X.assign(hour=X.hour.where(y == 0))] # Split by whether there is a value: the edge is infinite
    for params, frame in [*((k, X) for k in kinds), *(({}, f) for f in frames)]:
        vetting.check_text(train(frame, y, fixed_params({"rounds": 12, **params}, 1, seed=0)))


def relined(text, at, change):
    lines = text.split("\n")
    i = next(i for i, line in enumerate(lines) if line.startswith(at))
    lines[i] = change(lines[i])
    return "\n".join(lines)


@pytest.mark.parametrize(("at", "change", "says"), [
    ("num_leaves=", lambda s: "num_leaves=2000000000", "are not as long"), ("num_leaves=", lambda s: "num_leaves=14", "`split_feature` does not hold 13"),
    ("leaf_value=", lambda s: s.replace(".", "_", 1), "`leaf_value` does not hold 15"), ("threshold=", lambda s: re.sub(r"=\S+", "=1e+999", s), "is not finite"),
    ("left_child=", lambda s: re.sub(r"=\S+", "=0", s), "are not a tree"), ("right_child=", lambda s: s.rsplit(" ", 1)[0] + " 99", "are not a tree"),
    ("split_feature=", lambda s: re.sub(r"=\d+", "=4", s), "a feature that is not there"), ("decision_type=", lambda s: re.sub(r"=\d+", "=99", s), "not known"),
    ("cat_threshold=", lambda s: s + " 1", "`cat_threshold` does not hold"), ("cat_boundaries=", lambda s: s[:-1] + "9999", "`cat_threshold` does not hold 9999"),
    ("is_linear=", lambda s: "is_linear=1", "linear in its leaves"), ("max_feature_idx=", lambda s: "max_feature_idx=3000000", "number of features"),
    ("num_class=", lambda s: "num_class=2", "number of classes"), ("tree_sizes=", lambda s: s + " 7", "does not hold 20"), ("version=", lambda s: "", "in the head"),
    ("[seed", lambda s: "x", "in the tail"), ("end of trees", lambda s: "end", "in the")])
def test_what_breaks_the_grammar_is_named(model, at, change, says):
    wrong = relined(model.booster, at, change)
    if at not in ("tree_sizes=", "max_feature_idx=", "version=", "[seed", "end of trees", "num_class=") and "long" not in says: # Damage that knows to hide its length
        before, after = (re.findall(r"Tree=0\n.*?(?=Tree=1\n)", text, re.DOTALL)[0] for text in (model.booster, wrong))
        wrong = wrong.replace(f"tree_sizes={len(before)}", f"tree_sizes={len(after)}")
    assert wrong != model.booster
    with pytest.raises(DataError, match=says): vetting.check_text(wrong)


def test_the_questions_reach_every_leaf_and_both_sides_of_every_edge(model):
    import lightgbm
    rows, booster = questions(model.booster), lightgbm.Booster(model_str=model.booster)
    leaves = booster.predict(rows, pred_leaf=True)
    assert [len(set(column)) for column in leaves.T] == [t["num_leaves"] for t in booster.dump_model()["tree_info"]]
    def edges(node):
        if "split_feature" not in node: return
        if node["decision_type"] == "<=": yield node["split_feature"], node["threshold"]
        for side in ("left_child", "right_child"): yield from edges(node[side])
    wanted = {e for tree in booster.dump_model()["tree_info"] for e in edges(tree["tree_structure"])}
    assert len(wanted) > 50
    for feature, edge in wanted:
        assert {edge, np.nextafter(edge, np.inf)} <= set(rows[:, feature])
    assert np.isnan(rows[:, 2]).any() and np.isnan(rows[:, 3]).any()


@pytest.mark.parametrize("change", ["leaf_value", "threshold", "decision_type", "left_child", "cat_threshold", "split_feature", "objective", "feature_names"])
def test_one_word_changed_in_each_part_that_predicts_is_noticed(model, change):
    at = re.search(r"\ndecision_type=.*?\b(?=8\b|10\b)" if change == "decision_type" else f"\n{change}=", model.booster).end()
    word = model.booster[at:].split()[0]
    new = {"leaf_value": "0.123", "threshold": "9.87", "decision_type": "10" if word == "8" else "8", "left_child": "2", "cat_threshold": "1",
           "split_feature": "1", "objective": "regression", "feature_names": "day"}[change] # 8 and 10: which way a missing value goes
    assert vet(canonical(as_json(replace(model, booster=model.booster[:at] + new + model.booster[at + len(word):])))).outcome == FAIL


DEEDS = { # What a parser that was taken over may do, and what the verdict says; the answer goes to descriptor 3
    "takes memory": ("bytearray(1 << 40)", "MemoryError"),
    "never ends": ("while True: pass", "was still busy after 3 s|was killed by SIG(KILL|XCPU)"),
    "sleeps": ("import time; time.sleep(987)", "was still busy after 3 s"),
    "leaves a child": ("import subprocess; subprocess.Popen(['sleep', '987']); os._exit(0)", "exit code 0 and no answer"),
    "aborts": ("os.abort()", "was killed by SIGABRT"),
    "says nothing": ("os._exit(0)", "exit code 0 and no answer"),
    "says too much": ("os.write(3, b'x'*10**7)", "exit code 1 and no answer"),
    "says it is fine": ("os.write(3, b'[\"PASS\"]'); os._exit(0)", "exit code 0 and no answer"),
    "says it in our words": ("os.write(3, b'{\"canary\": {\"rows\": 1}}'); os._exit(0)", "of its canary differ"),
    "looks for secrets": ("os.write(3, b'{\"error\": \"%d\"}' % ('A_SECRET' in os.environ)); os._exit(0)", "^0$")}


@pytest.mark.parametrize("deed", DEEDS)
def test_whatever_the_process_does_is_a_fail_with_its_cause_and_leaves_nothing_running(model, deed, tmp_path, monkeypatch):
    code, says = DEEDS[deed]
    (tmp_path/"lightgbm.py").write_text(f"import os\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("A_SECRET", "for nobody")
    start = time.monotonic()
    verdict = vet(canonical(as_json(model)), seconds=3)
    assert verdict.outcome == FAIL and re.search(says, verdict.reason), verdict.reason
    assert time.monotonic() - start < 15
    def left(): return [p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "987"]]
    while left() and time.monotonic() - start < 15: time.sleep(.05) # A killed process takes its moment to go
    assert not left()


def test_a_model_of_the_former_format_starts_but_does_not_pass(model):
    old = {k: v for k, v in as_json(model).items() if k != "canary"} | {"format": "retrain_nb/model@1"}
    verdict = vet(canonical(old))
    assert verdict.outcome == INSUFFICIENT and "no answers were recorded" in verdict.reason
