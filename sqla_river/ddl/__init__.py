"""The tables, as versioned data, and the way from one version to another.

Everything may run twice, and in one transaction: `upgrade` alone is enough on small tables. On a big one that is in
use, `plan_upgrade` puts first what must not hold a lock for long: indexes are built CONCURRENTLY, columns are added
under a short lock_timeout, each in a transaction of its own; the rest finds them there.

Nothing here imports SQLAlchemy: Alembic loads this package in every project.
"""

from sqla_river.ddl.catalog import Ask, Index, Look, is_big, look, same_index
from sqla_river.ddl.plan import Plan, plan_downgrade, plan_upgrade
from sqla_river.ddl.script import (
    LOCK,
    TRY_LOCK,
    TRY_LOCK_SESSION,
    UNLOCK_SESSION,
    build,
    downgrade,
    qualifier,
    refusal,
    upgrade,
)
from sqla_river.ddl.versions import (
    ADOPTED,
    ARBITER,
    BIG,
    INDEXES,
    LABELS,
    LINE,
    LOCK_KEY,
    OLDEST_RIVER,
    RIVER_INDEXES,
    RIVER_LINE,
    RIVER_RETIRED,
    RIVER_VERSIONS,
    TABLES,
    VERSIONS,
    Version,
)

LATEST = max(VERSIONS)
"""The version of our tables that this library makes, and works on."""

__all__ = [
    "ADOPTED",
    "ARBITER",
    "BIG",
    "INDEXES",
    "LABELS",
    "LATEST",
    "LINE",
    "LOCK",
    "LOCK_KEY",
    "OLDEST_RIVER",
    "RIVER_INDEXES",
    "RIVER_LINE",
    "RIVER_RETIRED",
    "RIVER_VERSIONS",
    "TABLES",
    "TRY_LOCK",
    "TRY_LOCK_SESSION",
    "UNLOCK_SESSION",
    "VERSIONS",
    "Ask",
    "Index",
    "Look",
    "Plan",
    "Version",
    "build",
    "downgrade",
    "is_big",
    "look",
    "plan_downgrade",
    "plan_upgrade",
    "qualifier",
    "refusal",
    "same_index",
    "upgrade",
]
