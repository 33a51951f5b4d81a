# The ledger: one append-only table
#
# A database from before there were migrations has this very table; it is adopted as it stands, rows and all.
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None

SEAT_BELT = {
    "sqlite": ["CREATE TRIGGER entries_keep_{what} BEFORE {what} ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"],
    "postgresql": ["CREATE OR REPLACE FUNCTION entries_keep() RETURNS trigger AS $$ BEGIN "
                   "RAISE EXCEPTION 'the ledger is append-only'; END $$ LANGUAGE plpgsql",
                   "CREATE TRIGGER entries_keep_{what} BEFORE {what} ON entries FOR EACH STATEMENT EXECUTE FUNCTION entries_keep()"]}


def upgrade():
    if sa.inspect(op.get_bind()).has_table("entries"): return
    op.create_table("entries",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("key", sa.Text, nullable=False, unique=True),
        sa.Column("at", sa.String(40), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("leaf", sa.String(64), nullable=False))
    for what in ("UPDATE", "DELETE"):
        for text in SEAT_BELT[op.get_bind().dialect.name]: op.execute(text.format(what=what))
