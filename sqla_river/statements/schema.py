"""Which tables are there."""

from typing import Any, Final

from sqlalchemy import BigInteger, Text, bindparam, func, select

from sqla_river.statements.words import literal
from sqla_river.tables import river_migration

# Caller: schema.py. Serialises whoever installs or upgrades, per database. A lock of the transaction: a killed one
# leaves nothing.
LOCK_SCHEMA: Final = select(func.pg_advisory_xact_lock(bindparam("p_key", type_=BigInteger)))

# Caller: schema.py. Where an unqualified CREATE TABLE goes; a table further down the search_path is somebody else's.
SELECT_CURRENT_SCHEMA: Final = select(func.current_schema())

# Caller: schema.py.
SELECT_IS_TABLE: Final = select(func.to_regclass(bindparam("p_name", type_=Text)).is_not(None))

# Caller: schema.py. By to_jsonb, because River's table had no lines before its version 5.
SELECT_VERSIONS: Final[Any] = select(
    func.coalesce(literal("to_jsonb(river_migration)->>'line'"), literal("'main'")).label("line"),
    func.max(river_migration.c.version).label("version"),
).group_by(literal("1"))
