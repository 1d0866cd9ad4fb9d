"""Where the demo and the bench do their work: a server that is started and thrown away, or a schema of their own."""

import secrets
from contextlib import ExitStack
from typing import Any, NamedTuple

import click
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from sqla_river.cli.database import CONNECT_TIMEOUT, engine_for
from sqla_river.embedded import EmbeddedPostgres


class Ground(NamedTuple):
    """An engine whose connections see nothing but a schema that goes at the end, and words for where that is."""

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
    if url is None:
        postgres = EmbeddedPostgres()
        stack.callback(postgres.stop)
        postgres.start()
        url = make_url(postgres.url())
        schema = "public"
        where = "a server of its own"
    else:
        schema = f"sqla_river_{purpose}_{secrets.token_hex(4)}"
        stack.callback(_drop, url, schema)
        with engine_for(url).begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {schema}"))
        where = f"your server, in schema {schema}"
    given = url.query.get("options", "")
    path = f"{given if isinstance(given, str) else ' '.join(given)} -csearch_path={schema}"
    engine = create_engine(url, connect_args={"connect_timeout": CONNECT_TIMEOUT, "options": path}, **options)
    stack.callback(engine.dispose)
    return Ground(engine, where)


def server_version(engine: Engine) -> str:
    """As in ``18.4``."""
    with engine.connect() as connection:
        return str(connection.execute(text("SHOW server_version")).scalar_one().split()[0])


def _drop(url: URL, schema: str) -> None:
    try:
        with engine_for(url, options="-cstatement_timeout=10s").begin() as connection:
            connection.execute(text(f"DROP SCHEMA IF EXISTS {schema} CASCADE"))
    except DBAPIError as error:
        click.echo(f"could not drop the schema {schema}: {error.orig}; drop it by hand", err=True)
