# Why a receiver refused what it was told, if it did
#
# What was delivered before has no reason and needs none: it was taken.
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"


def upgrade():
    op.add_column("deliveries", sa.Column("why", sa.Text))
