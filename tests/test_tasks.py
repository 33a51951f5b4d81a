"""Several classes, and numbers, through real cycles: what a reader of the notebooks should not see.

Each stream is made up from a seed and goes the whole way, from `settings.ini` through a real kernel to the ledger and the report."""
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from retrain_nb.digest import canonical
from retrain_nb.faces.cli import main
from retrain_nb.loop.reproduce import reproduce
from retrain_nb.loop.validate import validate
from retrain_nb.records import FAIL, INSUFFICIENT, PASS, DataError, Model, SettingsError, Verdict, as_json, from_json
from retrain_nb.services.vetting import check_text, vet
from retrain_nb.services.workbench import open_workbench
from retrain_nb.settings import TaskName, parse_settings, policy
from retrain_nb.stages.evaluate import Evaluation, base_rate, evaluate, line, means
from retrain_nb.stages.gates import GatePolicy, data_health, sanity
from retrain_nb.stages.train import canary, fixed_params, predict, train
from retrain_nb.tasks import TASKS, class_codes, class_list, influence

SOURCE = '''
import numpy as np
import pandas as pd
from retrain_nb.stages.features import FeatureView

view = FeatureView(name="goods", numeric=("load", "rain", "hour"), categorical=("depot",))

def goods(per_day=48, days=91):
    rng = np.random.default_rng(11)
    due = pd.Series(pd.date_range("2024-01-01T00:15Z", periods=days*per_day, freq=f"{1440//per_day}min", unit="us"))
    return rng, pd.DataFrame({"key": [f"K{i:05d}" for i in range(len(due))], "due": due, "known": due + pd.Timedelta("1D"), "load": rng.gamma(4.0, 0.25, len(due)).round(3),
        "rain": np.repeat(rng.gamma(0.6, 1.5, days), per_day).round(2), "hour": due.dt.hour.astype("float64"), "depot": pd.Categorical.from_codes(rng.integers(0, 5, len(due)), list("ABCDE"))})

def way(frame, rng):
    odds = np.column_stack([1.5*frame.load - 1.5, (frame.depot.cat.codes == 3)*2.0, 0.4*frame.rain])
    return np.array(["air", "rail", "road"])[(odds + rng.gumbel(size=odds.shape)).argmax(axis=1)]

def rows():
    rng, frame = goods(SIZE)
    day = (frame.due - frame.due.iloc[0]).dt.days
    LABEL
    return frame
'''
SETTINGS = """
[workbench]
name = goods
[source]
rows = {module}:rows
key = key
time = due
label = what
label_time = known
task = {task}
[features]
view = {module}:view
[window]
holdout_days = 14
[trainer]
rounds = 30
threads = 2
params = learning_rate 0.1, num_leaves 7
[gates]
min_rows = 300
min_positives = {least}
max_unlabelled = 0.1
margins = {margins}
[champion]
bootstrap = gated
[tracking]
mode = disabled
[run]
profile_rows = 0
"""
CONTRACT = 'version = "1.0"\n[table]\nkey = "key"\ntime = "due"\nmin_rows = 300\n[columns.what]\nkind = "{kind}"\n'
MARGINS = {"binary": "log_loss 0.05", "multiclass": "log_loss 0.05, brier 0.03, error 0.05", "regression": "mae 5%, rmse 10%"}


def bench(folder, name, task, label, size="", least=30, kind=None): # -> the root of a workbench on a stream whose label `label` makes
    root = folder/name
    assert main(["init", str(root), "--demo", "toy"]) == 0
    (root/f"{name}.py").write_text(SOURCE.replace("LABEL", label).replace("SIZE", str(size)))
    (root/"settings.ini").write_text(SETTINGS.format(module=name, task=task, margins=MARGINS[task], least=least))
    (root/"contract.toml").write_text(CONTRACT.format(kind=kind or ("text" if task == "multiclass" else "number")))
    return root


