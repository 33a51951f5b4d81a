"""The README says nothing that was not run: its commands, in its order, on the real flights."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def shown():
    "The `retrain-nb` commands of the README's shell blocks, in order, and what makes a file for them"
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT/"README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [["sh", "-c", line] if line.startswith("printf ") else shlex.split(line) for line in lines if line.startswith(("retrain-nb ", "python -c ", "printf ")) and line != "retrain-nb serve"]


CODES = {"landed.csv": 3} # One of its rows is refused, on purpose


def run(words, cwd):
    return subprocess.run([str(BIN/words[0]) if words[0] != "sh" else "sh", *words[1:]], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def flights(tmp_path_factory):
    "What `make demo` makes, in a folder of its own"
    root = tmp_path_factory.mktemp("readme")/"flights"
    demo = [shlex.split(line) for line in re.findall(r"\$\(BIN\)/(retrain-nb .*)", (ROOT/"Makefile").read_text())]
    assert [words[1] for words in demo] == ["init", "cycle"]
    root.mkdir()
    for words in demo:
        done = run(words, root)
        assert done.returncode == 0, done.stdout + done.stderr
    return root


def test_the_demo_names_a_champion_its_snapshot_its_verdicts_and_its_report(flights):
    now = json.loads(run(["retrain-nb", "status", "--json"], flights).stdout)
    assert now["champion"]["snapshot"] and now["champion"]["verdict"]["outcome"] == "PASS" and now["last_cycle"]["verdict"] == "PASS"
    report = flights/now["report"]
    assert report.stat().st_size < 3_000_000 and (report.parent/"profile.html").stat().st_size < 4_000_000
    assert report.parent.name in (flights/"reports"/"index.html").read_text()


def test_every_command_of_the_readme_runs_in_its_order(flights):
    assert len(shown()) >= 5
    for words in shown():
        done = run(words, flights)
        assert done.returncode == (CODES.get(words[2], 0) if words[1] == "ingest" else 0), f"{' '.join(words)}:\n{done.stdout}{done.stderr}"


def test_the_readme_comes_from_its_notebook():
    words = [str(BIN/"jupyter"), "nbconvert", "--log-level", "ERROR", "--to", "markdown", "--stdout", str(ROOT/"nbs"/"index.ipynb")]
    made = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT/"README.md").read_text(), "run `make notebooks` and commit README.md"
