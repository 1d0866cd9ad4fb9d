"""How Alembic reaches the database, and what it compares."""

import os
from logging.config import fileConfig

from alembic import context
from sqlalchemy import create_engine, pool

import sqla_river_alembic
from bookshop.models import Base

if context.config.config_file_name is not None:
    fileConfig(context.config.config_file_name, disable_existing_loggers=False)

url = os.environ["DATABASE_URL"]
plugins = ["alembic.autogenerate.*", "sqla_river"]
river = {"schema": "river"}


def run_offline() -> None:
    """For ``--sql``."""
    context.configure(url=url, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """For everything else."""
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection, sqla_river_alembic.lock(connection):
        context.configure(
            connection=connection, target_metadata=Base.metadata, autogenerate_plugins=plugins, sqla_river=river
        )
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
