"""Transactional handlers: what they write and the end of their job commit together, or not at all."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Final

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Mapped, Session, mapped_column, scoped_session, sessionmaker

from sqla_river import Cancel, Job, JobContext, Snooze, Workers, enqueue, enqueue_many
from sqla_river.asyncio import enqueue as enqueue_async
from sqla_river.errors import ConfigError, ForeignBindError, TransactionOver
from sqla_river.runner import Runner
from tests.crashing import bury, spawn
from tests.database import emptied, shared_database
from tests.making import Count, Gate, Greet, all_are, count_states, eventually, make_jobs, read_job, read_jobs
from tests.working import HOUR, Base, Note, after, errors, handling, notes, outcome, put, settled, working

Writes = Callable[[Session], object]
KILL: Final = text("SELECT pg_terminate_backend(:pid, 5000)")


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.fixture(autouse=True)
def tables(engine: Engine) -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def other(engine: Engine) -> Iterator[Engine]:
    """Another engine of the same database."""
    other = create_engine(engine.url)
    yield other
    other.dispose()


@pytest.fixture
def run_async(engine: Engine) -> AsyncEngine:
    """An async engine; the runner closes its connections."""
    return create_async_engine(engine.url)


def transactional(writes: Writes, **settings: Any) -> Workers:
    """Workers that call *writes* with the session of each `Count`, and take no heed of what it returns but wishes."""

    def handler(_: JobContext[Count], session: Session) -> Any:
        answer = writes(session)
        return answer if isinstance(answer, Snooze | Cancel) else None

    return handling(handler, transactional=True, **settings)


def add(session: Session, words: str = "written") -> None:
    session.add(Note(words=words))


# ---- the table of what a handler may do


def only_adds(session: Session) -> None:
    add(session)


def flushes(session: Session) -> None:
    add(session)
    session.flush()


def commits(session: Session) -> None:
    add(session)
    session.commit()


def commits_twice_and_goes_on(session: Session) -> None:
    session.commit()
    add(session)
    session.commit()
    session.commit()
    session.flush()


def releases_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        add(session)


def rolls_back_to_a_savepoint(session: Session) -> None:
    add(session)
    with session.begin_nested() as savepoint:
        add(session, "undone")
        session.flush()
        savepoint.rollback()


def leaves_a_savepoint_open(session: Session) -> None:
    session.begin_nested()
    add(session)


def closes_after_a_flush(session: Session) -> None:
    add(session)
    session.flush()
    session.close()


def uses_it_as_a_context(session: Session) -> None:
    with session:
        add(session)
        session.commit()


def goes_on_after_a_close(session: Session) -> None:
    session.close()
    add(session)


def uses_its_connection(session: Session) -> None:
    session.connection().execute(text("INSERT INTO note (words) VALUES ('written')"))


SETTLING: Final = [
    only_adds,
    flushes,
    commits,
    commits_twice_and_goes_on,
    releases_a_savepoint,
    rolls_back_to_a_savepoint,
    leaves_a_savepoint_open,
    closes_after_a_flush,
    uses_it_as_a_context,
    goes_on_after_a_close,
    uses_its_connection,
]


@pytest.mark.parametrize("writes", SETTLING)
def test_what_a_handler_wrote_is_stored_once_with_its_job(engine: Engine, writes: Writes) -> None:
    row = outcome(engine, transactional(writes))

    assert (row["state"], row["attempt"], row["finalized"], errors(row)) == ("completed", 1, True, [])
    assert notes(engine) == ["written"]


@pytest.mark.parametrize("writes", SETTLING)
def test_an_error_at_the_end_undoes_all_of_it(engine: Engine, writes: Writes) -> None:
    def fails(session: Session) -> None:
        writes(session)
        raise ValueError("at the end")

    row = outcome(engine, transactional(fails))

    assert (row["state"], errors(row)) == ("retryable", ["ValueError: at the end"])
    assert notes(engine) == []


def test_unflushed_work_is_lost_with_a_close_as_in_any_session(engine: Engine) -> None:
    def closes(session: Session) -> None:
        add(session)
        session.close()

    row = outcome(engine, transactional(closes))

    assert (row["state"], notes(engine)) == ("completed", [])


def test_the_work_and_the_end_of_the_job_appear_at_one_moment(engine: Engine) -> None:
    flushed, go_on = threading.Event(), threading.Event()

    def waits(session: Session) -> None:
        commits(session)
        flushed.set()
        assert go_on.wait(30)

    (job_id,) = put(engine, 0)
    with working(engine, transactional(waits)):
        assert flushed.wait(30)
        assert (notes(engine), read_job(engine, job_id)["state"]) == ([], "running")
        go_on.set()
        settled(engine, job_id)

    with engine.connect() as connection:
        same = "SELECT n.xmin = j.xmin FROM note n, river_job j"
        assert connection.execute(text(same)).scalars().all() == [True]


def test_jobs_that_it_enqueues_join_its_transaction(engine: Engine) -> None:
    def enqueues(session: Session) -> None:
        session.add(Job(Greet("add")))
        enqueue(session, Greet("enqueue"))
        enqueue_many(session, [Greet("many"), Greet("more")])

    row = outcome(engine, transactional(enqueues))

    assert row["state"] == "completed"
    rows = [row for row in read_jobs(engine) if row["kind"] == "greet"]
    assert sorted(row["args"]["name"] for row in rows) == ["add", "enqueue", "many", "more"]
    assert {row["state"] for row in rows} == {"available"}


def test_jobs_that_it_enqueued_vanish_with_an_error(engine: Engine) -> None:
    def fails(session: Session) -> None:
        enqueue(session, Greet("enqueue"))
        enqueue_many(session, [Greet("many")])
        session.commit()
        raise ValueError

    outcome(engine, transactional(fails))

    assert [row["kind"] for row in read_jobs(engine)] == ["count"]


def test_a_job_that_it_enqueued_starts_when_it_is_committed(engine: Engine) -> None:
    gate = Gate(opened=True)
    workers = transactional(lambda session: enqueue(session, Greet("next")))
    workers.register(Greet)(gate)
    put(engine, 0)

    with working(engine, workers, poll=timedelta(minutes=5)):
        gate.wait(1)


def rolls_back(session: Session) -> None:
    add(session)
    session.flush()
    session.rollback()


def rolls_back_and_goes_on(session: Session) -> None:
    add(session, "undone")
    session.flush()
    session.rollback()
    add(session)
    session.commit()


def rolls_back_and_reads_on(session: Session) -> None:
    session.execute(text("SELECT 1"))
    session.rollback()
    session.execute(text("SELECT 1"))


def rolls_back_its_connection(session: Session) -> None:
    add(session)
    session.flush()
    session.connection().rollback()


@pytest.mark.parametrize(
    "writes", [rolls_back, rolls_back_and_goes_on, rolls_back_and_reads_on, rolls_back_its_connection]
)
def test_a_rollback_fails_the_attempt_and_stores_nothing(engine: Engine, writes: Writes) -> None:
    row = outcome(engine, transactional(writes))

    assert row["state"] == "retryable"
    assert errors(row)[0].startswith(f"{TransactionOver.__name__}: ")
    assert notes(engine) == []


def test_a_swallowed_error_of_the_database_fails_the_attempt(engine: Engine) -> None:
    def swallows(session: Session) -> None:
        add(session)
        session.flush()
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1/0"))

    row = outcome(engine, transactional(swallows))

    assert row["state"] == "retryable"
    assert "InFailedSqlTransaction" in errors(row)[0]
    assert notes(engine) == []


def test_an_error_inside_a_savepoint_may_be_swallowed(engine: Engine) -> None:
    def swallows(session: Session) -> None:
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(text("SELECT 1/0"))
        add(session)

    row = outcome(engine, transactional(swallows))

    assert (row["state"], notes(engine)) == ("completed", ["written"])


def test_a_constraint_that_is_checked_at_the_commit_fails_the_attempt(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE note ADD CONSTRAINT once UNIQUE (words) DEFERRABLE INITIALLY DEFERRED"))
        connection.execute(text("ALTER TABLE note DROP CONSTRAINT note_words_key"))
        connection.execute(text("INSERT INTO note (words) VALUES ('written')"))

    row = outcome(engine, transactional(flushes))

    assert row["state"] == "retryable"
    assert "UniqueViolation" in errors(row)[0]
    assert notes(engine) == ["written"]


def test_a_commit_of_the_connection_itself_fails_the_attempt_with_its_effects_kept(engine: Engine) -> None:
    """Out of the runner's hands; the job says so."""

    def commits_the_connection(session: Session) -> None:
        flushes(session)
        session.connection().commit()

    row = outcome(engine, transactional(commits_the_connection))

    assert row["state"] == "retryable"
    assert errors(row)[0].startswith("TransactionOver: ")
    assert notes(engine) == ["written"]


