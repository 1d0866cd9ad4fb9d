"""What the operations do, online and offline."""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from sqla_river import ddl

if TYPE_CHECKING:
    from collections.abc import Generator

    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    from sqla_river_alembic._ops import RiverDowngradeOp, RiverUpgradeOp

log: Final = logging.getLogger("alembic.sqla_river")  # below "alembic", which every alembic.ini shows

TURN: Final = 0.05
"""Seconds between two looks at the lock."""
PATIENCE: Final = 60
"""Seconds to wait for it within a transaction of env.py's."""
_SCHEMA: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,45}")


def upgrade(operations: "Operations", operation: "RiverUpgradeOp") -> None:
    """Do what ``op.river_upgrade`` says."""
    context = operations.get_context()
    version, since = operation.version, operation.from_version
    _check(context, operation.schema, since, version)
    if not since < version:
        raise CommandError(f"river_upgrade goes up: from_version={since} must be below version={version}")
    more = ddl.RIVER_INDEXES if operation.river_indexes else {}
    if context.as_sql:
        there: dict[str, dict[str, str]] = {"river_job": {}} if since or operation.concurrently else {}
        found = ddl.Look(operation.schema, True, there, {}, frozenset(), (), {ddl.LINE: since})
        early = ddl.plan_upgrade(found, big=bool(operation.concurrently), to=version, more=more).before
        late = ddl.upgrade(operation.schema, since=since, to=version)
        _write(context, ddl.Plan(early, (*late, *ddl.build(operation.schema, more))))
        return

    def planned(connection: Connection, concurrently: bool | None) -> ddl.Plan:
        found = _look(connection, operation.schema)
        if found.version < since:
            raise CommandError(
                f"this migration takes the river tables from version {since} to {version}, and {_where(found)} has "
                f"{found.version or 'none'}; run the migration that installs them, with the same schema"
            )
        if 0 < found.river < ddl.OLDEST_RIVER:
            raise CommandError(
                f"River's tables are older than its version {ddl.OLDEST_RIVER}, and sqla_river takes over "
                f"{ddl.OLDEST_RIVER} to {ddl.RIVER_VERSIONS[-1]}; run 'river migrate-up' first"
            )
        if found.version >= version and not more:
            return ddl.Plan((), ())
        big = ddl.is_big(asking(connection), found) if concurrently is None else concurrently
        return ddl.plan_upgrade(found, big=big, to=version, more=more)

    _do(context, planned, operation.concurrently)


def downgrade(operations: "Operations", operation: "RiverDowngradeOp") -> None:
    """Do what ``op.river_downgrade`` says."""
    context = operations.get_context()
    version, since = operation.version, operation.from_version
    _check(context, operation.schema, version, since)
    if not since > version:
        raise CommandError(f"river_downgrade goes down: from_version={since} must be above version={version}")
    if context.as_sql:
        _write(context, ddl.Plan((), ddl.downgrade(operation.schema, since=since, to=version)))
        return

    def planned(connection: Connection, concurrently: bool | None) -> ddl.Plan:
        found = _look(connection, operation.schema)
        if found.version <= version:
            return ddl.Plan((), ())
        big = ddl.is_big(asking(connection), found) if concurrently is None else concurrently
        return ddl.plan_downgrade(found, big=big, to=version)

    _do(context, planned, operation.concurrently)


