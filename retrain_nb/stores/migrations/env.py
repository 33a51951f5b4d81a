"Alembic comes in here, called by `retrain_nb.stores.database`, which brings the connection and has begun its transaction"
from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
