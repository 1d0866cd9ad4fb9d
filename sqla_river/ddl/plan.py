"""What is to be done; for a big table that is in use, the slow part first and without locks."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqla_river.ddl.catalog import Look
from sqla_river.ddl.script import build, create_index, downgrade, filled, patiently, upgrade
from sqla_river.ddl.versions import ADOPTED, INDEXES, TABLES, VERSIONS


@dataclass(frozen=True)
class Plan:
    """What an upgrade or downgrade does."""

    before: tuple[str, ...]
    """Each by itself, outside of a transaction."""
    inside: tuple[str, ...]
    """Together, in one transaction."""


def plan_upgrade(found: Look, *, big: bool, to: int | None = None, more: Mapping[str, str] | None = None) -> Plan:
    """What brings *found* to version *to*, repairs included: what is there already, and right, is left alone.

    Args:
        found: what is there, of the schema that is meant.
        big: whether to build indexes concurrently, and to take no lock for long.
        to: the version; the latest unless said.
        more: indexes of river_job to make besides, such as `RIVER_INDEXES`.
    """
    last = max(VERSIONS) if to is None else to
    versions = [VERSIONS[number] for number in range(1, last + 1)]
    gone = {name for version in versions for name in version.obsolete}
    wanted = {name: columns for version in versions for name, columns in version.indexes.items() if name not in gone}
    wanted |= more or {}
    wrong = [name for name, columns in wanted.items() if name in found.indexes and not found.has_index(name, columns)]
    missing = {name: columns for name, columns in wanted.items() if not found.has_index(name, columns)}
    since = 0 if _is_damaged(found) else found.version
    before: list[str] = []
    if "river_job" in found.tables:
        for number in range(found.version + 1, last + 1):
            before += [
                f"ALTER TYPE {{s}}river_job_state ADD VALUE IF NOT EXISTS '{label}'"
                for label in VERSIONS[number].labels
            ]
        if big:
            for number in range(since + 1, last + 1):
                before += VERSIONS[number].prepare
                before += [patiently(*change) for change in VERSIONS[number].changes]
            before += [f"DROP INDEX CONCURRENTLY IF EXISTS {{s}}{name}" for name in wrong]
            before += [create_index(name, columns, "CONCURRENTLY IF NOT EXISTS ") for name, columns in missing.items()]
            before += [f"DROP INDEX CONCURRENTLY IF EXISTS {{s}}{name}" for name in gone if name in found.indexes]
    later = wanted if since >= last else (more or {})
    inside = (
        *filled(found.schema, [] if big else [f"DROP INDEX {{s}}{name}" for name in wrong]),
        *(upgrade(found.schema, since=since, to=last) if since < last else ()),
        *build(found.schema, {name: later[name] for name in later if name in missing}),
    )
    return Plan(filled(found.schema, before), inside)


def _is_damaged(found: Look) -> bool:
    """Whether a table or the function is gone that the latest version has."""
    whole = found.tables.keys() >= set(TABLES) and "river_job_state_in_bitmask" in found.functions
    return found.version == max(VERSIONS) and not whole


def plan_downgrade(found: Look, *, big: bool, to: int = 0) -> Plan:
    """What brings *found* back to version *to*."""
    going = [name for number in range(found.version, to, -1) if number > 1 for name in VERSIONS[number].indexes]
    if to == 0 and ADOPTED in found.versions:
        going += INDEXES
    before = (
        [f"DROP INDEX CONCURRENTLY IF EXISTS {{s}}{name}" for name in going if name in found.indexes] if big else []
    )
    return Plan(filled(found.schema, before), downgrade(found.schema, since=found.version, to=to))