class Lock:
    """Migrations take turns while this is held; see `sqla_river_alembic.lock`."""

    def __init__(self, connection: Connection) -> None:
        _check_plain(connection)
        self._connection = connection
        self._held = connection.dialect.name == "postgresql"
        if self._held:
            told = False
            while not self._ask(ddl.TRY_LOCK_SESSION):
                if not told:
                    log.info("another process migrates this database; waiting")
                    told = True
                time.sleep(TURN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let others go on. Releasing twice is fine."""
        held, self._held = self._held, False
        if held and not self._connection.closed and not self._connection.invalidated:
            self._ask(ddl.UNLOCK_SESSION)

    def _ask(self, question: str) -> bool:
        """Leave no transaction behind: Alembic would take it for the caller's, and others may wait for it."""
        theirs = self._connection.in_transaction()
        answer = _try(self._connection, question)
        if not theirs:
            self._connection.commit()
        return answer


def _check_plain(connection: object) -> None:
    if not isinstance(connection, Connection):
        raise TypeError(
            f"lock needs a plain Connection, got {type(connection).__name__}; call it inside the function that "
            "'await connection.run_sync(...)' runs"
        )


def _check(context: "MigrationContext", schema: str | None, low: int, high: int) -> None:
    if context.dialect.name != "postgresql":
        raise CommandError(f"the river tables need PostgreSQL, this is {context.dialect.name}")
    if schema is not None and not _SCHEMA.fullmatch(schema):
        raise CommandError(
            f"schema must be a plain identifier of at most 46 bytes (it is part of a NOTIFY channel), got {schema!r}"
        )
    if low < 0 or high > ddl.LATEST:
        raise CommandError(
            f"this migration needs version {high} of the river tables, and the sqla_river that is installed knows "
            f"0 to {ddl.LATEST}; upgrade it"
        )


def _do(context: "MigrationContext", planned: Any, concurrently: bool | None) -> None:
    if not _try(_connection(context), ddl.TRY_LOCK):
        log.info("another process migrates this database; waiting")
        _take_turns(context)
    connection = _connection(context)
    plan: ddl.Plan = planned(connection, concurrently)
    if plan.before:
        if not _is_alembics(context):
            raise CommandError(
                "river_job has many rows, so its indexes are built concurrently; that takes a transaction that Alembic "
                "began itself, and env.py began this one. Run 'sqla-river migrate' before, and this finds them there; "
                "or say concurrently=False, to build them under a lock that keeps writers out"
            )
        # Taken while the transaction still holds its own: nobody comes in between.
        _try(connection, ddl.TRY_LOCK_SESSION)
        with _session_lock_to_xact(context), context.autocommit_block():
            _run(_connection(context), plan.before)
        connection = _connection(context)
        plan = planned(connection, True)
    _run(connection, plan.inside)


def _take_turns(context: "MigrationContext") -> None:
    """Wait for the lock outside of the transaction: whoever builds an index concurrently may have to wait for it.

    So what came before is committed, as an autocommit block does. In a transaction of env.py's, wait for a minute.
    """
    if _is_alembics(context):
        with _session_lock_to_xact(context), context.autocommit_block():
            while not _try(_connection(context), ddl.TRY_LOCK_SESSION):
                time.sleep(TURN)
        return
    until = time.monotonic() + PATIENCE
    while not _try(_connection(context), ddl.TRY_LOCK):
        if time.monotonic() > until:
            raise CommandError(
                f"another process has been migrating this database for over {PATIENCE} s, and may wait for this one; "
                "run this again"
            )
        time.sleep(TURN)


@contextmanager
def _session_lock_to_xact(context: "MigrationContext") -> "Generator[None]":
    """Turn the lock of the session, which the block takes or has, into one of the transaction that follows."""
    try:
        yield
        _try(_connection(context), ddl.TRY_LOCK)
    finally:
        _connection(context).exec_driver_sql(ddl.UNLOCK_SESSION)


def _is_alembics(context: "MigrationContext") -> bool:
    """Whether Alembic may end the transaction; else env.py, or its caller, has begun it."""
    return not _connection(context).in_transaction() or getattr(context, "_transaction", None) is not None


def _try(connection: Connection, lock: str) -> bool:
    return bool(connection.exec_driver_sql(lock).scalar_one())


def _write(context: "MigrationContext", plan: ddl.Plan) -> None:
    if plan.before:
        with context.autocommit_block():
            for statement in plan.before:
                context.impl.execute(text(statement))
    for statement in (ddl.LOCK, *plan.inside):
        context.impl.execute(text(statement))


def _run(connection: Connection, statements: Sequence[str]) -> None:
    try:
        for statement in statements:
            connection.exec_driver_sql(statement)
    except DBAPIError as error:
        reason = ddl.refusal(str(error.orig))
        if reason is None:
            raise
        raise CommandError(f"sqla_river: {reason}") from error


def _connection(context: "MigrationContext") -> Connection:
    assert context.connection is not None
    return context.connection


def _look(connection: Connection, declared: str | None) -> ddl.Look:
    theirs: Mapping[str | None, str | None] = connection.get_execution_options().get("schema_translate_map") or {}
    found = ddl.look(asking(connection), theirs.get(declared, declared))
    if found.version > ddl.LATEST:
        raise CommandError(
            f"the river tables in {_where(found)} are of version {found.version}, and the sqla_river that is installed "
            f"knows up to {ddl.LATEST}; upgrade it"
        )
    return found


def _where(found: ddl.Look) -> str:
    return f"schema '{found.schema}'"


def asking(connection: Connection) -> ddl.Ask:
    def ask(query: str, parameters: Mapping[str, Any]) -> str | None:
        answer: str | None = connection.execute(text(query), parameters).scalar_one()
        return answer

    return ask
