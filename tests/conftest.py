"Databases to test on: SQLite, and a PostgreSQL server that these tests start by themselves"
import os
import pwd
import re
import shutil
import subprocess
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
        def start(): subprocess.run([*server, "-o", options, "start"], cwd=folder, check=True, stdout=subprocess.DEVNULL, **who)
        def crash(): subprocess.run([*server, "-m", "immediate", "stop"], cwd=folder, check=True, stdout=subprocess.DEVNULL, **who)
        start()
        try: yield SimpleNamespace(address=f"postgresql+psycopg://postgres@/{{}}?host={folder}", start=start, crash=crash)
        finally: crash()
    finally: shutil.rmtree(folder)


NUMBERS = count(1)


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request, tmp_path):
    "Makes an empty database at each call and gives its address, on one of the two kinds"
    if request.param == "sqlite":
        yield lambda: f"sqlite:///{tmp_path}/{next(NUMBERS)}.db"
        return
    if os.environ.get(WITHOUT) == "1": pytest.skip(f"{WITHOUT}=1: PostgreSQL is left untested")
    server, name = request.getfixturevalue("postgres_server").address, f"test_{next(NUMBERS)}"
    run_on(server.format("postgres"), f"CREATE DATABASE {name}") # Not dropped: that would take longer than the test, and the server goes anyway
    def make(): # The first is the database itself, each further one a schema in it, which is as good as a database and made at once
        n = next(numbers)
        if n == 0: return server.format(name)
        run_on(server.format(name), f"CREATE SCHEMA s{n}")
        return f"{server.format(name)}&options=-c%20search_path%3Ds{n}"
    numbers = count()
    yield make


def run_on(url, statement):
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as c: c.exec_driver_sql(statement)
    engine.dispose()


@pytest.fixture
def database_url(new_database):
    "The address of one empty database"
    return new_database()
