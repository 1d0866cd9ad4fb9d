"""Reindex: the indexes are made anew, and what was cut short leaves nothing behind."""

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from sqla_river import create_all
from sqla_river.ddl import ARBITER, INDEXES
from sqla_river.duties import reindex
from sqla_river.duties.reindex import Reindex
from sqla_river.store import OwnConnection
from tests.making import make_jobs, opened

OURS = {*INDEXES, ARBITER, "river_job_pkey"}


def _indexes(engine: Engine, schema: str = "public") -> dict[str, tuple[int, bool]]:
    """The file and the validity of each index of river_job."""
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT i.relname, i.relfilenode::bigint AS file, x.indisvalid "
                "FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid "
                "WHERE x.indrelid = CAST(:table AS regclass)"
            ),
            {"table": f"{schema}.river_job"},
        )
        return {row.relname: (row.file, row.indisvalid) for row in rows}


def _run(own: OwnConnection) -> int:
    duty = Reindex()
    batches = 1
    while duty.do(own):
        batches += 1
    return batches


def test_each_index_is_made_anew_one_a_batch(engine: Engine) -> None:
    make_jobs(engine, 100)
    before = _indexes(engine)

    with opened(engine, statement_timeout="10s") as own:
        batches = _run(own)
        assert own.execute(text("SHOW statement_timeout")).scalar() == "10s"

    after = _indexes(engine)
    assert set(after) == set(before) == OURS
    assert all(after[name][0] != before[name][0] and after[name][1] for name in OURS)
    assert batches == len(OURS)


def test_indexes_of_others_are_left_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE INDEX theirs ON river_job (kind, created_at)"))
        connection.execute(text("CREATE INDEX river_job_fetch_idx_ccnewest ON river_job (kind)"))
    before = _indexes(engine)

    with opened(engine) as own:
        _run(own)

    after = _indexes(engine)
    assert after["theirs"] == before["theirs"]
    assert after["river_job_fetch_idx_ccnewest"] == before["river_job_fetch_idx_ccnewest"]


def test_a_reindex_that_was_cut_short_three_times_leaves_nothing_after_the_next(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_jobs(engine, 100)
    with engine.begin() as theirs, opened(engine) as own:
        theirs.execute(text("LOCK river_job IN ROW EXCLUSIVE MODE"))  # a transaction that it has to wait for
        with monkeypatch.context() as hasty:
            hasty.setattr(reindex, "TIMEOUT", "100ms")
            own.execute(text("SET lock_timeout = '100ms'"))
            for _ in range(3):
                with pytest.raises(OperationalError):
                    own.execute(text("REINDEX INDEX CONCURRENTLY river_job_fetch_idx"))
            with pytest.raises(OperationalError):
                Reindex().do(own)
    assert not all(valid for _, valid in _indexes(engine).values())
    assert len(_indexes(engine)) > len(OURS)

    with opened(engine) as own:
        _run(own)

    assert set(_indexes(engine)) == OURS
    assert all(valid for _, valid in _indexes(engine).values())


def test_the_indexes_of_a_schema_with_a_strange_name(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text('CREATE SCHEMA "Jobs_here"'))
    create_all(engine, schema="Jobs_here")
    before = _indexes(engine, '"Jobs_here"')
    elsewhere = _indexes(engine)

    own = OwnConnection(engine, "Jobs_here", "test", {})
    try:
        own.get()
        _run(own)
    finally:
        own.close()

    after = _indexes(engine, '"Jobs_here"')
    assert all(after[name] != before[name] for name in OURS)
    assert _indexes(engine) == elsewhere