def turn(root, now, capsys): # -> exit code and answer of one cycle
    capsys.readouterr()
    code = main(["cycle", "--now", now, "--root", str(root), "--json"])
    return code, json.loads(capsys.readouterr().out)


def left(root, run): return json.loads((root/"reports"/run/"record.json").read_text())


def page_text(root, run): # -> what the report says, and what its pictures say
    html = (root/"reports"/run/"report.html").read_text()
    return re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL) + " ".join(re.findall(r'alt="([^"]*)"', html))


def read(root, name): return open_workbench(root).artifacts.get(name)


NEVER = r"\bpositives?\b(?! is worse)|\blate\b|observed rate" # Words that mean nothing where the label is not a flag


def test_several_classes_go_all_the_way(tmp_path, capsys):
    root = bench(tmp_path, "several", "multiclass", "frame['what'] = way(frame, rng)")
    code, first = turn(root, "2024-03-01", capsys)
    assert (code, first["verdict"]) == (0, PASS), first["sentence"]
    code, second = turn(root, "2024-03-15", capsys)
    assert (code, second["verdict"]) == (0, PASS), second["sentence"]
    record = left(root, second["run"])
    e = from_json(Evaluation, record["evaluation"])
    assert e.task == "multiclass" and [name for name, _ in e.classes] == ["air", "rail", "road"] and e.unseen == () and set(e.difference) == {"log_loss", "brier", "error"}
    model = from_json(Model, json.loads(read(root, record["model"])))
    assert (model.task, model.classes, model.format) == ("multiclass", ("air", "rail", "road"), "retrain_nb/model@3")
    assert vet(read(root, record["model"])).outcome == PASS
    text = page_text(root, second["run"])
    assert re.findall(NEVER, text) == [] and "3 classes, the commonest" in text and "Share of" in text, re.findall(f".{{60}}(?:{NEVER}).{{20}}", text)
    again = reproduce(open_workbench(root), second["run"])
    assert again["verdict"] == "REPRODUCED", again["sentence"]
    assert [validate(open_workbench(root), one["run"])["differs"] for one in (first, second)] == [[], []] # Against the base rate, and against the champion


def test_a_number_with_a_trend_goes_all_the_way_and_the_trend_is_seen(tmp_path, capsys):
    root = bench(tmp_path, "hours", "regression", "frame['what'] = 20 + 0.1*day + 8*frame.load + 5*(frame.depot == 'D') + rng.gamma(1.0, 4.0, len(frame))")
    code, first = turn(root, "2024-03-01", capsys)
    assert (code, first["verdict"]) == (0, PASS), first["sentence"]
    code, second = turn(root, "2024-03-29", capsys)
    assert (code, second["verdict"]) == (0, PASS), second["sentence"]
    record = left(root, second["run"])
    e = from_json(Evaluation, record["evaluation"])
    assert e.task == "regression" and set(e.difference) == {"mae", "rmse"} and e.difference["mae"].high < 0 # The newer model has seen more of the trend
    model = from_json(Model, json.loads(read(root, record["model"])))
    assert (model.task, model.classes, model.format) == ("regression", (), "retrain_nb/model@3") and "\nobjective=regression_l1\n" in model.booster
    mae = next(leaf for part in record["verdict"]["parts"] for leaf in part.get("parts") or [part] if leaf["name"] == "mae")
    assert "(5% of the champion's" in mae["reason"] and mae["threshold"] == pytest.approx(0.05*e.rival["mae"].value)
    text = page_text(root, second["run"])
    assert re.findall(NEVER, text) == [] and "Mean of what" in text and "absolute error" in text, re.findall(f".{{60}}(?:{NEVER}).{{20}}", text)
    again = reproduce(open_workbench(root), second["run"])
    assert again["verdict"] == "REPRODUCED", again["sentence"]
    assert [validate(open_workbench(root), one["run"])["differs"] for one in (first, second)] == [[], []] # Against the base rate, and against the champion