@pytest.mark.parametrize("how", ["returned", "raised"])
@pytest.mark.parametrize(("wish", "state"), [(Snooze(HOUR), "scheduled"), (Cancel("enough"), "cancelled")])
def test_wishes_keep_the_effects_when_returned_and_undo_them_when_raised(
    engine: Engine, wish: Exception, state: str, how: str
) -> None:
    def wishes(session: Session) -> Exception:
        add(session)
        if how == "raised":
            session.flush()
            raise wish
        return wish

    row = outcome(engine, transactional(wishes))

    assert (row["state"], row["attempt"]) == (state, 0 if state == "scheduled" else 1)
    assert notes(engine) == (["written"] if how == "returned" else [])


def test_metadata_and_output_commit_with_the_effects(engine: Engine) -> None:
    def handler(job: JobContext[Count], session: Session) -> None:
        add(session)
        job.output({"sum": 7})
        job.metadata["step"] = 2

    row = outcome(engine, handling(handler, transactional=True))

    assert row["metadata"] == {"output": {"sum": 7}, "step": 2}


# ---- the connection breaks


def pid_of(session: Session) -> int:
    pid = session.connection().connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
    return int(pid)


def kill(engine: Engine, pid: int) -> None:
    with engine.connect() as connection:
        connection.execute(KILL, {"pid": pid})


