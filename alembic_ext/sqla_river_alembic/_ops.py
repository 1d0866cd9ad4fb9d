"""The operations, and how autogenerate writes them down. The work is in ``_run.py``, imported when there is any."""

from typing import TYPE_CHECKING, Any

from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext


class _RiverOp(MigrateOperation):
    name: str

    def __init__(
        self,
        *,
        version: int,
        from_version: int,
        schema: str | None = None,
        concurrently: bool | None = None,
        river_indexes: bool = False,
    ) -> None:
        self.version = version
        self.from_version = from_version
        self.schema = schema
        self.concurrently = concurrently
        self.river_indexes = river_indexes

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """For ``alembic check`` and ``compare_metadata``."""
        return (self.name, self.schema, self.from_version, self.version)


@Operations.register_operation("river_upgrade")
class RiverUpgradeOp(_RiverOp):
    """From one version of the river tables to a later one."""

    name = "river_upgrade"

    @classmethod
    def river_upgrade(
        cls,
        operations: Operations,
        *,
        version: int,
        from_version: int = 0,
        schema: str | None = None,
        concurrently: bool | None = None,
        river_indexes: bool = False,
    ) -> None:
        """See `sqla_river_alembic.upgrade`."""
        operations.invoke(
            cls(
                version=version,
                from_version=from_version,
                schema=schema,
                concurrently=concurrently,
                river_indexes=river_indexes,
            )
        )

    def reverse(self) -> "RiverDowngradeOp":
        """What undoes it."""
        return RiverDowngradeOp(version=self.from_version, from_version=self.version, schema=self.schema)


@Operations.register_operation("river_downgrade")
class RiverDowngradeOp(_RiverOp):
    """From one version of the river tables to an earlier one."""

    name = "river_downgrade"

    @classmethod
    def river_downgrade(
        cls,
        operations: Operations,
        *,
        version: int = 0,
        from_version: int,
        schema: str | None = None,
        concurrently: bool | None = None,
    ) -> None:
        """See `sqla_river_alembic.downgrade`."""
        operations.invoke(cls(version=version, from_version=from_version, schema=schema, concurrently=concurrently))

    def reverse(self) -> RiverUpgradeOp:
        """What undoes it."""
        return RiverUpgradeOp(version=self.from_version, from_version=self.version, schema=self.schema)


@Operations.implementation_for(RiverUpgradeOp)
def _upgrade(operations: Operations, operation: RiverUpgradeOp) -> None:
    from sqla_river_alembic import _run

    _run.upgrade(operations, operation)


@Operations.implementation_for(RiverDowngradeOp)
def _downgrade(operations: Operations, operation: RiverDowngradeOp) -> None:
    from sqla_river_alembic import _run

    _run.downgrade(operations, operation)


@renderers.dispatch_for(RiverUpgradeOp)
@renderers.dispatch_for(RiverDowngradeOp)
def _render(context: "AutogenContext", operation: _RiverOp) -> str:
    # The import makes the migration work without the entry point too, and says what is missing when we are gone.
    context.imports.add("import sqla_river_alembic  # noqa: F401")
    prefix = context.opts["alembic_module_prefix"] or ""
    schema = "" if operation.schema is None else f", schema={operation.schema!r}"
    return f"{prefix}{operation.name}(version={operation.version}, from_version={operation.from_version}{schema})"