@pytest.mark.parametrize("name, task, label, words", [
    ("stretch", "multiclass", "frame['what'] = np.where(day < 60, way(frame, rng), 'road')", "test rarest class: 0 rows"),
    ("fog", "multiclass", "frame['what'] = np.where((day > 55) & (frame.hour > 20), 'fog', way(frame, rng))", "training rarest class: 0 rows of the rarest class, at least 30 wanted; 1 of 4 classes have too few: `fog`"),
    ("still", "regression", "frame['what'] = 7.0", "training spread: 0 rows with another label than the commonest"),
    ("nothing", "regression", "frame['what'] = np.nan", "training rows: 0 rows")])
def test_too_little_to_judge_by_is_insufficient_and_named(tmp_path, capsys, name, task, label, words):
    root = bench(tmp_path, name, task, label)
    now = "2024-03-30" if name == "stretch" else "2024-03-04"
    code, answer = turn(root, now, capsys)
    assert (code, answer["verdict"]) == (4, INSUFFICIENT) and words in answer["sentence"] + json.dumps(answer["reasons"], ensure_ascii=False), answer["sentence"]


def test_two_hundred_classes_of_whole_numbers(tmp_path, capsys):
    root = bench(tmp_path, "many", "multiclass", "frame['what'] = ((frame.load + rng.normal(0, 0.2, len(frame))).rank(pct=True)*199.999).astype(int)", size=144, least=1, kind="number")
    (root/"settings.ini").write_text((root/"settings.ini").read_text().replace("rounds = 30", "rounds = 5").replace("num_leaves 7", "num_leaves 7, min_sum_hessian_in_leaf 1")) # With tiny leaves 200 classes overshoot
    code, answer = turn(root, "2024-03-29", capsys)
    amiss = {leaf.name: leaf.reason for leaf in from_json(Verdict, answer["reasons"][0]).leaves if leaf.outcome != PASS}
    assert (code, amiss) == (0, {}) # The label is made of the load and of noise: the load is no leak
    record = left(root, answer["run"])
    model = from_json(Model, json.loads(read(root, record["model"])))
    assert model.classes == tuple(range(200)) and record["evaluation"]["candidate"]["log_loss"]["value"] < np.log(200) - 0.3
    assert vet(read(root, record["model"])).outcome == PASS
    assert "200 classes" in page_text(root, answer["run"])


# --- What binary had before is as it was ---

def test_a_binary_recipe_and_record_hold_no_word_of_tasks():
    assert fixed_params({"rounds": 5}, 2, 3) == {"rounds": 5, "objective": "binary", "deterministic": True, "force_row_wise": True, "verbosity": -1, "num_threads": 2, "seed": 3}
    model = Model(booster="tree", view="v", encoding={}, target="late", cut="2024-01-01T00:00:00Z")
    assert set(as_json(model)) == {"booster", "view", "encoding", "target", "cut", "canary", "format"} and model.format == "retrain_nb/model@2"
    assert set(as_json(evaluate([0, 1, 1, 0], [0.1, 0.9, 0.4, 0.2], None, ["a", "a", "b", "b"]))) == {
        "rival_name", "rows", "unlabelled", "n", "positives", "base_rate", "days", "level", "candidate", "rival", "difference", "calibration", "reliability", "by_day"}
    text = SETTINGS.format(module="m", task="binary", margins="log_loss 0.02", least=5)
    assert set(policy(parse_settings(text))["source"]) == {"rows", "key", "time", "label", "label_time", "contract"}
    assert policy(parse_settings(text.replace("task = binary\n", ""))) == policy(parse_settings(text)) and parse_settings(text).source.task == "binary"
    assert set(TASKS) == set(TaskName.__args__)


def test_a_champion_of_another_task_is_no_rival():
    from retrain_nb.services.session import open_session
    book = open_workbench("")
    X, y = stream(200)
    booster = train(X, y["hours"], fixed_params({"rounds": 2}, 1, 0, "regression"))
    other = book.artifacts.put(canonical(as_json(Model(booster=booster, view="v", encoding={}, target="late", cut="2024-01-01T00:00:00Z", task="regression"))), "model")
    run = open_session(book, champion=other)
    with pytest.raises(SettingsError, match="the champion is a regression model"): run.rival(*run.split_rows(run.read()))