@pytest.mark.parametrize("when", ["before_flush", "after_flush", "before_the_end_of_the_job", "at_the_commit"])
def test_a_backend_killed_at_any_step_stores_nothing_and_the_job_runs_again(
    engine: Engine, other: Engine, when: str
) -> None:
    killed: list[int] = []

    def kill_once(session: Session) -> None:
        if not killed:
            killed.append(pid_of(session))
            kill(other, killed[0])

    def writes(session: Session) -> None:
        add(session)
        if when == "before_flush":
            kill_once(session)
        session.flush()
        if when == "after_flush":
            kill_once(session)
        elif when == "before_the_end_of_the_job":
            event.listen(session, "after_flush_postexec", lambda *_: kill_once(session), once=True)
            session.add(Note(words="more"))

    def at_the_commit(connection: Connection) -> None:
        if not killed and connection.get_execution_options().get("mark") is None:
            pid: Any = connection.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
            killed.append(pid)
            kill(other, pid)

    workers = transactional(writes, retry=after(timedelta(0)))
    (job_id,) = put(other, 0)
    if when == "at_the_commit":
        event.listen(engine, "commit", at_the_commit)
    with working(engine, workers, listen=False):
        settled(other, job_id)
        state, written = _at_one_moment(other, job_id)  # the next attempt may come in between two looks
        assert state == "completed" or written is None
        eventually(lambda: read_job(other, job_id)["state"] == "completed", what="the next attempt")

    row = read_job(other, job_id)
    assert len(killed) == 1
    assert (row["attempt"], len(errors(row))) == (2, 1)
    assert notes(other) == (["written", "more"] if when == "before_the_end_of_the_job" else ["written"])
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def _at_one_moment(engine: Engine, job_id: int) -> tuple[str, list[str] | None]:
    """The state of a job, and what handlers have written; None for nothing."""
    look = text("SELECT state::text, (SELECT array_agg(words ORDER BY id) FROM note) FROM river_job WHERE id = :id")
    with engine.connect() as connection:
        state, written = connection.execute(look, {"id": job_id}).one()
        return state, written


