"""Indexes made anew while they are in use."""

from typing import Final

from sqla_river.ddl.script import qualifier
from sqla_river.ddl.versions import ARBITER, INDEXES, RIVER_INDEXES

REINDEXED: Final = (*INDEXES, ARBITER, *RIVER_INDEXES, "river_job_pkey")

FIND_INDEXES: Final = """SELECT i.relname
FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE n.nspname = coalesce(CAST(:p_schema AS text), current_schema()) AND t.relname = 'river_job'
ORDER BY i.relname"""
"""The names of all indexes of river_job."""


def reindex(schema: str | None, index: str) -> str:
    """Make *index* anew, CONCURRENTLY: not in a transaction. Cut short, it leaves an invalid ``<index>_ccnew``."""
    return f'REINDEX INDEX CONCURRENTLY {qualifier(schema)}"{index}"'


def drop_leftover(schema: str | None, index: str) -> str:
    """Drop what a REINDEX that was cut short has left, CONCURRENTLY."""
    return f'DROP INDEX CONCURRENTLY IF EXISTS {qualifier(schema)}"{index}"'


def leftovers(found: list[str]) -> list[str]:
    """Of the indexes *found*, the copies that a REINDEX cut short has left: ``_ccnew``, ``_ccnew1``, ``_ccold``."""
    return [
        name
        for name in found
        for index in REINDEXED
        if name.startswith((f"{index}_ccnew", f"{index}_ccold")) and name[len(index) + 6 :].strip("0123456789") == ""
    ]
