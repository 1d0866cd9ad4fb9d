"""Are the tables as this library needs them? By what the catalog says, not by a version number alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Column, Connection, Enum
from sqlalchemy.dialects import postgresql

from sqla_river import ddl, store
from sqla_river.errors import SchemaError
from sqla_river.logs import Log
from sqla_river.schema import look
from sqla_river.states import JobState
from sqla_river.tables import RIVER

log: Final = Log(__name__)

MIGRATE: Final = "run 'alembic upgrade head' with the river migration included, or 'sqla-river migrate'"
REPAIR: Final = "run 'sqla-river migrate', which repairs it and keeps nobody waiting"
UPGRADE: Final = "upgrade sqla_river"
_DIALECT: Final = postgresql.dialect()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    what: str
    """The fact: which table, column or index, in which schema, and what is wrong with it."""
    cure: str
    fatal: bool
    """Whether jobs would be lost, stuck or refused. What is not fatal is slow, or concerns others."""

    def __str__(self) -> str:
        return f"{self.what}; {self.cure}"


def check_schema(connection: Connection, schema: str | None) -> list[Problem]:
    """What is wrong with the tables in *schema*, the worst first; empty where all is well. Two round trips.

    A schema one version newer than the library works, so that a deploy may migrate first; it is told of. An older one,
    or one that is two versions newer, does not.
    """
    found = look(connection, store.real_schema(connection, schema))
    where = "the search_path, which leads nowhere" if found.schema is None else f"schema '{found.schema}'"
    problems = list(_of_version(found, where) or _of_catalog(found, where))
    return sorted(problems, key=lambda problem: not problem.fatal)


def require_schema(connection: Connection, schema: str | None) -> None:
    """Log what is wrong with the tables in *schema*, and raise if they cannot be worked on. Two round trips.

    Raises:
        SchemaError: with every fatal problem and its cure.
    """
    problems = check_schema(connection, schema)
    fatal = [problem for problem in problems if problem.fatal]
    for problem in problems:
        if not problem.fatal:
            log.warning("%s", problem)
    if fatal:
        raise SchemaError("\n".join(map(str, fatal)))


def _of_version(found: ddl.Look, where: str) -> list[Problem]:
    """Problems that make all others pointless to tell."""
    if "river_job" not in found.tables:
        return [Problem(f"table river_job is missing in {where}", MIGRATE, fatal=True)]
    if not found.version:
        theirs = f"are River's own, of its version {found.river}" if found.river else "are not ours"
        return [Problem(f"the tables in {where} {theirs}: sqla_river's are missing", MIGRATE, fatal=True)]
    if found.version < ddl.LATEST:
        return [_version(found, where, "older", MIGRATE)]
    if found.version > ddl.LATEST + 1:
        return [_version(found, where, "too new", UPGRADE)]
    return []


def _version(found: ddl.Look, where: str, how: str, cure: str) -> Problem:
    fact = f"the tables in {where} are of version {found.version}, {how} than the {ddl.LATEST} of this sqla_river"
    return Problem(fact.replace("too new than", "too new for"), cure, fatal=how != "newer")


def _of_catalog(found: ddl.Look, where: str) -> Iterator[Problem]:
    if found.version > ddl.LATEST:
        yield _version(found, where, "newer", UPGRADE)
    for table in ddl.TABLES:
        if table not in found.tables:
            yield Problem(f"table {table} is missing in {where}", REPAIR, fatal=table in RIVER.tables)
        elif table in RIVER.tables:
            yield from _of_columns(table, RIVER.tables[table].columns, found, where)
    if "river_job_state_in_bitmask" not in found.functions:
        yield Problem(f"function river_job_state_in_bitmask is missing in {where}", REPAIR, fatal=True)
    for state in JobState:
        if state.value not in found.labels:
            cure = f"run ALTER TYPE {_name(found, 'river_job_state')} ADD VALUE '{state.value}'"
            yield Problem(f"type river_job_state has no '{state.value}' in {where}", cure, fatal=True)
    yield from _of_indexes(found, where)


def _of_columns(table: str, columns: Iterable[Column[Any]], found: ddl.Look, where: str) -> Iterator[Problem]:
    there = found.tables[table]
    for column in columns:
        wanted = _type(column)
        if column.name not in there:
            cure = (
                f"somebody changed the table; run ALTER TABLE {_name(found, table)} ADD COLUMN {column.name} {wanted}"
            )
            yield Problem(f"column {table}.{column.name} is missing in {where}", cure, fatal=True)
        elif there[column.name] != wanted:
            fact = f"column {table}.{column.name} is {there[column.name]} in {where}, and has to be {wanted}"
            yield Problem(fact, f"somebody changed it; ALTER TABLE {_name(found, table)} back", fatal=True)


def _of_indexes(found: ddl.Look, where: str) -> Iterator[Problem]:
    wanted = {name: columns for version in ddl.VERSIONS.values() for name, columns in version.indexes.items()}
    for name, columns in wanted.items():
        index = found.indexes.get(name)
        # Without the arbiter an enqueue with unique= is refused by PostgreSQL; without another, work is slow.
        fatal = name == ddl.ARBITER
        if index is None:
            yield Problem(f"index {name} of river_job is missing in {where}", REPAIR, fatal)
        elif not ddl.same_index(name, columns, index.definition):
            fact = f"index {name} of river_job in {where} is not as it should be: {index.definition}"
            yield Problem(fact, REPAIR, fatal)
        elif not index.valid:
            yield _invalid(name, index, where, REPAIR, fatal=fatal)
    for name, index in found.indexes.items():
        if name not in wanted and not index.valid:
            yield _invalid(name, index, where, f"run DROP INDEX CONCURRENTLY {_name(found, name)}", fatal=False)


def _invalid(name: str, index: ddl.Index, where: str, cure: str, *, fatal: bool) -> Problem:
    fact = f"index {name} of {index.table} is invalid in {where}: it is being built, or the build was cut short"
    return Problem(fact, cure, fatal)


def _name(found: ddl.Look, name: str) -> str:
    return f"{ddl.qualifier(found.schema)}{name}"


def _type(column: Column[Any]) -> str:
    """The type as the catalog spells it."""
    if isinstance(column.type, Enum):
        return str(column.type.name)
    spelled = column.type.compile(dialect=_DIALECT).lower()
    return spelled.replace("varchar", "character varying")