class Proxy:
    """Between a client and PostgreSQL; it can pass a COMMIT on, and cut the line before its reply."""

    def __init__(self, url: str) -> None:
        host = make_url(url).query.get("host") or make_url(url).host
        port = make_url(url).port or 5432
        self.cut = 0
        self._armed = threading.Event()
        self._server: tuple[str, int] = (str(host), port)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(30)

    def arm(self) -> None:
        """Cut the line at the next COMMIT."""
        self._armed.set()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(30)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        lines: set[asyncio.Task[None]] = set()

        async def line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            lines.add(task)
            host, port = self._server
            opened = (
                asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
                if host.startswith("/")
                else asyncio.open_connection(host, port)
            )
            up_reader, up_writer = await opened
            committed = asyncio.Event()
            try:
                up = asyncio.create_task(self._up(reader, up_writer, committed))
                down = asyncio.create_task(self._down(up_reader, writer, committed))
                _, pending = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
                for each in pending:
                    each.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
            finally:
                writer.close()
                up_writer.close()
                lines.discard(task)

        server = await asyncio.start_server(line, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        for task in list(lines):
            task.cancel()
        await asyncio.gather(*lines, return_exceptions=True)
        await asyncio.sleep(0)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, committed: asyncio.Event) -> None:
        while data := await reader.read(65_536):
            if b"COMMIT" in data and self._armed.is_set():
                self._armed.clear()
                committed.set()
            writer.write(data)
            await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, committed: asyncio.Event) -> None:
        while data := await reader.read(65_536):
            if committed.is_set():  # the reply: the server has committed
                self.cut += 1
                return
            writer.write(data)
            await writer.drain()


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    proxy = Proxy(url)
    yield proxy
    proxy.close()


def through(proxy: Proxy, url: str) -> Any:
    made = make_url(url)
    query = {name: value for name, value in made.query.items() if name not in {"host", "port"}}
    return made.set(host="127.0.0.1", port=proxy.port, query=query)


def asked(calls: list[Any]) -> Callable[[JobContext[Any], BaseException], None]:
    def on_error(job: JobContext[Any], error: BaseException) -> None:
        calls.append((job.id, error))

    return on_error


@pytest.mark.parametrize(("wish", "state"), [(None, "completed"), (Snooze(HOUR), "scheduled")])
def test_a_commit_whose_reply_is_lost_is_found_to_be_done(
    url: str, engine: Engine, proxy: Proxy, wish: Snooze | None, state: str
) -> None:
    far = create_engine(through(proxy, url))
    runs: list[int] = []
    failed: list[Any] = []

    def writes(session: Session) -> Snooze | None:
        add(session)
        runs.append(pid_of(session))
        proxy.arm()
        return wish

    (job_id,) = put(engine, 0)
    try:
        runner = Runner(
            far, transactional(writes), queues={"default": 1}, on_error=asked(failed), stop_timeout=timedelta(seconds=3)
        )
        with runner.subscribe("completed", "failed", "snoozed") as events:
            with runner:
                row = settled(engine, job_id)
                told = events.get(timedelta(seconds=10))
            assert told.kind == ("completed" if wish is None else "snoozed")
            assert told.error is None
    finally:
        far.dispose()

    assert proxy.cut == 1
    assert len(runs) == 1
    assert failed == []
    assert (row["state"], errors(row), notes(engine)) == (state, [], ["written"])


def test_an_async_commit_whose_reply_is_lost_is_found_to_be_done(url: str, engine: Engine, proxy: Proxy) -> None:
    far, far_async = create_engine(through(proxy, url)), create_async_engine(through(proxy, url))

    async def handler(_: JobContext[Count], session: AsyncSession) -> None:
        session.add(Note(words="written"))
        await session.flush()
        proxy.arm()

    try:
        row = outcome_on(far, engine, handling(handler, transactional=True), async_engine=far_async)
    finally:
        far.dispose()

    assert proxy.cut == 1
    assert (row["state"], errors(row), notes(engine)) == ("completed", [], ["written"])


