"The frame: what a newcomer starts from. Lock, environment, bootstrap, commands and wheel agree with one another."
import ast
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rattler import MatchSpec
from rattler.exceptions import InvalidMatchSpecError

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text())
CONDA = yaml.safe_load((ROOT/"environment.yml").read_text())


@pytest.fixture
def bootstrap():
    "`bootstrap.py` as a module"
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT/"bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- The lock ---

def entries(text): # -> the entries of a lock, without comments, each as one line
    bare = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [" ".join(entry.split()) for entry in bare.replace("\\\n", " ").splitlines() if entry.strip()]


def flaws(text): # -> entries of a lock that are not a name, one exact version, perhaps a marker, and hashes
    entry = re.compile(r"[\w.-]+==[\w.!+]+( ; [^@]+?)?( --hash=sha256:[0-9a-f]{64})+")
    return [e for e in entries(text) if not entry.fullmatch(e) or "://" in e]


def pins(text): # -> name -> the versions pinned, usually one; two where they differ by Python
    found = {}
    for e in entries(text):
        name, version = re.match(r"([\w.-]+)==([^\s;]+)", e).groups()
        found.setdefault(canonicalize_name(name), []).append(version)
    return found


def declared(*extras): # -> what the project asks for, as requirements
    groups = [PROJECT["build-system"]["requires"], PROJECT["project"]["dependencies"]]
    return [Requirement(r) for group in groups+[PROJECT["project"]["optional-dependencies"][e] for e in extras] for r in group]


def unmet(requirements, text): # -> requirements that the lock does not pin to a version they allow
    pinned = pins(text)
    return [str(r) for r in requirements
            if not (versions := pinned.get(canonicalize_name(r.name))) or not all(r.specifier.contains(v) for v in versions)]


@pytest.mark.parametrize("lock", ["requirements.lock", "bootstrap.lock"])
def test_every_entry_of_a_lock_is_one_version_with_hashes_and_no_address(lock):
    text = (ROOT/lock).read_text()
    assert entries(text) and flaws(text) == []


@pytest.mark.parametrize("line", [
    "--index-url https://example.org/simple", "--find-links /opt/wheels", "numpy==2.3.5", "numpy>=2 --hash=sha256:"+"a"*64,
    "x @ https://example.org/x.whl --hash=sha256:"+"a"*64, "numpy==2.3.5 --hash=md5:"+"a"*32])
def test_a_flaw_in_a_lock_is_found(line):
    good = "y==1.0 ; python_version < '3.12' \\\n    --hash=sha256:"+"b"*64+"\n    # via z\n"
    assert flaws(good) == [] and flaws(good+line) == [line]


def test_the_lock_pins_all_that_the_project_declares():
    text = (ROOT/"requirements.lock").read_text()
    assert unmet(declared("demo", "dev"), text) == []
    assert unmet([Requirement("nosuch"), Requirement("pandas<2")], text) == ["nosuch", "pandas<2"]


def undeclared(folder, *extras): # -> libraries imported below `folder` that the project does not ask for
    trees = [ast.parse(p.read_text()) for p in folder.rglob("*.py")]
    names = {a.name for t in trees for n in ast.walk(t) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for t in trees for n in ast.walk(t) if isinstance(n, ast.ImportFrom) and not n.level}
    here = {"retrain_nb", "bench", *(p.stem for p in folder.rglob("*.py")), folder.name}
    tops = {name.partition(".")[0] for name in names}-set(sys.stdlib_module_names)-here
    asked, comes_from = {canonicalize_name(r.name) for r in declared(*extras)}, packages_distributions()
    return sorted(top for top in tops if not asked & {canonicalize_name(d) for d in comes_from.get(top, [top])})


@pytest.mark.parametrize("folder, extras", [("retrain_nb", ["demo"]), ("tests", ["demo", "dev"]), ("bench", ["demo", "dev"])])
def test_every_library_that_is_imported_is_declared(folder, extras):
    assert undeclared(ROOT/folder, *extras) == []


