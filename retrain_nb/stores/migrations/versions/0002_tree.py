# The tree over the ledger, the leases, and what was delivered
#
# `nodes` and `heads` stay empty here: the ledger fills them from its entries. Heads are signed, so they are as append-only as
# entries. PostgreSQL can also empty a table without deleting a row; that is refused from here on.
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"


def upgrade():
    op.create_table("nodes",
        sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("idx", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.String(64), nullable=False))
    op.create_table("heads",
        sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("note", sa.Text, nullable=False))
    op.create_table("leases",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.Text),
        sa.Column("until", sa.Text))
    op.create_table("deliveries",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("channel", sa.String(40), primary_key=True),
        sa.Column("at", sa.Text, nullable=False))
    op.create_index("entries_kind", "entries", ["kind", "seq"])
    lite = op.get_bind().dialect.name == "sqlite"
    does = "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END" if lite else "FOR EACH STATEMENT EXECUTE FUNCTION entries_keep()"
    for what in ("UPDATE", "DELETE"): op.execute(f"CREATE TRIGGER heads_keep_{what} BEFORE {what} ON heads {does}")
    if lite: return
    for table in ("entries", "heads"): op.execute(f"CREATE TRIGGER {table}_keep_TRUNCATE BEFORE TRUNCATE ON {table} {does}")