def outcome_on(engine: Engine, seen_on: Engine, workers: Workers, **settings: Any) -> Any:
    (job_id,) = put(seen_on, 0)
    with working(engine, workers, **settings):
        return settled(seen_on, job_id)


# ---- the fence


def test_effects_of_a_job_that_was_rescued_meanwhile_are_rolled_back_and_counted(engine: Engine) -> None:
    failed: list[Any] = []
    started, go_on = threading.Event(), threading.Event()

    def waits(session: Session) -> None:
        flushes(session)
        started.set()
        assert go_on.wait(30)

    (job_id,) = put(engine, 0)
    with working(engine, transactional(waits), on_error=asked(failed)) as runner:
        assert started.wait(30)
        with engine.begin() as connection:  # as the rescue of another runner, and its next attempt, would leave it
            connection.execute(
                text("UPDATE river_job SET attempt = 2, attempted_by = attempted_by || 'another:1:abc/1'::text")
            )
        go_on.set()
        eventually(lambda: runner.stale == 1, what="the stale outcome")

    row = read_job(engine, job_id)
    assert (row["state"], row["attempt"], row["token"], errors(row)) == ("running", 2, "another:1:abc/1", [])
    assert notes(engine) == []
    assert failed == []


def test_a_job_that_was_deleted_meanwhile_leaves_no_effects(engine: Engine) -> None:
    def deletes(session: Session) -> None:
        flushes(session)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_job"))

    put(engine, 0)
    with working(engine, transactional(deletes)) as runner:
        eventually(lambda: runner.stale == 1, what="the stale outcome")

    assert notes(engine) == []


def test_a_cancel_asked_while_it_ran_leaves_a_completed_job_completed(engine: Engine) -> None:
    def asks(session: Session) -> None:
        add(session)
        with Session(engine) as own, own.begin():
            own.execute(text('UPDATE river_job SET metadata = metadata || \'{"cancel_attempted_at": "now"}\''))

    row = outcome(engine, transactional(asks))

    assert (row["state"], notes(engine)) == ("completed", ["written"])


def test_an_autocommit_engine_gives_transactions_all_the_same(url: str, engine: Engine) -> None:
    def fails(session: Session) -> None:
        flushes(session)
        raise ValueError

    automatic = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        row = outcome(automatic, transactional(fails))
        with automatic.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            assert raw.autocommit  # and it is given back as it was
    finally:
        automatic.dispose()

    assert (row["state"], notes(engine)) == ("retryable", [])


# ---- the user's sessions


class TheirSession(Session):
    """A user's own class."""

    def greet(self) -> str:
        return "hello"


def test_sessions_come_from_the_users_maker_with_its_class_options_and_events(engine: Engine) -> None:
    maker = sessionmaker(engine, class_=TheirSession, expire_on_commit=False, autoflush=False, info={"tenant": 7})
    heard: list[str] = []
    event.listen(maker, "before_flush", lambda *_: heard.append("before_flush"))
    event.listen(maker, "before_commit", lambda *_: heard.append("before_commit"))
    seen: list[Any] = []

    def handler(job: JobContext[Count], session: TheirSession) -> None:
        note = Note(words="written")
        session.add(note)
        seen.extend([session.greet(), session.autoflush, session.expire_on_commit, session.info["tenant"]])

    row = outcome(engine, handling(handler, transactional=True), sessions=maker)

    assert row["state"] == "completed"
    assert seen == ["hello", False, False, 7]
    assert heard == ["before_commit", "before_flush"]
    assert notes(engine) == ["written"]


def fails_after_a_commit(session: Session) -> None:
    add(session)
    session.commit()
    raise ValueError


class Routed(Session):
    """Chooses by itself where things go, as Flask-SQLAlchemy's does."""

    engines: dict[str, Engine]

    def get_bind(self, mapper: Any = None, **_: Any) -> Engine:
        return self.engines["foreign" if mapper is not None and mapper.class_ is Foreign else "own"]


