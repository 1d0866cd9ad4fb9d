"""Where the demo and the bench do their work: a server that is started and thrown away, or a schema of their own."""

import secrets
from contextlib import ExitStack
from typing import Any, NamedTuple

import click
from sqlalchemy import URL, Engine, create_engine, func, make_url, select, text
from sqlalchemy.exc import DBAPIError

from sqla_river import store
from sqla_river.cli.database import CONNECT_TIMEOUT, engine_for
from sqla_river.embedded import EmbeddedPostgres


class Ground(NamedTuple):
    """An engine whose tables stand in a schema that goes at the end, and words for where that is."""

    engine: Engine
    where: str


def prepare(url: URL | None, purpose: str, stack: ExitStack, **options: Any) -> Ground:
    """Start a server, or make a schema on the one that *url* names.

    Args:
        url: a server; None starts one.
        purpose: part of the schema's name.
        stack: takes what undoes all that is made here, before it is made.
        options: of the engine.
    """
    arguments: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT}
    if url is None:
        postgres = EmbeddedPostgres()
        stack.callback(postgres.stop)
        postgres.start()
        url = make_url(postgres.url())
        schema = "public"
        where = "a server of its own"
    else:
        schema = f"sqla_river_{purpose}_{secrets.token_hex(4)}"
        where = f"your server, in schema {schema}"
        if _make(url, schema, stack):
            arguments["prepare_threshold"] = None  # as `store.OwnConnection`: clients meet what others prepared
            where += ", through a pooler (no statement is prepared)"
    # The statements name the schema. A search_path in the startup parameter `options` is dropped without a word by a
    # PgBouncer with ignore_startup_parameters = options, and TRUNCATE then empties the user's own river_job.
    engine = create_engine(url, connect_args=arguments, execution_options=store.map_options(schema), **options)
    stack.callback(engine.dispose)
    return Ground(engine, where)


def own_schema(engine: Engine) -> str:
    """Where the tables of a ground stand, for SQL that is text: the map of schemas does not reach it."""
    schema: str = engine.get_execution_options()["schema_translate_map"][None]
    return schema


def server_version(engine: Engine) -> str:
    """As in ``18.4``."""
    with engine.connect() as connection:
        return str(connection.execute(text("SHOW server_version")).scalar_one().split()[0])


def _make(url: URL, schema: str, stack: ExitStack) -> bool:
    """Make *schema*, and say whether a pooler stands in between."""
    with engine_for(url).begin() as connection:
        raw: Any = connection.connection.dbapi_connection
        pooled: bool = connection.execute(select(func.pg_backend_pid() != raw.info.backend_pid)).scalar_one()
        stack.callback(_drop, url, schema)  # not sooner: where no server answers there is nothing to drop
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    return pooled


def _drop(url: URL, schema: str) -> None:
    try:
        # As it was made: `options` of ours would replace the URL's own, a role say, and some poolers refuse them.
        with engine_for(url).begin() as connection:
            connection.execute(text("SET LOCAL statement_timeout = '10s'"))
            connection.execute(text(f"DROP SCHEMA IF EXISTS {schema} CASCADE"))
    except DBAPIError as error:
        click.echo(f"could not drop the schema {schema}: {error.orig}; drop it by hand", err=True)
