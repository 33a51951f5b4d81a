"""What is kept of a dirty tree, and what must never be: real repositories, real git."""
import json
import os
import subprocess
import sys

import pytest

from retrain_nb.digest import digest
from retrain_nb.records import RetrainError
from retrain_nb.stores import origin


def git(root, *words):
    return subprocess.run(["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.com", *words], check=True, capture_output=True).stdout


@pytest.fixture
def tree(tmp_path):
    "A repository with one commit: code, data, a notebook, settings, and a file that git ignores"
    root = tmp_path/"work"
    (root/"airline").mkdir(parents=True)
    cell = {"cell_type": "code", "source": ["a = 1"], "metadata": {}, "execution_count": 1, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["Ada, 36"]}]}
    for name, text in {"airline/feed.py": "days = 90\n", "rows.csv": "name,age\nAda,36\n", "settings.ini": "[workbench]\nname = x\n", ".gitignore": ".env\n*.secret\n",
                       "look.ipynb": json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})}.items(): (root/name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    (root/".env").write_text("TOKEN=hunter2\n")
    return root


def changes(root, *without):
    commit, dirty, what = origin.repository(root, without)
    assert digest(what) == dirty
    return json.loads(what), what


def test_a_clean_tree_has_a_commit_and_nothing_else(tree):
    commit, dirty, what = origin.repository(tree)
    assert (commit, dirty, what) == (git(tree, "rev-parse", "HEAD").decode().strip(), "", b"")


def test_the_patch_that_was_kept_gives_the_tree_back(tree, tmp_path):
    (tree/"airline"/"feed.py").write_text("days = 91\n# größer\n")
    git(tree, "mv", "airline/feed.py", "airline/source.py")
    kept, _ = changes(tree)
    other = tmp_path/"other"
    git(tmp_path, "clone", "-q", str(tree), str(other))
    (tmp_path/"patch").write_text(kept["patch"])
    git(other, "apply", str(tmp_path/"patch"))
    assert not (other/"airline"/"feed.py").exists()
    assert (other/"airline"/"source.py").read_text() == (tree/"airline"/"source.py").read_text()
    assert kept["files"]["airline/feed.py"] == "" and len(kept["files"]["airline/source.py"]) == 64


def test_no_row_no_password_and_nothing_ignored_is_kept(tree):
    (tree/"rows.csv").write_text("name,age\nGrace,85\n")
    (tree/"settings.ini").write_text("[workbench]\nname = x\ndatabase = postgresql://u:hunter3@h/db\n")
    nb = json.loads((tree/"look.ipynb").read_text())
    nb["cells"][0] |= {"source": ["a = 2"], "outputs": [{"output_type": "stream", "name": "stdout", "text": ["Barbara, 71"]}]}
    (tree/"look.ipynb").write_text(json.dumps(nb))
    (tree/"fresh.csv").write_text("Katherine\n")
    (tree/"fresh.secret").write_text("hunter4\n")
    kept, raw = changes(tree)
    assert sorted(kept["files"]) == ["fresh.csv", "look.ipynb", "rows.csv", "settings.ini"]
    assert kept["cells"] == {"look.ipynb": ["a = 2"]} and kept["patch"] == ""
    for word in ("hunter", "Ada", "Grace", "Barbara", "Katherine", ".env", "secret"): assert word.encode() not in raw, word


def test_a_byte_in_any_file_that_differs_is_another_digest(tree):
    (tree/"rows.csv").write_text("name,age\nAda,37\n")
    first = origin.repository(tree)[1]
    (tree/"rows.csv").write_text("name,age\nAda,38\n")
    assert first and origin.repository(tree)[1] not in ("", first)


def test_what_we_write_ourselves_is_no_change_of_the_user(tree):
    for name in (".retrain/ledger.db", "reports/run/report.html"):
        (tree/name).parent.mkdir(parents=True)
        (tree/name).write_text("x")
    assert origin.repository(tree, (".retrain", "reports"))[1] == "" != origin.repository(tree)[1]
    assert list(changes(tree, ".retrain")[0]["files"]) == ["reports/run/report.html"]


def test_a_workbench_in_a_folder_of_a_repository_sees_code_changed_beside_it(tree):
    (tree/"bench").mkdir()
    (tree/"airline"/"feed.py").write_text("days = 91\n")
    kept, _ = changes(tree/"bench", ".retrain")
    assert list(kept["files"]) == ["airline/feed.py"] and "+days = 91" in kept["patch"]


def test_code_that_is_not_utf_8_is_left_to_its_digest_and_the_rest_is_kept(tree):
    (tree/"airline"/"old.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'Zürich'\n".encode("latin-1"))
    git(tree, "add", "airline/old.py")
    (tree/"airline"/"feed.py").write_text("days = 91\n")
    kept, _ = changes(tree)
    assert "+days = 91" in kept["patch"] and "old.py" not in kept["patch"] and len(kept["files"]["airline/old.py"]) == 64
    assert "Zürich" in origin.sources(tree, ["airline"])["airline/old.py"]


def test_odd_names_are_named(tree):
    for raw in (b"caf\xe9.csv", "naïve \"x\"\n.csv".encode()): (tree/os.fsdecode(raw)).write_text("1\n")
    kept, _ = changes(tree)
    assert len(kept["files"]) == 2 and all(len(sha256) == 64 for sha256 in kept["files"].values())


def test_a_repository_that_git_cannot_read_is_no_clean_tree(tree):
    (tree/".git"/"index").write_bytes(b"not an index")
    with pytest.raises(RetrainError, match="has no answer"): origin.repository(tree)


def refused(root, said):
    with pytest.raises(RetrainError, match=f"has no answer.*{said}"): origin.repository(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_repository_of_another_user_is_not_taken_for_none(tree):
    for path in (tree, *tree.rglob("*")): os.chown(path, 12345, -1, follow_symlinks=False)
    refused(tree, "dubious ownership")


def test_a_damaged_repository_or_one_without_git_is_not_taken_for_none(tree, monkeypatch):
    head = (tree/".git"/"HEAD").read_bytes()
    (tree/".git"/"HEAD").write_bytes(b"garbage")
    for folder in (tree, tree/"airline"): refused(folder, "not a git repository")
    (tree/".git"/"HEAD").write_bytes(head)
    monkeypatch.setenv("PATH", "/nowhere")
    refused(tree, "git")


def test_without_a_commit_there_is_none(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path/"feed.py").write_text("days = 90\n")
    assert origin.repository(tmp_path) == ("", "", b"")


def test_modules_are_followed_through_functions_and_packages_and_round_in_circles(tmp_path):
    for name, text in {"a.py": "def f():\n    import b.deep\n", "b/__init__.py": "", "b/deep.py": "from . import other\nimport a", "b/other.py": "from c import x",
                       "c.py": "x = (", "unused.py": "", "retrain_nb/__init__.py": ""}.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text)
    assert list(origin.sources(tmp_path, ["a", "numpy", "retrain_nb.demo.toy"], ["import nothing"])) == ["a.py", "b/__init__.py", "b/deep.py", "b/other.py", "c.py"]


@pytest.mark.parametrize("names", [["GIT_DIR"], ["GIT_WORK_TREE"], ["GIT_DIR", "GIT_WORK_TREE"], ["GIT_INDEX_FILE"], ["GIT_OBJECT_DIRECTORY"], ["GIT_CEILING_DIRECTORIES"], ["GIT_LITERAL_PATHSPECS"]])
def test_what_a_hook_of_another_repository_left_in_the_environment_changes_no_answer(tree, tmp_path, monkeypatch, names):
    other = tmp_path/"other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "of another")
    (tree/"airline"/"feed.py").write_text("days = 91\n")
    before = origin.repository(tree/"airline", ["store"])
    assert before[0] == git(tree, "rev-parse", "HEAD").decode().strip() and b"days = 91" in before[2]
    places = {"GIT_DIR": other/".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": other/".git"/"index", "GIT_OBJECT_DIRECTORY": other/".git"/"objects",
              "GIT_CEILING_DIRECTORIES": tree, "GIT_LITERAL_PATHSPECS": "1"}
    for name in names: monkeypatch.setenv(name, str(places[name]))
    assert origin.repository(tree/"airline", ["store"]) == before


def test_the_environment_is_the_same_once_setuptools_was_imported():
    tell = "import sys; from retrain_nb.stores.origin import environment; before = environment(); import setuptools; assert any(p.endswith('_vendor') for p in sys.path); print(before == environment())"
    done = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