class Foreign(Base):
    """A row of another database."""

    __tablename__ = "foreign_note"
    id: Mapped[int] = mapped_column(primary_key=True)


def routed(engine: Engine, foreign: Engine) -> sessionmaker[Routed]:
    made = type("Made", (Routed,), {"engines": {"own": engine, "foreign": foreign}})
    return sessionmaker(class_=made)


def bound(engine: Engine, foreign: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine, binds={Note: engine, Foreign: foreign})


def option_engine(engine: Engine, foreign: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine.execution_options(theirs=True), binds={Foreign: foreign})


MAKERS: Final = [bound, routed, option_engine]


@pytest.mark.parametrize("make", MAKERS)
def test_binds_lead_to_the_transaction_of_the_job(engine: Engine, other: Engine, make: Any) -> None:
    workers = transactional(fails_after_a_commit)
    workers.register(Greet, transactional=True)(lambda _, session: add(session, "greeted"))
    (failing,) = put(engine, 0)
    make_jobs(engine, 1, kind="greet", args={"name": "x"})

    with working(engine, workers, sessions=make(engine, other)):
        eventually(lambda: count_states(engine) == {"completed": 1, "retryable": 1}, what="both")

    assert errors(read_job(engine, failing)) == ["ValueError"]
    assert notes(engine) == ["greeted"]


@pytest.mark.parametrize("make", MAKERS)
def test_another_engine_is_refused(engine: Engine, other: Engine, make: Any) -> None:
    def reaches_out(session: Session) -> None:
        add(session)
        session.flush()
        session.add(Foreign())

    row = outcome(engine, transactional(reaches_out), sessions=make(engine, other))

    assert errors(row)[0].startswith(f"{ForeignBindError.__name__}: ")
    assert notes(engine) == []


def test_flask_sqlalchemys_session_is_led_to_the_transaction(engine: Engine, url: str) -> None:
    flask = pytest.importorskip("flask")
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    app = flask.Flask("app")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db = flask_sqlalchemy.SQLAlchemy(app)

    class InApp:
        def work(self, job: JobContext[Any], call_next: Callable[[JobContext[Any]], Any]) -> Any:
            with app.app_context():
                return call_next(job)

    with app.app_context():
        theirs, maker = db.engine, db.session.session_factory
    (job_id,) = put(engine, 0)
    try:
        for writes in (fails_after_a_commit, commits):
            workers = transactional(writes, retry=after(timedelta(0)))
            with working(theirs, workers, sessions=maker, middleware=[InApp()]):
                attempt = 1 if writes is fails_after_a_commit else 2
                eventually(lambda: read_job(engine, job_id)["attempt"] >= attempt, what="the attempt")  # noqa: B023
                if writes is commits:
                    eventually(all_are(engine, "completed", 1))
                else:
                    eventually(lambda: errors(read_job(engine, job_id)), what="the failure")
    finally:
        theirs.dispose()

    assert set(errors(read_job(engine, job_id))) == {"ValueError"}
    assert notes(engine) == ["written"]


def test_a_scoped_session_is_the_session_of_the_job_inside_the_handler(engine: Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))
    same: list[bool] = []

    def uses_it(session: Session) -> None:
        same.append(scoped() is session)
        scoped.add(Note(words="written"))
        scoped.commit()
        if len(same) == 1:
            raise ValueError

    (job_id,) = put(engine, 0)
    with working(engine, transactional(uses_it, retry=after(timedelta(0))), sessions=scoped):
        eventually(all_are(engine, "completed", 1))

    assert same == [True, True]
    assert read_job(engine, job_id)["attempt"] == 2
    assert notes(engine) == ["written"]
    assert not scoped.registry.has()


def test_a_scoped_session_that_was_removed_fails_the_attempt(engine: Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))

    def removes(session: Session) -> None:
        flushes(session)
        scoped.remove()

    row = outcome(engine, transactional(removes), sessions=scoped)

    assert errors(row)[0].startswith("TransactionOver: ")
    assert notes(engine) == []


