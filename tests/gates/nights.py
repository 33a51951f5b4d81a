"""The page `retrain`, cell by cell in this process, on rows made up for the occasion: real stages, a real snapshot store, a real workbench.

What a kernel would add is a second, and nothing that a gate could see: `tests/test_loop.py` runs pages in kernels."""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from retrain_nb.faces.cli import main
from retrain_nb.records import Refusal, Verdict
from retrain_nb.stores.pages import check_parameters, read_cells, read_parameters

CHAMPION, CANDIDATE = "2024-03-01", "2024-03-22" # Moments: what either learns from ends two weeks before
CUT = pd.Timestamp("2024-03-08", tz="UTC")       # Where the candidate's training ends and its test begins
SOURCE = "import pandas as pd\ndef rows(): return pd.read_pickle({path!r})\n"
FEATURES = ["depot", "load", "rain", "hour", "weekday"]


def parcels(a_day=60, seed=7): # -> rows of a quarter that no spring disturbs, so that two honest models are about equal
    rng = np.random.default_rng(seed)
    due = pd.Series(pd.date_range("2024-01-01", periods=91*a_day, freq=pd.Timedelta(days=1)/a_day, tz="UTC", unit="us"))
    n = len(due)
    depot, load, rain = rng.integers(0, 5, n), rng.gamma(4.0, 0.25, n).round(3), rng.gamma(0.6, 1.5, n).round(2)
    odds = -1.6 + 0.9*(load - 1) + 0.4*rain + np.array([0.0, 0.3, -0.4, 1.1, 0.1])[depot]
    return pd.DataFrame({"parcel_id": [f"P{i:05d}" for i in range(n)], "due_time": due, "late": (rng.random(n) < 1/(1 + np.exp(-odds))).astype("float64"),
                         "known_time": due + pd.Timedelta("1D"), "depot": pd.Categorical.from_codes(depot, list("ABCDE")), "load": load, "rain": rain,
                         "hour": due.dt.hour.astype("float64"), "weekday": due.dt.dayofweek.astype("float64")})


def judging(frame): return (frame["due_time"] >= CUT).to_numpy() # -> which rows judge, or come later


def changed(column, before=None, after=None): # -> rows in which a column is another one in training, or from the test on
    frame = parcels()
    for change, where in ((before, ~judging(frame)), (after, judging(frame))):
        if change: frame[column] = frame[column].where(~where, change(frame))
    return frame


def rewrite(root, name, before, after): # A file of the workbench says something else
    text = (root/name).read_text()
    assert before in text, f"{before} is not in {name}"
    (root/name).write_text(text.replace(before, after))


def give(root, frame): # The source gives these rows from now on
    frame.to_pickle(root/"given.pkl")
    (root/"given.py").write_text(SOURCE.format(path=str(root/"given.pkl")))


@dataclass(frozen=True)
class Night:
    "How a run of the page ended"
    verdict:Verdict
    names:dict    # What the names of the page stood for at its end
    stopped:bool  # Whether it stopped before its end, on purpose
    @property
    def said(self): # -> the outcome, and the checks at the bottom that brought it about
        return self.verdict.outcome, {leaf.name for leaf in self.verdict.leaves if leaf.outcome == self.verdict.outcome}
    def of(self, name): # -> the verdict of one check
        return next(leaf for leaf in self.verdict.leaves if leaf.name == name)
    @property
    def model(self): # -> digest of the model that it kept
        return json.loads((self.names["run"].folder/"record.json").read_text())["model"]


def run_page(root, moment, champion="", swap=None, page="retrain"):
    "`swap` has, by name, what takes the place of a function of the page: a part that is broken"
    path, names = root/"nbs"/"runs"/f"{page}.ipynb", {}
    names |= check_parameters(read_parameters(path), {"root": str(root), "as_of": moment, "champion": champion})
    for cell in read_cells(path):
        if cell["cell_type"] != "code" or "parameters" in cell["tags"]: continue
        try: exec(compile(cell["source"], page, "exec"), names)
        except Refusal as e: return Night(e.verdict, names, True)
        names |= {name: part for name, part in (swap or {}).items() if name in names}
    return Night(names["verdict"], names, False)


def found_world(root): # A workbench whose rows lie beside it -> the model that learned from the ordinary ones
    assert main(["init", str(root), "--demo", "toy"]) == 0
    rewrite(root, "settings.ini", "retrain_nb.demo.toy:rows", "given:rows")
    rewrite(root, "settings.ini", "mode = offline", "mode = disabled")
    give(root, parcels())
    first = run_page(root, CHAMPION)
    assert first.verdict.outcome == "PASS", first.verdict.reason
    return first.model


def another(world, folder): # -> a copy of it
    return Path(shutil.copytree(world, folder))
