"""What autogenerate writes for our tables: our operations, and nothing of its own."""

import logging
import sys
from typing import TYPE_CHECKING, Any, Final

from alembic.util import PriorityDispatchResult
from sqlalchemy import text

from sqla_river import ddl
from sqla_river_alembic._ops import RiverUpgradeOp
from sqla_river_alembic._run import asking

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import UpgradeOps
    from sqlalchemy import Connection

log: Final = logging.getLogger("alembic.sqla_river")

# Alembic's own token, and what Flask-Migrate calls that of the database without a bind key.
_MAIN_DATABASE: Final = ("upgrades", "_upgrades")

HOMES: Final = """SELECT n.nspname FROM pg_class j JOIN pg_namespace n ON n.oid = j.relnamespace
JOIN pg_class m ON m.relnamespace = n.oid AND m.relname = 'river_migration' WHERE j.relname = 'river_job'"""


def compare(context: "AutogenContext", upgrade_ops: "UpgradeOps") -> PriorityDispatchResult:
    """Take out what Alembic found of our tables, and put in what brings them up to date. Runs last."""
    connection = context.connection
    assert connection is not None
    declared = {table.schema: table for table in context.sorted_tables if table.name == "river_job"}
    wanted = _wanted(context, connection, declared)
    looks = {schema: ddl.look(asking(connection), schema) for schema in sorted(wanted, key=str, reverse=True)}
    _take_out(connection, upgrade_ops, {*wanted, *declared}, theirs=any(look.river for look in looks.values()))
    for schema, found in looks.items():
        if found.version > ddl.LATEST:
            log.warning(
                "the river tables in schema '%s' are of version %d, this sqla_river knows up to %d; upgrade it",
                *(found.schema, found.version, ddl.LATEST),
            )
        elif found.version < ddl.LATEST and (found.version or _belongs_here(context, schema, declared)):
            log.info("Detected river tables of version %d, %d is current", found.version, ddl.LATEST)
            operation = RiverUpgradeOp(version=ddl.LATEST, from_version=found.version, schema=schema)
            upgrade_ops.ops.insert(
                0, operation
            )  # before the user's own tables, which may refer to it; undone after them
    return PriorityDispatchResult.CONTINUE


def _wanted(context: "AutogenContext", connection: "Connection", declared: dict[str | None, Any]) -> set[str | None]:
    """The schemas to look after."""
    said = context.opts.get("sqla_river")
    if said is False:
        return set()
    if said is not None:
        return {said.get("schema")}
    wanted: set[str | None] = set()
    for schema in declared or {None: None}:
        if _included(context, connection, schema, declared.get(schema)):
            wanted.add(schema)
        else:
            log.info(
                "include_name or include_object leaves river_job out, so its tables are not looked after; "
                "say sqla_river={'schema': %r} to context.configure if they should be",
                schema,
            )
    return wanted


def _included(context: "AutogenContext", connection: "Connection", schema: str | None, table: Any) -> bool:
    """What include_name, include_schemas and include_object say of river_job."""
    other = schema is not None and schema != connection.dialect.default_schema_name
    if other and context.opts.get("include_schemas") and not context.run_name_filters(schema, "schema", {}):
        return False
    if not context.run_name_filters("river_job", "table", {"schema_name": schema if other else None}):
        return False
    return table is None or context.run_object_filters(table, "river_job", "table", False, None)


def _belongs_here(context: "AutogenContext", schema: str | None, declared: dict[str | None, Any]) -> bool:
    """Whether to install what nobody has: of several databases, where a Job is mapped, else in the main one."""
    if schema in declared or context.opts.get("sqla_river") is not None:
        return True
    return context.opts.get("upgrade_token", _MAIN_DATABASE[0]) in _MAIN_DATABASE and not _is_bound_elsewhere()


def _is_bound_elsewhere() -> bool:
    """Whether a Job of the user's has a ``__bind_key__`` of Flask-SQLAlchemy; asked without importing our models."""
    models = sys.modules.get("sqla_river.models")
    classes = list(models.JobMixin.__subclasses__()) if models is not None else []
    for cls in classes:
        classes += cls.__subclasses__()
    return any(cls.metadata.info.get("bind_key") is not None for cls in classes if hasattr(cls, "metadata"))


def _take_out(connection: "Connection", upgrade_ops: "UpgradeOps", more: set[str | None], *, theirs: bool) -> None:
    names = (*ddl.TABLES, *(ddl.RIVER_RETIRED if theirs else ()))
    default = connection.dialect.default_schema_name
    homes = {*connection.execute(text(HOMES)).scalars(), *more}
    homes = {default if home is None else home for home in homes}

    def ours(operation: Any) -> bool:
        home = getattr(operation, "schema", None)
        return getattr(operation, "table_name", None) in names and (default if home is None else home) in homes

    upgrade_ops.ops[:] = [operation for operation in upgrade_ops.ops if not ours(operation)]
