"""Errors of the database that the fetch need not share."""

from typing import Final

from sqlalchemy.exc import DBAPIError

from sqla_river.logs import Log, first_line
from sqla_river.store import OwnConnection

log: Final = Log(__name__)


def spare(own: OwnConnection, error: DBAPIError, what: str) -> None:
    """Say that *what*, if anything, failed with *error* on *own*, and go on: jobs can be fetched nevertheless.

    Raises:
        DBAPIError: *error*, which broke the connection: the fetch has no other.
    """
    if not own.is_open:
        raise error
    if what:
        log.remind("%s failed; jobs are fetched nevertheless: %s", what, first_line(error))