def test_an_undeclared_library_is_found(tmp_path):
    (tmp_path/"x.py").write_text("import os\ndef f():\n    from nosuch.thing import x\n    import numpy as np\n")
    assert undeclared(tmp_path) == ["nosuch"]


# --- environment.yml ---

def test_the_pip_part_of_the_conda_environment_is_the_lock():
    assert [d["pip"] for d in CONDA["dependencies"] if isinstance(d, dict)] == [["-r requirements.lock"]]
    assert set(CONDA) == {"name", "channels", "dependencies"}


def test_every_conda_spec_has_a_form_that_conda_reads():
    specs = [d for d in CONDA["dependencies"] if isinstance(d, str)]
    assert {MatchSpec(s, strict=True).name.normalized for s in specs} == {"python", "pip", "make"}
    for wrong in ("python =>3.11", "bad spec here !!"):
        with pytest.raises(InvalidMatchSpecError): MatchSpec(wrong, strict=True)


def test_all_agree_on_which_pythons(bootstrap):
    python = next(d for d in CONDA["dependencies"] if isinstance(d, str) and d.startswith("python "))
    ours = SpecifierSet(f">={'.'.join(map(str, bootstrap.OLDEST))},<{'.'.join(map(str, bootstrap.TOO_NEW))}")
    assert ours == SpecifierSet(PROJECT["project"]["requires-python"]) == SpecifierSet(python.partition(" ")[2])
    minors = {c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if c.startswith("Programming Language :: Python :: 3.")}
    assert minors == {f"3.{n}" for n in range(bootstrap.OLDEST[1], bootstrap.TOO_NEW[1])}


# --- bootstrap.py ---

def wheel(folder, name, version): # -> the SHA-256 of an empty wheel, made in `folder`
    path, info = folder/f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lot(folder, lock): # -> a folder with a `bootstrap.py` of its own, a lock and a project
    (folder/"bootstrap.py").write_text((ROOT/"bootstrap.py").read_text())
    (folder/"requirements.lock").write_text(lock)
    (folder/"pyproject.toml").write_text("[project]\nname = 'lot'\nversion = '0'\n")
    return folder


def call(folder, *args, **env): # Run the `bootstrap.py` of a lot, which finds packages in the folder `wheels` alone
    env = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder/"wheels"), **env}
    return subprocess.run([sys.executable, folder/"bootstrap.py", *args], env=env, capture_output=True, text=True)


def test_a_package_whose_hash_differs_is_refused_and_leaves_no_marker(tmp_path):
    (tmp_path/"wheels").mkdir()
    good, wrong = wheel(tmp_path/"wheels", "setuptools", "81.0.0"), wheel(tmp_path/"wheels", "tiny", "1.0")[::-1]
    house = lot(tmp_path, f"setuptools==81.0.0 \\\n    --hash=sha256:{good}\ntiny==1.0 \\\n    --hash=sha256:{wrong}\n")
    done = call(house, "--pip")
    assert done.returncode == 1 and "hash differs" in done.stderr and "tiny" in done.stderr
    site = next((house/".venv"/"lib").glob("python3*"))/"site-packages"
    assert (site/"setuptools-81.0.0.dist-info").exists() # The one whose hash is right went in
    assert not list(site.glob("tiny*")) and not (house/".venv"/".lock-sha256").exists()


def test_a_second_call_is_silent_and_takes_well_under_a_second(tmp_path, bootstrap):
    house = lot(tmp_path, (ROOT/"requirements.lock").read_text())
    (house/".venv"/"bin").mkdir(parents=True)
    (house/".venv"/"bin"/"python").symlink_to(sys.executable)
    bootstrap.LOCK, bootstrap.PROJECT, bootstrap.VENV = house/"requirements.lock", house/"pyproject.toml", house/".venv"
    (house/".venv"/".lock-sha256").write_text("\n".join(bootstrap.fingerprint())+"\n")
    start = time.monotonic()
    done = call(house)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and time.monotonic()-start < 1


