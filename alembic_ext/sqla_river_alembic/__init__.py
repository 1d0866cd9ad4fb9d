"""The river tables in a project's own Alembic migrations.

A migration says which versions it goes between, and nothing else::

    def upgrade():
        op.river_upgrade(version=1, from_version=0, schema="river")

    def downgrade():
        op.river_downgrade(version=0, from_version=1, schema="river")

``alembic revision --autogenerate`` writes that by itself where ``context.configure`` says
``autogenerate_plugins=["alembic.autogenerate.*", "sqla_river"]``, and ``sqla_river={"schema": "river"}`` unless the
tables go where the search_path leads. `upgrade` and `downgrade` are the same as plain functions. `lock` makes
migrations of many processes take turns.

Alembic imports this package in every project of the environment, so it costs next to nothing.
"""

import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alembic.operations import Operations
    from alembic.runtime.plugins import Plugin
    from sqlalchemy import Connection

    from sqla_river_alembic._run import Lock

__all__ = ["downgrade", "include_name", "include_object", "lock", "upgrade"]


def upgrade(
    op: "Operations | types.ModuleType",
    *,
    version: int,
    from_version: int = 0,
    schema: str | None = None,
    concurrently: bool | None = None,
    river_indexes: bool = False,
) -> None:
    """Bring the tables from *from_version* to *version*; ``op.river_upgrade(...)`` as a plain function.

    What is there already is left alone. Tables that River's own tool made, at its version 5 to 7, are taken over.

    Args:
        op: ``alembic.op``, or any Operations.
        version: a version of our tables; say a number, so that the migration means the same for ever.
        from_version: the version that the migration before this one left.
        schema: where the tables are, or go; it is created where it is missing. None is the search_path's first.
        concurrently: build indexes CONCURRENTLY, in an autocommit block that commits what came before. None is: where
            river_job has over 100,000 rows; in a script (``--sql``), not.
        river_indexes: make River's own indexes besides, for a busy Go fleet or UI.

    Raises:
        alembic.util.CommandError: a version that this library or this database does not have; not PostgreSQL; or a
            reason not to do it, in words.
    """
    _operations(op).river_upgrade(
        version=version,
        from_version=from_version,
        schema=schema,
        concurrently=concurrently,
        river_indexes=river_indexes,
    )


def downgrade(
    op: "Operations | types.ModuleType",
    *,
    version: int = 0,
    from_version: int,
    schema: str | None = None,
    concurrently: bool | None = None,
) -> None:
    """Bring the tables back to *version*; ``op.river_downgrade(...)`` as a plain function.

    Version 0 is refused while there are jobs. Where River's own tool made the tables, ours go and River's stay, with
    their rows. The schema stays.
    """
    _operations(op).river_downgrade(
        version=version, from_version=from_version, schema=schema, concurrently=concurrently
    )


def lock(connection: "Connection") -> "Lock":
    """Wait until no other process migrates this database, and keep others waiting until this one is done.

    For env.py, before Alembic's own work: ``with sqla_river_alembic.lock(connection): ...``. It is taken at once, also
    without ``with``; then it is held until the connection closes. It belongs to the session, so it does not hold
    through PgBouncer in transaction mode.
    """
    from sqla_river_alembic._run import Lock

    return Lock(connection)


def include_name(name: str | None, type_: str, parent_names: Mapping[str, str | None]) -> bool:  # noqa: ARG001
    """False for our tables: ``context.configure(include_name=sqla_river_alembic.include_name)``.

    For those who do not list the plugin in ``autogenerate_plugins``; without either, autogenerate would drop them.
    """
    return not _is_ours(name, type_)


def include_object(object_: object, name: str | None, type_: str, reflected: bool, compare_to: object) -> bool:  # noqa: ARG001
    """False for our tables: `include_name` does not see a Job that is mapped on one's own MetaData, this does."""
    return not _is_ours(name, type_)


def _is_ours(name: str | None, type_: str) -> bool:
    from sqla_river import ddl

    return type_ == "table" and name in ddl.TABLES


def setup(plugin: "Plugin") -> None:
    """Alembic calls this; during ``import alembic``, which is half done."""
    from alembic.util import DispatchPriority

    plugin.add_autogenerate_comparator(
        _compare, "autogenerate", "sqla_river", qualifier="postgresql", priority=DispatchPriority.LAST
    )
    importlib.import_module(f"{__name__}._ops")


def _compare(*args: Any) -> Any:
    from sqla_river_alembic._compare import compare

    return compare(*args)


def _operations(op: Any) -> Any:
    importlib.import_module(f"{__name__}._ops")
    return op


class _PluginModule(types.ModuleType):
    """A module that can be iterated: Alembic 1.18.0 to 1.20.0 do that with an entry point, 1.20.1 wants a module."""

    def __iter__(self) -> Iterator[types.ModuleType]:
        yield self


sys.modules[__name__].__class__ = _PluginModule
importlib.import_module(f"{__name__}._ops")
