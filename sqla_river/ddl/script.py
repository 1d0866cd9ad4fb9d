"""The statements of an upgrade or downgrade, for one transaction."""

from collections.abc import Mapping
from typing import Final

from sqla_river.ddl.versions import ARBITER, LABELS, LINE, LOCK_KEY, REFUSED, VERSIONS, block


def qualifier(schema: str | None) -> str:
    """The quoted prefix of a name in *schema*; empty where the search_path decides."""
    return "" if schema is None else '"{}".'.format(schema.replace('"', '""'))


def upgrade(schema: str | None = None, *, since: int = 0, to: int | None = None) -> tuple[str, ...]:
    """The statements from version *since* to version *to*; safe in one transaction, and safe to run twice."""
    last = max(VERSIONS) if to is None else to
    found: list[str] = [] if schema is None else [_create_schema(schema)]
    if since == 0:
        found.append(_create_type(last))
    for number in range(since + 1, last + 1):
        version = VERSIONS[number]
        found += version.upgrade
        found += [block(f"IF {condition} THEN", f"    {change};", "END IF;") for condition, change in version.changes]
        found += [build_if_missing(name, columns) for name, columns in version.indexes.items()]
        found += [
            block(f"IF {_exists(name)} THEN", f"    DROP INDEX {{s}}{name};", "END IF;") for name in version.obsolete
        ]
        found.append(
            f"INSERT INTO {{s}}river_migration (line, version) VALUES ('{LINE}', {number}) ON CONFLICT DO NOTHING"
        )
    return filled(schema, found)


def build(schema: str | None, indexes: Mapping[str, str]) -> tuple[str, ...]:
    """The statements that build those *indexes* of river_job that are missing."""
    return filled(schema, [build_if_missing(name, columns) for name, columns in indexes.items()])


def downgrade(schema: str | None = None, *, since: int | None = None, to: int = 0) -> tuple[str, ...]:
    """The statements back from version *since* to version *to*; safe in one transaction.

    Version 0 is refused while there are jobs. Where River's own tool made the tables, ours go and River's stay.
    """
    found: list[str] = []
    for number in range(max(VERSIONS) if since is None else since, to, -1):
        found += VERSIONS[number].downgrade
        if number > 1:
            found += [f"DROP INDEX IF EXISTS {{s}}{name}" for name in VERSIONS[number].indexes]
            found.append(f"DELETE FROM {{s}}river_migration WHERE line = '{LINE}' AND version = {number}")
    return filled(schema, found)


LOCK: Final = f"SELECT pg_advisory_xact_lock({LOCK_KEY})"
"""Waits until nobody else installs or upgrades in this database, and keeps them waiting until the transaction ends.

For scripts. A program asks with `TRY_LOCK` until it is true: a statement that waits holds a snapshot, and a concurrent
build of an index waits for that.
"""
TRY_LOCK: Final = f"SELECT pg_try_advisory_xact_lock({LOCK_KEY})"
TRY_LOCK_SESSION: Final = f"SELECT pg_try_advisory_lock({LOCK_KEY})"
UNLOCK_SESSION: Final = f"SELECT pg_advisory_unlock({LOCK_KEY})"


def refusal(message: str) -> str | None:
    """The reason, if *message* is a refusal of one of these statements."""
    first = message.partition("\n")[0].removeprefix("ERROR:").strip()
    return first.removeprefix(REFUSED) if first.startswith(REFUSED) else None


def filled(schema: str | None, statements: list[str]) -> tuple[str, ...]:
    return tuple(statement.format(s=qualifier(schema)) for statement in statements)


def _create_schema(schema: str) -> str:
    # IF NOT EXISTS asks for the right to create schemas even where it is there.
    name = qualifier(schema)[:-1]
    return block(f"IF to_regnamespace('{name}') IS NULL THEN", f"    CREATE SCHEMA {name};", "END IF;")


def _create_type(version: int) -> str:
    """All labels at once, or those that came later could not be used in the transaction that creates the type."""
    later = (label for number in range(1, version + 1) for label in VERSIONS[number].labels)
    labels = ", ".join(f"'{label}'" for label in (*LABELS, *later))
    return block(
        "CREATE TYPE {s}river_job_state AS ENUM",
        f"    ({labels});",
        "EXCEPTION WHEN duplicate_object THEN NULL;",
    )


def _exists(name: str) -> str:
    return f"to_regclass('{{s}}{name}') IS NOT NULL"


def create_index(name: str, columns: str, how: str = "") -> str:
    return f"CREATE {'UNIQUE ' if name == ARBITER else ''}INDEX {how}{name} ON {{s}}river_job {columns}"


def build_if_missing(name: str, columns: str) -> str:
    # CREATE INDEX IF NOT EXISTS locks the table against writers, and waits for those that are there, before it looks.
    return block(f"IF to_regclass('{{s}}{name}') IS NULL THEN", f"    {create_index(name, columns)};", "END IF;")


def patiently(condition: str, change: str) -> str:
    """*change* under a short lock_timeout, again and again: whoever waits for a lock makes everybody behind it wait."""
    return f"""DO $river$ BEGIN
    IF {condition} THEN
        FOR turn IN 1..240 LOOP
            BEGIN
                SET LOCAL lock_timeout = '250ms';
                {change};
                RETURN;
            EXCEPTION WHEN lock_not_available THEN NULL;
            END;
            PERFORM pg_sleep(0.25);
        END LOOP;
        RAISE EXCEPTION '{REFUSED}a transaction holds its lock on a table for over a minute; end it and run this again'
            USING ERRCODE = 'lock_not_available';
    END IF;
END $river$"""
