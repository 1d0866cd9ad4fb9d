"""What the commands share: options that name a database, and how its errors are told. No password is ever printed."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Final, TypeVar

import click
from sqlalchemy import URL, Engine, NullPool, create_engine
from sqlalchemy.exc import DBAPIError

from sqla_river.errors import InvalidOptionError, RiverError
from sqla_river.options import check_schema
from sqla_river.urls import parse_url

CONNECT_TIMEOUT: Final = 10
"""Seconds; libpq's own is none."""
F = TypeVar("F", bound=Callable[..., Any])


URL_SOURCES: Final = ("SQLA_RIVER_DATABASE_URL", "DATABASE_URL")


def parse_schema(_ctx: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """A schema that River's channels can carry."""
    try:
        return check_schema(value)
    except InvalidOptionError as error:
        raise click.BadParameter(str(error)) from error


def database_option(*, required: bool, meaning: str) -> Callable[[F], F]:
    """`--database-url`, then SQLA_RIVER_DATABASE_URL, at last DATABASE_URL."""

    def parse(_ctx: click.Context, _option: click.Parameter, value: str | None) -> URL | None:
        if value is None and required:
            raise click.UsageError(f"name a database: by --database-url, or by {' or '.join(URL_SOURCES)}")
        try:
            return None if value is None else parse_url(value)
        except InvalidOptionError as error:
            raise click.BadParameter(str(error)) from None

    return click.option(
        "--database-url",
        "url",
        metavar="URL",
        callback=parse,
        envvar=list(URL_SOURCES),
        show_envvar=True,
        help=meaning,
    )


def schema_option(command: F) -> F:
    """`--schema`, then SQLA_RIVER_SCHEMA."""
    return click.option(
        "--schema",
        metavar="NAME",
        callback=parse_schema,
        envvar="SQLA_RIVER_SCHEMA",
        show_envvar=True,
        help="Where the tables stand; the first schema of the search_path unless said.",
    )(command)


@contextlib.contextmanager
def told() -> Generator[None, None, None]:
    """Tell our errors and the database's in a line each, without a traceback; they end the command with exit code 1,
    with 2 where what was given cannot be.
    """
    try:
        yield
    except InvalidOptionError as error:
        raise click.UsageError(str(error)) from error
    except RiverError as error:
        raise click.ClickException(str(error)) from error
    except DBAPIError as error:
        raise click.ClickException(f"the database says: {str(error.orig).strip()}") from error


def engine_for(url: URL) -> Engine:
    """An engine without a pool, for a command that ends soon."""
    return create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": CONNECT_TIMEOUT})