def test_the_marker_fits_one_lock_one_project_one_python_and_one_place(tmp_path, bootstrap):
    house = lot(tmp_path, "x==1\n")
    bootstrap.LOCK, bootstrap.PROJECT, bootstrap.VENV = house/"requirements.lock", house/"pyproject.toml", house/".venv"
    first = bootstrap.fingerprint()
    assert first == bootstrap.fingerprint() and len(first) == 4
    bootstrap.LOCK.write_text("x==2\n")
    bootstrap.PROJECT.write_text("")
    bootstrap.VENV = house/"elsewhere"/".venv"
    assert [a.split()[0] for a, b in zip(first, bootstrap.fingerprint(), strict=True) if a != b] == ["lock", "place", "project"]


def test_another_python_is_refused_with_the_cure(bootstrap):
    bootstrap.OLDEST = (9, 9)
    with pytest.raises(SystemExit, match=r"needs 9\.9 to.*\n.*PYTHON=python3"): bootstrap.check_machine()


def test_bootstrap_runs_far_enough_on_an_old_python_to_say_so():
    ast.parse((ROOT/"bootstrap.py").read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("said, cause", [
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "hash differs"),
    ("Caused by: Failed to fetch: `https://pypi.org/simple/x/`", "cannot be reached"),
    ("NewConnectionError: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution", "cannot be reached"),
    ("OSError: [Errno 28] No space left on device", "disk is full"),
    ("something else", "lines above say why"),
])
def test_a_failure_names_its_cause(bootstrap, said, cause):
    with pytest.raises(SystemExit, match=cause): bootstrap.run("Trying", sys.executable, "-c", f"import sys; sys.exit({said!r})")


# --- Commands and the wheel ---

def test_every_make_target_is_explained_and_both_commands_build_the_environment_first():
    text = (ROOT/"Makefile").read_text()
    targets = dict(re.findall(r"^([a-z]+):(.*)$", text, re.MULTILINE))
    assert {"help", "demo", "test", "bench", "lock", "notebooks", "clean"} <= set(targets)
    assert [name for name, rest in targets.items() if "## " not in rest] == []
    assert [name for name in ("demo", "test", "bench", "notebooks") if targets[name].split()[0] != "env"] == []
    shown = subprocess.run(["make", "--silent", "-C", ROOT], capture_output=True, text=True).stdout
    assert all(f"make {name} " in shown for name in targets)


def test_the_build_machine_runs_the_two_commands_of_the_readme():
    script = ROOT/".ci"/"run"
    assert os.access(script, os.X_OK) and subprocess.run(["bash", "-n", script]).returncode == 0
    assert re.findall(r"^make (\w+)", script.read_text(), re.MULTILINE) == ["demo", "test"]


def test_the_top_of_the_house_is_as_promised():
    names = ["nbs", "retrain_nb", "reports", "tests", "environment.yml", "settings.ini", "pyproject.toml", "README.md", "LICENSE"]
    assert [name for name in names if not (ROOT/name).exists()] == []
    first = (ROOT/"settings.ini").read_text().splitlines()[0]
    assert first[0] in "#;" and "workbench" in first # Not the settings.ini of nbdev 2


def test_the_wheel_carries_modules_pages_and_templates(tmp_path):
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    house = tmp_path/"house"
    house.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "nbs", "retrain_nb"): # Links, for the build writes beside what it reads
        (house/name).symlink_to(ROOT/name)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=house, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = set(zipfile.ZipFile(tmp_path/done.stdout.split()[-1]).namelist())
    files = [p for p in (ROOT/"retrain_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {str(p.relative_to(ROOT)) for p in files}-held == set()
    assert {f"retrain_nb/pages/{p.name}" for p in (ROOT/"nbs"/"runs").glob("*.ipynb")}-held == set()
    assert "retrain_nb/pages/retrain.ipynb" in held


def test_the_root_of_this_repository_is_the_workbench_that_init_makes():
    demo = ROOT/"retrain_nb"/"demo"
    assert (ROOT/"settings.ini").read_text() == (demo/"flights.ini").read_text()
    assert (ROOT/"contract.toml").read_text() == (demo/"flights_contract.toml").read_text()
    assert "They belong to retrain_nb" in (ROOT/"settings.ini").read_text().splitlines()[0]
