"Databases to test on: SQLite, and a PostgreSQL server that these tests start by themselves"
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

WITHOUT = "RETRAIN_NB_NO_POSTGRES"


def postgres_programs(): # -> the folder of `initdb` and `postgres`, newest version first; Debian keeps them off the PATH
    folders = [p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    folders.sort(key=lambda p: int(re.sub(r"\D", "", p.parent.name) or 0), reverse=True)
    if found := shutil.which("initdb"): folders.append(Path(found).resolve().parent)
    return next((p for p in folders if (p/"postgres").exists()), None)


def unprivileged(): # -> keywords for `subprocess`: PostgreSQL refuses to run as root
    if os.geteuid() != 0: return {}
    for name in ("postgres", "nobody"):
        try: user = pwd.getpwnam(name)
        except KeyError: continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "env": {**os.environ, "HOME": "/"}}
    return pytest.fail("no user `postgres` or `nobody` to run PostgreSQL as; make one, or do not test as root")


@pytest.fixture(scope="session")
def postgres_server():
    "A server of our own, on a socket in a temporary folder: real, with `fsync` on, and gone when the tests end"
    programs = postgres_programs()
    if programs is None and not os.environ.get("CI"): pytest.skip("no PostgreSQL here; `apt-get install postgresql` brings it, and CI always has it")
    if programs is None: pytest.fail("no PostgreSQL on this machine: apt-get install postgresql.")
    folder, who = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp")), unprivileged() # A short path: a socket's name holds 107 bytes
    if who: os.chown(folder, who["user"], who["group"])
    try:
        subprocess.run([programs/"initdb", "-D", folder/"data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions"],
                       cwd=folder, check=True, capture_output=True, text=True, **who)
        server = [programs/"pg_ctl", "-D", folder/"data", "-l", folder/"log", "-w", "-t", "60"]
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=on -c max_connections=60"
        if sys.platform == "linux": options += " -c recovery_init_sync_method=syncfs" # After a crash one call, not one for each of thousands of files
        def start(): subprocess.run([*server, "-o", options, "start"], cwd=folder, check=True, stdout=subprocess.DEVNULL, **who)
        def crash(): subprocess.run([*server, "-m", "immediate", "stop"], cwd=folder, check=True, stdout=subprocess.DEVNULL, **who)
        start()
        try: yield SimpleNamespace(address=f"postgresql+psycopg://postgres@/{{}}?host={folder}", start=start, crash=crash)
        finally: crash()
    finally: shutil.rmtree(folder)


NUMBERS = count(1)
ALONE = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request, tmp_path):
    "Makes an empty database at each call and gives its address, on one of the two kinds"
    if request.param == "sqlite":
        yield lambda: f"sqlite:///{tmp_path}/{next(NUMBERS)}.db"
        return
    if os.environ.get(WITHOUT) == "1": pytest.skip(f"{WITHOUT}=1: PostgreSQL is left untested")
    address = request.getfixturevalue("postgres_server").address.format("postgres")
    # One database, for one test after the other: who still holds a connection loses it, and what the last one made is put aside. A database
    # for each test has 300 files, to be made, synchronised at each crash, and removed
    run_on(address, ALONE, f"ALTER SCHEMA public RENAME TO before_{next(NUMBERS)}", "CREATE SCHEMA public")
    def make(): # The first is the database itself, each further one a schema in it, which is as good as a database and made at once
        if not (n := next(numbers)): return address
        run_on(address, f"CREATE SCHEMA s{n}_of_{test}")
        return f"{address}&options=-c%20search_path%3Ds{n}_of_{test}"
    numbers, test = count(), next(NUMBERS)
    yield make


def run_on(url, *statements):
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as c:
        for statement in statements: c.exec_driver_sql(statement)
    engine.dispose()


@pytest.fixture
def database_url(new_database):
    "The address of one empty database"
    return new_database()


@pytest.fixture(scope="session")
def first_night(tmp_path_factory):
    "A toy workbench after its first cycle, on 1 March 2024, without profile and mirror, which have tests of their own. To be read, or copied"
    from retrain_nb.faces.cli import main
    root = tmp_path_factory.mktemp("first")/"parcels"
    assert main(["init", str(root), "--demo", "toy"]) == 0
    text = (root/"settings.ini").read_text().replace("mode = offline", "mode = disabled")
    (root/"settings.ini").write_text(text + "\n[run]\nprofile_rows = 0\n")
    assert main(["cycle", "--now", "2024-03-01", "--root", str(root)]) == 0
    return root


@pytest.fixture
def small_settings():
    "The fewest settings that are settings"
    return """
[workbench]
name = flights
[source]
rows = airline.feed:rows
key = flight_id
time = event_time
label = disrupted
label_time = label_time
[features]
view = airline.feed:view
[gates]
margins = log_loss 0.01, auc 0.01
"""


def pytest_terminal_summary(terminalreporter):
    "A table of the error rates that tests have recorded with `record_property`, whichever process they ran in"
    rates = [value for reports in terminalreporter.stats.values() for r in reports if getattr(r, "when", "") == "call" for name, value in r.user_properties if name == "rate"]
    if not rates: return
    terminalreporter.section("error rates")
    terminalreporter.write_line(f"{'':<76}{'rate':>7}  {'accepted':<15}{'repetitions':>12}{'seed':>6}")
    for name, rate, low, high, reps, seed in rates: terminalreporter.write_line(f"{name:<76}{rate:>7.3f}  {low:>6.3f} to {high:<6.3f}{reps:>10,}{seed:>6}")