def nothing(_: JobContext[Count], __: Session) -> None:
    return None


async def nothing_async(_: JobContext[Count], __: AsyncSession) -> None:
    return None


def test_sessions_that_lead_elsewhere_are_refused_at_the_start(engine: Engine, other: Engine) -> None:
    for sessions in (
        sessionmaker(other),
        scoped_session(sessionmaker(other)),
        sessionmaker(engine, binds={Job: other}),
    ):
        runner = Runner(engine, handling(nothing, transactional=True), queues={"default": 1}, sessions=sessions)
        with pytest.raises(ConfigError, match="give both the same engine"):
            runner.start()
        assert runner.id is None


def test_async_sessions_that_lead_elsewhere_are_refused_at_the_start(engine: Engine, run_async: AsyncEngine) -> None:
    elsewhere = create_async_engine(engine.url)
    runner = Runner(
        engine,
        handling(nothing_async, transactional=True),
        queues={"default": 1},
        sessions=async_sessionmaker(elsewhere),
        async_engine=run_async,
    )
    with pytest.raises(ConfigError, match="give both the same engine"):
        runner.start()


def test_sessions_that_are_no_maker_are_refused_at_the_start(engine: Engine) -> None:
    runner = Runner(engine, handling(nothing, transactional=True), queues={"default": 1}, sessions=Session)
    with pytest.raises(ConfigError, match="sessionmaker"):
        runner.start()


def test_async_transactional_handlers_without_an_async_engine_are_refused_at_the_start(engine: Engine) -> None:
    runner = Runner(engine, handling(nothing_async, transactional=True), queues={"default": 1})
    with pytest.raises(ConfigError, match=r"count.*async_engine="):
        runner.start()


def test_a_maker_without_a_bind_serves(engine: Engine) -> None:
    row = outcome(engine, transactional(commits), sessions=sessionmaker())

    assert (row["state"], notes(engine)) == ("completed", ["written"])


# ---- async, in brief


async def async_only_adds(session: AsyncSession) -> None:
    session.add(Note(words="written"))


async def async_commits_twice(session: AsyncSession) -> None:
    session.add(Note(words="written"))
    await session.commit()
    await session.commit()


async def async_savepoints(session: AsyncSession) -> None:
    async with session.begin_nested():
        session.add(Note(words="written"))
    async with session.begin_nested() as savepoint:
        session.add(Note(words="undone"))
        await session.flush()
        await savepoint.rollback()


async def async_uses_its_connection(session: AsyncSession) -> None:
    connection = await session.connection()
    await connection.execute(text("INSERT INTO note (words) VALUES ('written')"))


async def async_closes(session: AsyncSession) -> None:
    session.add(Note(words="written"))
    await session.flush()
    await session.close()


ASYNC_SETTLING: Final = [
    async_only_adds,
    async_commits_twice,
    async_savepoints,
    async_uses_its_connection,
    async_closes,
]


def async_transactional(writes: Callable[[AsyncSession], Any], fails: bool = False) -> Workers:
    async def handler(_: JobContext[Count], session: AsyncSession) -> None:
        await writes(session)
        if fails:
            raise ValueError("at the end")

    return handling(handler, transactional=True)


@pytest.mark.parametrize("writes", ASYNC_SETTLING)
def test_what_an_async_handler_wrote_is_stored_once_with_its_job(
    engine: Engine, run_async: AsyncEngine, writes: Any
) -> None:
    row = outcome(engine, async_transactional(writes), async_engine=run_async)

    assert (row["state"], errors(row), notes(engine)) == ("completed", [], ["written"])


@pytest.mark.parametrize("writes", ASYNC_SETTLING)
def test_an_error_of_an_async_handler_undoes_all_of_it(engine: Engine, run_async: AsyncEngine, writes: Any) -> None:
    row = outcome(engine, async_transactional(writes, fails=True), async_engine=run_async)

    assert (row["state"], errors(row), notes(engine)) == ("retryable", ["ValueError: at the end"], [])


