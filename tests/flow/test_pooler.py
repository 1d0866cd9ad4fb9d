"""Through a real PgBouncer nothing is prepared; LISTEN is found out and reported where it cannot work, and left alone
where it can.
"""

import logging
from datetime import timedelta
from typing import Final

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError

from sqla_river import Runner
from sqla_river.store import OwnConnection
from tests.pooling import pgbouncer
from tests.working import SLOW_POLL, nothing, put, settled, working

SAID = "LISTEN goes through a transaction pooler"


def hears(runner: Runner) -> bool:
    incarnation = runner._incarnation
    return incarnation is not None and incarnation._fetcher._hears()


POLL: Final = timedelta(milliseconds=100)
PREPARING: Final[dict[str, dict[str, int | None]]] = {
    "psycopg's default": {},
    "never": {"prepare_threshold": None},
    "at once": {"prepare_threshold": 0},
}


@pytest.mark.parametrize("threshold", PREPARING.values(), ids=PREPARING)
def test_a_runner_on_a_transaction_pooler_works_and_one_that_listens_there_is_told(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture, threshold: dict[str, int | None]
) -> None:
    with pgbouncer(url, "transaction") as through, caplog.at_level(logging.WARNING):
        pooled = create_engine(through, connect_args=threshold)
        with working(pooled, nothing, poll=POLL) as runner:
            for number in range(10):  # psycopg prepares the sixth time
                (job_id,) = put(engine, number)
                assert settled(engine, job_id)["state"] == "completed"
            assert not hears(runner)
        first = [record.getMessage() for record in caplog.records]
        caplog.clear()
        with working(engine, nothing, listen=pooled, poll=POLL) as runner:
            (job_id,) = put(engine, 10)
            assert settled(engine, job_id)["state"] == "completed"
            assert not hears(runner)
        second = [record.getMessage() for record in caplog.records]
        caplog.clear()
        with working(pooled, nothing, listen=engine, poll=SLOW_POLL) as runner:
            (job_id,) = put(engine, 11)
            assert settled(engine, job_id)["state"] == "completed"
            assert hears(runner)
        pooled.dispose()

    for warned in (first, second):
        assert len(warned) == 1
        assert SAID in warned[0]
        assert "give the Runner listen=" in warned[0]
    assert caplog.records == []


SHOWN: Final = text(
    "SELECT name, setting FROM pg_settings WHERE name IN ('TimeZone', 'lock_timeout', 'statement_timeout', 'jit', "
    "'enable_seqscan', 'plan_cache_mode', 'synchronous_commit', 'default_transaction_isolation') ORDER BY name"
)


def test_what_a_runner_sets_is_not_set_for_others_of_the_same_pooler(url: str, engine: Engine) -> None:
    with engine.connect() as direct:
        before = direct.execute(SHOWN).all()
    with pgbouncer(url, "transaction") as through:
        pooled = create_engine(through, pool_size=20, connect_args=PREPARING["never"])
        with working(pooled, nothing, poll=POLL):
            for number in range(10):
                (job_id,) = put(pooled, number)
                assert settled(engine, job_id)["state"] == "completed"
        own = OwnConnection(pooled, None, "test")
        within = dict(own.execute(SHOWN).all())
        own.close()
        others = [pooled.connect() for _ in range(10)]  # transactions that are open at the same time: as many servers
        after = [each.execute(SHOWN).all() for each in others]
        for each in others:
            each.close()
        pooled.dispose()

    assert (within["lock_timeout"], within["jit"], within["TimeZone"]) == ("5000", "off", "UTC")
    assert after == [before] * 10


def test_an_error_of_a_statement_leaves_a_connection_through_a_pooler_usable(url: str) -> None:
    with pgbouncer(url, "transaction") as through:
        pooled = create_engine(through)
        own = OwnConnection(pooled, None, "test")
        with pytest.raises(DBAPIError):
            own.execute(text("SELECT 1/0"))
        raw = own.raw

        assert own.execute(text("SHOW transaction_isolation")).scalar_one() == "read committed"
        assert own.raw is raw
        own.close()
        pooled.dispose()


def test_a_listener_on_a_session_pooler_hears(url: str, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with pgbouncer(url, "session") as through:
        pooled = create_engine(through)
        with working(engine, nothing, listen=pooled, poll=SLOW_POLL) as runner:
            (job_id,) = put(engine, 1)
            assert settled(engine, job_id)["state"] == "completed"
            assert hears(runner)
        pooled.dispose()

    assert SAID not in caplog.text


@pytest.mark.parametrize("threshold", PREPARING.values(), ids=PREPARING)
def test_a_kept_connection_prepares_all_that_it_runs_or_nothing(url: str, threshold: dict[str, int | None]) -> None:
    def prepared(to: str, *, prepare: bool = True) -> list[str]:
        where = create_engine(to, connect_args=threshold)
        own = OwnConnection(where, None, "test", prepare=prepare)
        names = [own.execute(text("SELECT name FROM pg_prepared_statements")).scalars().all() for _ in range(10)][-1]
        own.close()
        where.dispose()
        return list(names)

    direct = prepared(url)
    told_not_to = prepared(url, prepare=False)
    through: list[str] = []
    for mode in ("transaction", "session"):
        with pgbouncer(url, mode) as pooler:
            through += prepared(pooler)

    assert len(direct) == (0 if threshold == PREPARING["never"] else 1)
    assert told_not_to == through == []
