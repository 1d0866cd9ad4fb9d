"""The session that a test verb is given."""

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from sqla_river.errors import AsyncSessionError
from sqla_river.session import sync_session


def plain_session(session: Any, verb: str) -> Session | Connection:
    """The Session or Connection behind *session*; raises `AsyncSessionError` with the way out, and `SessionError`."""
    try:
        return sync_session(session)
    except AsyncSessionError:
        name = type(session).__name__
    raise AsyncSessionError(
        f"this verb is for a plain Session, got {name}; write 'from sqla_river.testing.asyncio import {verb}' and "
        "await it"
    )
