"Transactions as tests want them"
from contextlib import contextmanager

from retrain_nb.stores import ledger


@contextmanager
def undone(engine):
    "A transaction as any other, but for its end: nothing stays, so that the next example of Hypothesis begins with an empty ledger too"
    with engine.begin() as c:
        assert ledger.entries(c) == []
        yield c
        c.rollback()