def test_a_label_that_may_not_be_seen_gives_no_classes(tmp_path):
    root = bench(tmp_path, "secret", "multiclass", "frame['what'] = way(frame, rng)")
    (root/"contract.toml").write_text(CONTRACT.format(kind="text") + 'tag = "granted"\n')
    book = open_workbench(root)
    with pytest.raises(SettingsError, match="tags the label `what`, and verdicts name classes"): book.freeze(book.newest(), book.newest())


# --- Models ---

def stream(n, seed=0): # -> features, and a label for each task
    rng = np.random.default_rng(seed)
    X = pd.DataFrame({"hour": rng.integers(0, 24, n).astype(float), "load": rng.gamma(4, 0.25, n).round(3), "depot": pd.Categorical.from_codes(rng.integers(-1, 9, n), list("ABCDEFGHI"))})
    odds = np.column_stack([X.hour/8, 2.0*(X.depot.cat.codes == 3), 2*X.load])
    return X, {"way": pd.Series(np.array(["air", "rail", "road"])[(odds + rng.gumbel(size=odds.shape)).argmax(1)]), "hours": 20 + X.hour + 9*X.load + rng.gamma(1, 4, n)}


LABEL = {"multiclass": "way", "regression": "hours"}


@pytest.fixture(scope="module", params=["multiclass", "regression"])
def model(request):
    X, y = stream(3000)
    label = y[LABEL[request.param]]
    booster = train(X, label, fixed_params({"rounds": 12, "num_leaves": 12}, 1, 0, request.param))
    return Model(booster=booster, view="v", encoding={}, target="y", cut="2024-01-01T00:00:00Z", canary=canary(booster), task=request.param, classes=class_list(label, request.param))


def test_the_questions_of_a_model_reach_every_leaf_of_every_class(model):
    import lightgbm

    from retrain_nb.stages.train import questions
    rows, booster = questions(model.booster), lightgbm.Booster(model_str=model.booster)
    leaves = booster.predict(rows, pred_leaf=True)
    assert leaves.shape[1] == 12*max(1, len(model.classes))
    assert [len(set(column)) for column in leaves.T] == [t["num_leaves"] for t in booster.dump_model()["tree_info"]]
    assert len(model.canary["scores"]) == 8


def test_of_12_damaged_models_none_that_passes_predicts_otherwise(model):
    from test_vetting import damage
    rng, (X, _) = np.random.default_rng(8), stream(2000, 1)
    damaged = [damage(model.booster.encode(), b"\n", trial, rng).decode("utf-8", errors="replace") for trial in range(12)]
    with ThreadPoolExecutor(2) as pool: verdicts = list(pool.map(lambda wrong: vet(canonical({**as_json(model), "booster": wrong}), seconds=30), damaged))
    right, passed = predict(model.booster, X, model.classes), [wrong for wrong, v in zip(damaged, verdicts) if v.outcome == PASS]
    print(f"{model.task}: {len(passed)} of 12 damaged models passed, and predict the same")
    assert all(np.array_equal(predict(wrong, X, model.classes), right) for wrong in passed)
    assert len(passed) < 6 # Most damage is no matter of taste


@pytest.mark.parametrize("change, words", [
    (lambda t: t.replace("objective=multiclass num_class:3", "objective=multiclass num_class:2").replace("objective=regression_l1", "objective=regression"), "does not agree on the number of classes|its objective is none"),
    (lambda t: t.replace("num_tree_per_iteration=", "num_tree_per_iteration=1"), "number of classes"), (lambda t: t.replace("objective=", "objective=poisson "), "none that we train for"),
    (lambda t: t.replace("num_class=", "num_class=2"), "number of classes")])
def test_a_head_that_speaks_of_something_else_is_refused(model, change, words):
    with pytest.raises(DataError, match=words): check_text(change(model.booster))


