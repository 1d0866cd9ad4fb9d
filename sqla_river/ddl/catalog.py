"""What is there."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqla_river.ddl.script import qualifier
from sqla_river.ddl.versions import ARBITER, BIG, LINE, OLDEST_RIVER, RIVER_LINE


@dataclass(frozen=True)
class Index:
    """An index as the catalog has it."""

    table: str
    definition: str
    valid: bool


@dataclass(frozen=True)
class Look:
    """What the catalog says of one schema."""

    schema: str | None
    """None where the search_path leads nowhere."""
    there: bool
    """Whether the schema is there at all."""
    tables: Mapping[str, Mapping[str, str]]
    """Columns and their types, by table; of tables named ``river_...`` only."""
    indexes: Mapping[str, Index]
    functions: frozenset[str]
    labels: tuple[str, ...]
    versions: Mapping[str, int]
    """The version of each line of ``river_migration``."""

    @property
    def version(self) -> int:
        """The version of our tables; 0 where there are none."""
        return self.versions.get(LINE, 0)

    @property
    def river(self) -> int:
        """The version of River's tables; 0 where its own tool left no word."""
        return self.versions.get(RIVER_LINE, 0)

    def has_index(self, name: str, columns: str) -> bool:
        """Whether index *name* is there, valid, and as *columns* says."""
        index = self.indexes.get(name)
        return index is not None and index.valid and same_index(name, columns, index.definition)


CATALOG: Final = """SELECT json_build_object(
    'schema', s.name,
    'there', n.oid IS NOT NULL,
    'tables', (
        SELECT json_object_agg(c.relname, (
            SELECT json_object_agg(a.attname, format_type(a.atttypid, a.atttypmod))
            FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped))
        FROM pg_class c WHERE c.relnamespace = n.oid AND c.relkind IN ('r', 'p') AND c.relname ~ '^river_'),
    'indexes', (
        SELECT json_object_agg(i.relname, json_build_array(
            t.relname, pg_get_indexdef(i.oid), x.indisvalid AND x.indisready))
        FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
        WHERE t.relnamespace = n.oid AND t.relname ~ '^river_'),
    'functions', (SELECT json_agg(p.proname) FROM pg_proc p WHERE p.pronamespace = n.oid AND p.proname ~ '^river_'),
    'labels', (
        SELECT json_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e JOIN pg_type y ON y.oid = e.enumtypid
        WHERE y.typnamespace = n.oid AND y.typname = 'river_job_state')
)::text
FROM (SELECT coalesce(CAST(:p_schema AS text), current_schema()) AS name) s
LEFT JOIN pg_namespace n ON n.nspname = s.name"""

VERSION_ROWS: Final = (
    "SELECT json_object_agg(line, version)::text "
    "FROM (SELECT line, max(version) AS version FROM {s}river_migration GROUP BY line) v"
)
MANY_ROWS: Final = "SELECT (count(*) > {big})::text FROM (SELECT FROM {{s}}river_job LIMIT {big} + 1) j"

Ask = Callable[[str, Mapping[str, Any]], str | None]
"""Run one query with named parameters, and return the text it gives."""


def look(ask: Ask, schema: str | None) -> Look:
    """What is there in *schema*; None is the search_path's first. Two round trips, one where nothing is there."""
    said: dict[str, Any] = json.loads(ask(CATALOG, {"p_schema": schema}) or "")
    tables: dict[str, dict[str, str]] = said["tables"] or {}
    indexes: dict[str, tuple[str, str, bool]] = said["indexes"] or {}
    versions: dict[str, int] = {}
    if "line" in tables.get("river_migration", {}):
        versions = json.loads(ask(VERSION_ROWS.format(s=qualifier(said["schema"])), {}) or "{}")
    elif "river_migration" in tables:
        versions = {RIVER_LINE: OLDEST_RIVER - 1}  # it had no lines then
    return Look(
        said["schema"],
        said["there"],
        {
            table: {column: type_.rpartition(".")[2] for column, type_ in columns.items()}
            for table, columns in tables.items()
        },
        {name: Index(*index) for name, index in indexes.items()},
        frozenset(said["functions"] or ()),
        tuple(said["labels"] or ()),
        versions,
    )


def is_big(ask: Ask, found: Look) -> bool:
    """Whether river_job has so many rows that an index is better built concurrently. Reads at most `BIG` of them."""
    if "river_job" not in found.tables:
        return False
    return ask(MANY_ROWS.format(big=BIG).format(s=qualifier(found.schema)), {}) == "true"


_NOISE: Final = re.compile(
    r"::\"?[\w ]+\"?(\.\"?\w+\"?)?(\[\])?|\{s\}|\"?\w+\"?\.(?=\w)|[\s()]|usingbtree",
    re.IGNORECASE,
)


def same_index(name: str, columns: str, definition: str) -> bool:
    """Whether *definition*, as the catalog prints it, is that of our index *name* on *columns*."""
    unique, _, rest = definition.partition("INDEX ")
    printed = re.sub(r"= ANY \(ARRAY\[(.*?)\]\)", r"IN (\1)", rest.partition("river_job ")[2])
    return ("UNIQUE" in unique) == (name == ARBITER) and _bare(printed) == _bare(columns)


def _bare(text: str) -> str:
    return _NOISE.sub("", _NOISE.sub("", text)).lower()
