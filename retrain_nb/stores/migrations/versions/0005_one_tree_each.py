# SQLite keeps a table's rows in the order of an INTEGER key, and beside any other key a second tree
#
# Each tree that an entry touches is one more page to write, twice, before its commit is on the disk. So `entries` and `heads` are
# numbered by INTEGER, and `nodes` lies in the tree of its key. Every row is carried over as it stands: what was signed stays signed.
# PostgreSQL keeps its tables; there a BIGINT costs nothing.
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0005", "0004"

TABLES = {
    "entries": ("seq INTEGER NOT NULL PRIMARY KEY, kind VARCHAR(64) NOT NULL, key TEXT NOT NULL UNIQUE, at VARCHAR(40) NOT NULL, "
                "body TEXT NOT NULL, leaf VARCHAR(64) NOT NULL", ""),
    "heads": ("size INTEGER NOT NULL PRIMARY KEY, note TEXT NOT NULL", ""),
    "nodes": ("level INTEGER NOT NULL, idx BIGINT NOT NULL, hash VARCHAR(64) NOT NULL, PRIMARY KEY (level, idx)", "WITHOUT ROWID")}


def upgrade():
    if op.get_bind().dialect.name != "sqlite": return
    op.execute("DROP INDEX entries_kind")
    for table, (columns, kept) in TABLES.items():
        belts = op.get_bind().execute(sa.text("SELECT name, sql FROM sqlite_master WHERE type='trigger' AND tbl_name=:table"), {"table": table}).all()
        for name, _ in belts: op.execute(f"DROP TRIGGER {name}")
        op.execute(f"ALTER TABLE {table} RENAME TO {table}_before")
        op.execute(f"CREATE TABLE {table} ({columns}) {kept}")
        op.execute(f"INSERT INTO {table} SELECT * FROM {table}_before ORDER BY 1")
        op.execute(f"DROP TABLE {table}_before")
        for _, sql in belts: op.get_bind().exec_driver_sql(sql)
    op.execute("CREATE INDEX entries_kind ON entries (kind, seq)")