def test_an_async_handler_that_rolls_back_and_goes_on_stores_nothing(engine: Engine, run_async: AsyncEngine) -> None:
    async def goes_on(session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))
        await session.rollback()
        session.add(Note(words="written"))
        await session.commit()

    row = outcome(engine, async_transactional(goes_on), async_engine=run_async)

    assert errors(row)[0].startswith("TransactionOver: ")
    assert notes(engine) == []


def test_async_sessions_come_from_the_users_maker(engine: Engine, run_async: AsyncEngine) -> None:
    class Theirs(AsyncSession):
        sync_session_class = TheirSession

    maker = async_sessionmaker(run_async, class_=Theirs, autoflush=False)
    seen: list[Any] = []

    async def writes(session: AsyncSession) -> None:
        seen.extend([isinstance(session, Theirs), session.sync_session.greet(), session.autoflush])  # type: ignore[attr-defined]
        await enqueue_async(session, Greet("next"))

    row = outcome(engine, async_transactional(writes), async_engine=run_async, sessions=maker)

    assert row["state"] == "completed"
    assert seen == [True, "hello", False]
    assert count_states(engine) == {"completed": 1, "available": 1}


def test_an_async_handler_that_is_cancelled_stores_nothing(engine: Engine, run_async: AsyncEngine) -> None:
    async def sleeps(session: AsyncSession) -> None:
        session.add(Note(words="written"))
        await session.flush()
        await asyncio.sleep(60)

    row = outcome(engine, async_transactional(sleeps), async_engine=run_async, timeout=timedelta(seconds=0.1))

    assert errors(row)[0].startswith("TimeoutError: ")
    assert notes(engine) == []


# ---- exactly once, whatever dies

INCREMENTS: Final = """
import sys
from datetime import timedelta
from sqlalchemy import create_engine, text
from sqla_river import Runner, Workers
from tests.making import Count

url = sys.argv[1]
workers = Workers()

@workers.register(Count, transactional=True, retry=lambda job: timedelta(0))
def increment(job, session):
    session.execute(text("UPDATE account SET total = total + 1 WHERE id = :id"), {"id": job.args.number % 10})
    session.commit()

times = {"heartbeat": timedelta(seconds=0.2), "lease": timedelta(seconds=1.2)}
Runner(create_engine(url, pool_size=8), workers, queues={"default": 8}, **times).run()
"""


def _has_a_runner(engine: Engine, pid: int) -> bool:
    with engine.connect() as connection:
        found = text("SELECT count(*) FROM river_runner WHERE id LIKE :shape")
        return bool(connection.execute(found, {"shape": f"%:{pid}:%"}).scalar_one())


def increments(engine: Engine, url: str, jobs: int, kills: int) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE account AS SELECT n AS id, 0 AS total FROM generate_series(0, 9) n"))
    with Session(engine) as session, session.begin():
        enqueue_many(session, (Count(number) for number in range(jobs)))

    def done() -> int:
        return count_states(engine).get("completed", 0)

    processes = [spawn(INCREMENTS, url) for _ in range(2)]
    try:
        for number in range(kills):
            eventually(lambda: done() >= (number + 1) * jobs // (kills + 2), 60, "some increments")  # noqa: B023
            bury(processes.pop(0))
            processes.append(spawn(INCREMENTS, url))
        eventually(all_are(engine, "completed", jobs), 120)
        for process in processes:  # one that is still starting has no handler for the signal yet
            eventually(partial(_has_a_runner, engine, process.pid), 30, "its runner")
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            assert process.wait(20) == 0

    with engine.connect() as connection:
        assert connection.execute(text("SELECT sum(total) FROM account")).scalar() == jobs
    assert max(row["attempt"] for row in read_jobs(engine)) >= 2, "no kill hit a running job"


@pytest.mark.crash
def test_increments_under_killed_runners_are_exact(engine: Engine, url: str, request: pytest.FixtureRequest) -> None:
    """1,000 of them in CI; 10,000 with ``--rounds 100``."""
    rounds = int(request.config.getoption("--rounds") or 10)
    increments(engine, url, jobs=100 * rounds, kills=max(rounds // 5, 2))