def test_a_round_with_a_tree_too_few_is_refused(model):
    if model.task != "multiclass": return
    head, sizes, rest = re.split(r"(\ntree_sizes=[^\n]+)", model.booster, maxsplit=1)
    last = rest.rindex("Tree=35\n")
    with pytest.raises(DataError, match="fewer trees than classes"): check_text(head + sizes.rsplit(" ", 1)[0] + rest[:last] + rest[rest.index("end of trees"):])


@pytest.mark.parametrize("change, words", [
    ({"task": "binary", "format": "retrain_nb/model@3"}, "is not for the task"), ({"format": "retrain_nb/model@2"}, "is not for the task"), ({"task": "ranking"}, "is not for the task"),
    ({"classes": ["air", "air", "road"]}, "classes are not those"), ({"classes": ["air", True, "road"]}, "classes are not those"), ({"classes": ["air"]}, "classes are not those"),
    ({"classes": ["a", "b", "c", "d"]}, "classes")])
def test_a_record_that_does_not_fit_its_text_fails(model, change, words):
    verdict = vet(canonical({**as_json(model), **change}))
    assert verdict.outcome == FAIL and re.search(words, verdict.reason), verdict.reason


def test_whatever_the_parameters_a_trained_model_keeps_the_grammar():
    X, y = stream(1500)
    rare = pd.Series(np.where(np.arange(1500) < 3, "fog", y["way"]))
    kinds = [{}, {"boosting": "dart"}, {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": .5}, {"use_quantized_grad": True}, {"data_sample_strategy": "goss"}, {"min_data_in_leaf": 1000},
             {"lambda_l1": 9., "extra_trees": True}]
    for task, label in (("multiclass", y["way"]), ("multiclass", rare), ("regression", y["hours"]), ("regression", y["hours"]*1e-9), ("regression", -y["hours"]*1e9)):
        for params in kinds: check_text(train(X, label, fixed_params({"rounds": 4, **params}, 1, 0, task)))


def test_threads_change_one_recorded_line_and_no_tree():
    X, y = stream(2000)
    for task, name in LABEL.items():
        one, two = (train(X, y[name], fixed_params({"rounds": 5, "feature_fraction": 0.6}, t, 0, task)).splitlines() for t in (1, 2))
        assert [(a, b) for a, b in zip(one, two) if a != b] == [("[num_threads: 1]", "[num_threads: 2]")] and len(one) == len(two)


@pytest.mark.parametrize("task, label, words", [
    ("multiclass", [None]*50, "50 of 50 labels are missing"), ("multiclass", ["a"]*50, "one class teaches nothing"), ("multiclass", [0.5, 1]*25, "name\\(s\\) no class"),
    ("multiclass", ["a", 1]*25, "some labels are texts"), ("multiclass", [], "no training rows"), ("regression", [7.0]*50, "nothing to learn"), ("regression", [1, np.inf]*25, "infinite"),
    ("regression", [1, 1e39]*25, "infinite"), ("regression", ["a", "b"]*25, "labels are missing"), ("regression", [1, np.nan]*25, "25 of 50 labels are missing")])
def test_labels_that_teach_nothing_are_refused_with_a_cure(task, label, words):
    X, _ = stream(len(label))
    with pytest.raises(DataError, match=words) as e: train(X, pd.Series(label, dtype=object), fixed_params({"rounds": 2}, 1, 0, task))
    assert e.value.cure


@pytest.mark.parametrize("labels", [["3", "1", "2"], [3, 1, 2], [3.0, 1.0, 2.0], pd.Categorical(["b", "a", "c"], categories=list("zcba")), pd.array([3, 1, 2], dtype="Int64"), [True, False, True]])
def test_classes_are_sorted_and_codes_find_them_again(labels):
    classes = class_list(labels)
    assert list(classes) == sorted(classes) and [classes[i] for i in class_codes(labels, classes)] == [c if isinstance(c, str) else int(c) for c in labels]


# --- Numbers ---

def days_of(n, k): return np.sort(np.random.default_rng(0).integers(0, k, n))


def test_metrics_equal_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, mean_squared_error
    rng = np.random.default_rng(0)
    p, y, day = rng.dirichlet([1, 2, 3, 1], 500), rng.choice(list("abcd"), 500), days_of(500, 9)
    e = evaluate(y, pd.DataFrame(p, columns=list("abcd")), base_rate(y, 500, "multiclass"), day, task="multiclass", rival_name="base rate")
    hot = (y[:, None] == np.array(list("abcd"))).astype(float)
    wanted = {"log_loss": log_loss(y, p, labels=list("abcd")), "brier": ((p - hot)**2).sum(1).mean(), "error": 1 - accuracy_score(y, np.array(list("abcd"))[p.argmax(1)])}
    assert {m: x.value for m, x in e.candidate.items()} == pytest.approx(wanted, rel=1e-12)
    a, b, z = rng.normal(size=(3, 500))
    e = evaluate(z, a, b, day, task="regression")
    assert e.difference["mae"].value == pytest.approx(mean_absolute_error(z, a) - mean_absolute_error(z, b), abs=1e-12)
    assert e.difference["rmse"].value == pytest.approx(mean_squared_error(z, a)**0.5 - mean_squared_error(z, b)**0.5, abs=1e-12)


def test_two_classes_are_the_binary_case():
    rng = np.random.default_rng(1)
    p, q, y, day = rng.uniform(0.05, 0.95, 400), rng.uniform(0.05, 0.95, 400), rng.integers(0, 2, 400), days_of(400, 8)
    frame = lambda s: pd.DataFrame({0: 1 - s, 1: s})
    one, two = evaluate(y, p, q, day), evaluate(y, frame(p), frame(q), day, task="multiclass")
    for low_high in ("low", "high"):
        assert getattr(one.difference["log_loss"], low_high) == pytest.approx(getattr(two.difference["log_loss"], low_high), rel=1e-10)
        assert 2*getattr(one.difference["brier"], low_high) == pytest.approx(getattr(two.difference["brier"], low_high), rel=1e-10)


def test_the_order_and_the_number_of_columns_do_not_matter():
    rng = np.random.default_rng(2)
    y, day = rng.choice(list("abc"), 300), days_of(300, 8)
    p, q = (pd.DataFrame(rng.dirichlet([2, 1, 1], 300), columns=list("abc")) for _ in "pq")
    one = evaluate(y, p, q, day, task="multiclass")
    for other in (q[["c", "a", "b"]], q.assign(d=0.0)):
        assert evaluate(y, p, other, day, task="multiclass").difference["log_loss"] == one.difference["log_loss"]


def test_a_class_nobody_learned_is_counted_and_said():
    y, day = np.array(["a"]*60 + ["b"]*36 + ["new"]*4), np.arange(100) % 10
    p, q = (pd.DataFrame({"a": s, "b": 1 - s}) for s in (np.full(100, 0.6), np.full(100, 0.5)))
    e = evaluate(y, p, q, day, task="multiclass")
    assert e.n == 100 and e.unseen == ("new",) and dict(e.classes)["new"] == 4 and "4 of class(es) that the candidate never saw (`new`)" in e._repr_markdown_()
    assert e.candidate["log_loss"].value > 0.04*34 and e.candidate["error"].value == pytest.approx(0.4)
    verdict = sanity(p.assign(a=np.linspace(0.2, 0.8, 100)).assign(b=lambda f: 1 - f.a), y, "multiclass")
    assert verdict.outcome == INSUFFICIENT and "4 of classes that the candidate never saw: `new`" in verdict.reason


def test_the_interval_of_a_difference_of_roots_covers():
    rng, trials, hits, day = np.random.default_rng(3), 500, 0, np.repeat(np.arange(14), 40)
    truth = (1 + 1 + 0.5)**0.5 - (1 + 1)**0.5 # Storms of a day, own noise, and half of it again for the worse model
    for _ in range(trials):
        y = rng.normal(size=14)[day] + rng.normal(size=560)
        e = evaluate(y, rng.normal(0, 0.5**0.5, 560), np.zeros(560), day, 0.9, task="regression").difference["rmse"]
        hits += e.low <= truth <= e.high
    assert 0.9 - 3*(0.09/trials)**0.5 <= hits/trials <= 0.9 + 3*(0.09/trials)**0.5, hits/trials


def test_the_line_is_least_squares_with_the_sandwich_of_days():
    rng, day = np.random.default_rng(4), days_of(300, 12)
    p = rng.normal(1e6, 10, 300)
    y = 5 + 0.7*p + rng.normal(size=12)[day] + rng.normal(size=300)
    x = np.column_stack([np.ones(300), p - 1e6]) # Shifted, so that the textbook's formula can be computed
    bread = np.linalg.inv(x.T @ x)
    beta = bread @ x.T @ y
    scores = np.stack([(x*(y - x @ beta)[:, None])[day == d].sum(0) for d in range(12)])
    error = np.diag(bread @ (12/11*scores.T @ scores) @ bread)**0.5
    found = line(y, p, day, 0.9)
    assert found["slope"].value == pytest.approx(beta[1], rel=1e-9) and (found["slope"].high - found["slope"].low)/2 == pytest.approx(1.795884818704*error[1], rel=1e-8)
    assert line(y, y*0 + 3, day, 0.9) == {} and sum(b.n for b in means(y, p, 0.9)) == 300
    a, b = line(y, p, day, 0.9), line(y + 100, p + 100, day, 0.9)
    assert a["slope"].high == pytest.approx(b["slope"].high, rel=1e-8)


@pytest.mark.parametrize("task, score, words", [
    ("regression", [1, np.nan, 3], "1 of 3 values in candidate are missing or infinite"), ("regression", [1, np.inf, 3], "missing or infinite"), ("regression", [[1], [2], [3]], "candidate"),
    ("multiclass", pd.DataFrame({"a": [0.5, np.nan, 0.5], "b": [0.5]*3}), "1 of 3 values"), ("multiclass", pd.DataFrame({"a": [0.5]*3, "b": [0.6]*3}), "3 of 3 values"),
    ("multiclass", pd.DataFrame({"a": [1.5]*3, "b": [-0.5]*3}), "3 of 3 values"), ("multiclass", np.full((3, 2), 0.5), "no column for each class")])
def test_no_number_comes_from_a_score_that_is_missing(task, score, words):
    with pytest.raises(DataError, match=words): evaluate([1, 2, 3] if task == "regression" else ["a", "b", "a"], score, None, [1, 2, 3], task=task)


@pytest.mark.parametrize("task, y, score", [
    ("regression", [np.nan]*4, [1.0]*4), ("regression", [], []), ("regression", [3.0]*4, [3.0]*4), ("regression", [1, 2, 3, 4], [2.0]*4), ("regression", [1], [2.0]),
    ("multiclass", [None]*4, pd.DataFrame({"a": [0.5]*4, "b": [0.5]*4})), ("multiclass", ["a"]*4, pd.DataFrame({"a": [1.0]*4, "b": [0.0]*4})), ("multiclass", ["z"]*4, pd.DataFrame({"a": [1.0]*4, "b": [0.0]*4})),
    ("multiclass", [], pd.DataFrame({"a": [], "b": []}))])
def test_degenerate_data_gives_absence_and_never_nan(task, y, score):
    e = evaluate(y, score, score, range(len(y)), task=task)
    assert from_json(Evaluation, json.loads(json.dumps(as_json(e), allow_nan=False))) == e and isinstance(e._repr_markdown_(), str)


# --- Gates ---

@pytest.mark.parametrize("task, score, y, outcome, words", [
    ("regression", [1e6, -3, 2], [1, 2, 3], PASS, "checks passed"), ("regression", [1, np.nan, 2], [1, 2, 3], FAIL, "1 of 3 scores are missing"), ("regression", [2, 2, 2], [1, 2, 3], FAIL, "1 different score"),
    ("regression", [1, 2, 3], [5, 5, 5], INSUFFICIENT, "all 5"), ("regression", [1, 2, 3], [np.nan]*3, INSUFFICIENT, "no label is known"), ("regression", [1, 2], [1, 2, 3], FAIL, "shape (2,)"),
    ("regression", [1, 2, 3], [1, np.inf, 3], FAIL, "1 of 3 labels are infinite"), ("regression", ["a", "b"], [1, 2], INSUFFICIENT, "crashed"),
    ("multiclass", pd.DataFrame({"a": [0.2, 0.3], "b": [0.8, 0.7]}), ["a", "b"], PASS, "checks passed"), ("multiclass", pd.DataFrame({"a": [0.2, 0.2], "b": [0.8, 0.8]}), ["a", "b"], FAIL, "1 different score"),
    ("multiclass", pd.DataFrame({"a": [0.2, 0.3], "b": [0.8, 0.6]}), ["a", "b"], FAIL, "sums: 1 of 2"), ("multiclass", pd.DataFrame({"a": [0.2, 1.3], "b": [0.8, -0.3]}), ["a", "b"], FAIL, "range: 1 of 2"),
    ("multiclass", [0.1, 0.2], ["a", "b"], FAIL, "length"), ("multiclass", pd.DataFrame({"a": [0.2, 0.3], "b": [0.8, 0.7]}), ["a", "a"], INSUFFICIENT, "all a"),
    ("multiclass", pd.DataFrame({"a": [0.2, 0.3], "b": [0.8, 0.7]}), [None, None], INSUFFICIENT, "no label is known"),
    ("multiclass", np.array([[0.2, 0.8], [0.3, 0.7]]), ["a", "b"], INSUFFICIENT, "never saw"), ("ranking", [0.1, 0.2], [0, 1], INSUFFICIENT, "no task `ranking`")])
def test_sanity_by_task(task, score, y, outcome, words):
    verdict = sanity(score, y, task)
    assert verdict.outcome == outcome and words in verdict.reason, verdict.reason


def test_data_health_counts_by_task():
    day, p = np.arange(200) % 10, GatePolicy(min_rows=100, min_positives=20)
    ways = np.array(["a"]*100 + ["b"]*85 + ["c"]*15)
    assert "training rarest class: 15 rows of the rarest class, at least 20 wanted; 1 of 3 classes have too few: `c`" in data_health(ways, day, ways, day, p, "multiclass").reason
    assert data_health(ways[:185], day[:185], ways[:185], day[:185], p, "multiclass").outcome == PASS
    zeros = np.where(np.arange(200) < 19, 5.0, 0.0) # Nearly always the same
    assert "test spread: 19 rows with another label" in data_health(np.arange(200.0), day, zeros, day, p, "regression").reason
    assert data_health(np.arange(200.0), day, np.arange(200.0), day, p, "regression").outcome == PASS
    assert data_health([], [], [], [], p, "multiclass").outcome == INSUFFICIENT == data_health([], [], [], [], p, "regression").outcome


@pytest.mark.parametrize("wrong", ["-1%", "1 %", "%", "nan%", "one", "1%%", None, ""])
def test_a_share_that_is_none_is_refused(wrong):
    with pytest.raises(SettingsError): GatePolicy(margins={"mae": wrong})


def test_200_classes_are_measured_in_a_moment():
    rng = np.random.default_rng(5)
    p, y = pd.DataFrame(rng.dirichlet(np.ones(200), 20_000)), rng.integers(0, 200, 20_000)
    start = time.process_time()
    e = evaluate(y, p, p, days_of(20_000, 28), task="multiclass")
    assert e.n == 20_000 and time.process_time() - start < 3 # About 0.3 s
    assert influence("error", y, p.to_numpy())[0] == pytest.approx(0.995, abs=0.003)
