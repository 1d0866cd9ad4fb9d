"""FlaskRiver: jobs join the request's session, and run inside an app context."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs
import pytest
from flask import Flask, current_app, has_app_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

import sqla_river
from sqla_river import InsertOptions, Job, JobContext, JobMixin, River, Runner, Workers, create_all
from sqla_river.errors import ConfigError
from sqla_river.ext.flask import FlaskRiver, extension
from sqla_river.models import RiverBase
from sqla_river.testing import drain
from tests.database import emptied, shared_database
from tests.making import Count, all_are, count_states, eventually, read_jobs
from tests.working import after, errors, is_state, notes, settled

NOW: Final = after(timedelta(0))


@attrs.frozen
class Write:
    """Writes a note of these words."""

    kind: ClassVar[str] = "write"
    words: str


class Shop:
    """An app with Flask-SQLAlchemy, a table, and what its handlers saw."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.seen: list[Any] = []
        self.workers = Workers()
        self.db: Any = SQLAlchemy(model_class=type("Base", (DeclarativeBase,), {}))
        self.app = Flask("shop")
        self.app.config |= {"SQLALCHEMY_DATABASE_URI": url, **settings}
        self.db.init_app(self.app)

        class Note(self.db.Model):  # type: ignore[name-defined,misc]
            __tablename__ = "note"
            id: Mapped[int] = mapped_column(primary_key=True)
            words: Mapped[str] = mapped_column(unique=True)

        self.note: Any = Note
        with self.app.app_context():
            self.db.create_all()

    def close(self) -> None:
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.fixture
def shop(engine: Engine, url: str) -> Iterator[Shop]:
    shop = Shop(url)
    yield shop
    shop.close()


def put(river: FlaskRiver[Any], shop: Shop, *args: Any) -> list[int]:
    with shop.app.app_context():
        jobs = [river.enqueue(each) for each in args]
        shop.db.session.commit()
        return [job.id for job in jobs]


# ---- enqueueing


@pytest.fixture
def selling(shop: Shop) -> Shop:
    """With views that enqueue, and then commit, roll back or fail."""
    river = FlaskRiver(shop.app, workers=shop.workers)
    session = shop.db.session

    def sell(how: str) -> str:
        session.add(shop.note(words=how))
        shop.seen.append(river.enqueue(Count(1), priority=3) in session)
        river.enqueue_many([Count(2), (Count(3), InsertOptions(queue="other"))])
        if how == "fail":
            raise ZeroDivisionError
        getattr(session, how)()
        return "sold"

    shop.app.add_url_rule("/<how>", view_func=sell)
    return shop


def test_jobs_of_a_view_commit_with_the_session_of_its_request(selling: Shop, engine: Engine) -> None:
    assert selling.app.test_client().get("/commit").status_code == 200

    jobs = read_jobs(engine)
    assert sorted((job["args"]["number"], job["priority"], job["queue"]) for job in jobs) == [
        (1, 3, "default"),
        (2, 1, "default"),
        (3, 1, "other"),
    ]
    assert notes(engine) == ["commit"]
    assert selling.seen == [True]


@pytest.mark.parametrize("how", ["rollback", "fail"])
def test_jobs_of_a_view_vanish_with_the_session_of_its_request(selling: Shop, engine: Engine, how: str) -> None:
    selling.app.test_client().get(f"/{how}")

    assert count_states(engine) == {}
    assert notes(engine) == []


def test_the_extension_is_where_flask_looks_for_it(shop: Shop) -> None:
    river = FlaskRiver()
    river.init_app(shop.app)

    assert shop.app.extensions["sqla_river"] is river
    assert "river" in shop.app.cli.commands


# ---- working


def test_each_job_has_an_app_context_and_a_session_that_is_removed(shop: Shop, engine: Engine) -> None:
    river = FlaskRiver(shop.app)
    session = shop.db.session

    @river.workers.register(Count, retry=NOW)
    def count(job: JobContext[Count]) -> None:
        shop.seen.append((current_app.name, session()))
        session.add(shop.note(words=f"{job.args.number}-{job.attempt}"))
        session.flush()
        if job.attempt == 1:
            raise RuntimeError("once")
        session.commit()
        session.scalars(select(shop.note)).all()

    put(river, shop, Count(1), Count(2))
    with river.runner(queues={"default": 1}):
        eventually(all_are(engine, "completed", 2))

    assert {name for name, _ in shop.seen} == {"shop"}
    assert len({id(each) for _, each in shop.seen}) == 4
    assert notes(engine) == ["1-2", "2-2"]
    with shop.app.app_context():
        assert shop.db.engine.pool.checkedout() == 0
    assert not has_app_context()


def test_in_a_transactional_job_the_session_of_flask_is_the_jobs(shop: Shop, engine: Engine) -> None:
    river = FlaskRiver(shop.app, workers=shop.workers)

    @shop.workers.register(Write, transactional=True, retry=NOW)
    def write(job: JobContext[Write], session: Session) -> None:
        shop.seen.append(shop.db.session() is session)
        shop.db.session.add(shop.note(words=f"{job.args.words}-{job.attempt}"))
        shop.db.session.commit()  # flushes, and commits nothing by itself
        shop.seen.append(notes(engine))
        if job.attempt == 1:
            raise RuntimeError("the first attempt is undone")
        river.enqueue(Count(1))

    (job_id,) = put(river, shop, Write("a"))
    with river.runner():
        eventually(is_state(engine, job_id, "completed"))
        row = settled(engine, job_id)

    assert shop.seen == [True, [], True, []]
    assert notes(engine) == ["a-2"]
    assert errors(row) == ["RuntimeError: the first attempt is undone"]
    assert count_states(engine) == {"completed": 1, "available": 1}


def test_events_of_the_commit_run_inside_the_app_context(shop: Shop, engine: Engine) -> None:
    """What the session does at the end of a transactional job may ask for the app."""
    from sqlalchemy import event

    river = FlaskRiver(shop.app, workers=shop.workers)

    def note_app(_: Session) -> None:
        shop.seen.append(current_app.name)

    with shop.app.app_context():
        event.listen(shop.db.session, "before_commit", note_app)

    @shop.workers.register(Write, transactional=True)
    def write(job: JobContext[Write], session: Session) -> None:
        session.add(shop.note(words=job.args.words))

    put(river, shop, Write("a"))
    shop.seen.clear()
    with river.runner():
        eventually(all_are(engine, "completed", 1))

    assert shop.seen == ["shop"]


def test_async_handlers_have_an_app_context_too(shop: Shop, engine: Engine) -> None:
    import asyncio

    river = FlaskRiver(shop.app, workers=shop.workers)
    both = asyncio.Barrier(2)

    @shop.workers.register(Count)
    async def count(job: JobContext[Count]) -> None:
        shop.seen.append((current_app.name, shop.db.session()))
        await both.wait()
        shop.seen.append((current_app.name, shop.db.session()))

    put(river, shop, Count(1), Count(2))
    with river.runner():
        eventually(all_are(engine, "completed", 2))

    assert {name for name, _ in shop.seen} == {"shop"}
    assert len({id(each) for _, each in shop.seen}) == 2


def test_an_async_transactional_handler_gets_the_session_of_its_job(shop: Shop, engine: Engine, url: str) -> None:
    shop.app.config["SQLA_RIVER_ASYNC_ENGINE"] = create_async_engine(url)
    river = FlaskRiver(shop.app, workers=shop.workers)

    @shop.workers.register(Write, transactional=True)
    async def write(job: JobContext[Write], session: AsyncSession) -> None:
        session.add(shop.note(words=f"{job.args.words} in {current_app.name}"))

    put(river, shop, Write("a"))
    with river.runner():
        eventually(all_are(engine, "completed", 1))

    assert notes(engine) == ["a in shop"]


def test_the_error_handler_is_asked_inside_the_app_context(shop: Shop, engine: Engine) -> None:
    river = FlaskRiver(shop.app, workers=shop.workers)

    def on_error(job: JobContext[Any], error: BaseException) -> None:
        shop.seen.append((current_app.name, str(error)))

    @shop.workers.register(Count)
    def count(job: JobContext[Count]) -> None:
        raise RuntimeError("broken")

    put(river, shop, Count(1))
    with river.runner(on_error=on_error):
        eventually(all_are(engine, "retryable", 1))

    assert shop.seen == [("shop", "broken")]


def test_the_test_kit_drains_in_the_session_of_the_tests_own_app_context(shop: Shop, engine: Engine) -> None:
    river = FlaskRiver(shop.app, workers=shop.workers)

    @shop.workers.register(Count)
    def count(job: JobContext[Count]) -> None:
        shop.seen.append((current_app.name, shop.db.session()))

    with shop.app.app_context():
        river.enqueue(Count(1))
        done = drain(shop.db.session, river.runner())
        assert [each.state for each in done] == ["completed"]
        assert shop.seen == [("shop", shop.db.session())]
        shop.db.session.rollback()

    assert count_states(engine) == {}


# ---- without Flask-SQLAlchemy


def test_a_scoped_session_of_ones_own(engine: Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))
    app = Flask("plain")
    river = FlaskRiver(app, session=scoped)
    seen: list[Any] = []

    @river.workers.register(Count)
    def count(job: JobContext[Count]) -> None:
        seen.append((current_app.name, scoped.scalars(select(Job.id).order_by(Job.id)).all()))

    @river.workers.register(Write, transactional=True)
    def write(job: JobContext[Write], session: Session) -> None:
        seen.append(scoped() is session)

    @app.get("/")
    def index() -> str:
        river.enqueue(Count(1))
        river.enqueue(Write("a"))
        scoped.commit()
        scoped.remove()
        return "sold"

    app.test_client().get("/")
    with river.runner():
        eventually(all_are(engine, "completed", 2))

    assert ("plain", [1, 2]) in seen
    assert True in seen
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_an_app_without_any_session_is_told_what_to_give() -> None:
    app = Flask("bare")
    river = FlaskRiver(app)

    with pytest.raises(ConfigError, match=r"'bare' has no session.*scoped_session"):
        river.enqueue(Count(1))


def test_a_session_that_is_not_scoped_is_refused() -> None:
    maker: Any = sessionmaker()

    with pytest.raises(ConfigError, match=r"session= takes a scoped_session, got sessionmaker; write scoped_session"):
        FlaskRiver(session=maker)


def test_a_session_that_leads_nowhere_is_told() -> None:
    app = Flask("bare")
    river = FlaskRiver(app, session=scoped_session(sessionmaker()))

    with pytest.raises(ConfigError, match="the session of 'bare' leads to no database for Job"):
        river.runner()


# ---- a Job of one's own, binds, schemas


@pytest.fixture
def other_url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_a_job_on_db_model_follows_its_bind(shop: Shop, engine: Engine, other_url: str, given: bool) -> None:
    two = Shop(engine.url.render_as_string(hide_password=False), SQLALCHEMY_BINDS={"jobs": other_url})

    class MyJob(JobMixin, two.db.Model):  # type: ignore[name-defined,misc]
        __bind_key__ = "jobs"

    river: FlaskRiver[Any] = FlaskRiver(two.app, river=River(job_class=MyJob)) if given else FlaskRiver(two.app)
    river.workers.register(Count)(lambda _: None)
    other = create_engine(other_url)
    with two.app.app_context():
        assert isinstance(river.enqueue(Count(1)), MyJob)
        river.enqueue_many([Count(2)])
        two.db.session.commit()
    assert (count_states(engine), count_states(other)) == ({}, {"available": 2})

    with river.runner():
        eventually(all_are(other, "completed", 2))
    other.dispose()
    two.close()


def test_notify_is_a_setting_of_the_job_class(shop: Shop) -> None:
    class MyJob(JobMixin, shop.db.Model):  # type: ignore[name-defined,misc]
        pass

    shop.app.config["SQLA_RIVER_NOTIFY"] = "after_commit"

    assert FlaskRiver(shop.app).river.settings.notify == "after_commit"
    assert MyJob.__river__.notify == "after_commit"


def test_two_job_classes_on_db_model_need_a_word_which(shop: Shop) -> None:
    class FirstJob(JobMixin, shop.db.Model):  # type: ignore[name-defined,misc]
        pass

    class SecondJob(JobMixin, shop.db.Model):  # type: ignore[name-defined,misc]
        __bind_key__ = "jobs"

    assert FirstJob is not SecondJob
    with pytest.raises(ConfigError, match=r"more than one Job class \(FirstJob, SecondJob\).*river=River"):
        FlaskRiver(shop.app).enqueue(Count(1))


def test_the_tables_may_have_a_schema_of_their_own(engine: Engine, url: str) -> None:
    create_all(engine, "flask_jobs")
    shop = Shop(url, SQLA_RIVER_SCHEMA="flask_jobs")
    river = FlaskRiver(shop.app)
    river.workers.register(Count)(lambda _: None)
    put(river, shop, Count(1))
    with shop.app.app_context():
        count = select(river.river.job_class.state)
        with river.runner():
            eventually(lambda: shop.db.session.rollback() or shop.db.session.scalars(count).all() == ["completed"])
        shop.db.session.remove()

    assert count_states(engine) == {}
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA flask_jobs CASCADE"))
    shop.close()


# ---- settings


def test_config_beats_the_constructor_and_a_call_beats_both(shop: Shop) -> None:
    shop.app.config["SQLA_RIVER_LEASE"] = timedelta(seconds=40)
    river = FlaskRiver(shop.app, queues={"default": 3})

    def said(runner: Runner) -> Any:
        return runner.queues, runner._orders.lease

    assert said(river.runner()) == ({"default": 3}, 40)
    shop.app.config["SQLA_RIVER_QUEUES"] = {"emails": 2}
    assert said(river.runner()) == ({"emails": 2}, 40)
    assert said(river.runner(queues={"sms": 1}, lease=timedelta(seconds=50))) == ({"sms": 1}, 50)


def test_every_setting_of_a_runner_is_documented() -> None:
    names = {*extension.OF_RUNNER, extension.NOTIFY, extension.SCHEMA, extension.IN_PROCESS}
    assert {line.split("``")[1] for line in (FlaskRiver.__doc__ or "").splitlines() if "``SQLA_RIVER" in line[:20]} == (
        names
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SQLA_RIVER_QUEUE": {"default": 1}}, "no such settings: SQLA_RIVER_QUEUE; there are .*SQLA_RIVER_QUEUES"),
        ({"SQLA_RIVER_NOTIFY": "never"}, "SQLA_RIVER_NOTIFY must be one of transaction, after_commit, off"),
        ({"SQLA_RIVER_SCHEMA": "s" * 47}, "at most 46 bytes"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_init_app(settings: dict[str, Any], message: str) -> None:
    app = Flask("app")
    app.config |= settings

    with pytest.raises(ValueError, match=message):
        FlaskRiver(app)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SQLA_RIVER_LEASE": 60}, "SQLA_RIVER_LEASE must be a timedelta, got 60"),
        ({"SQLA_RIVER_QUEUES": "default"}, "SQLA_RIVER_QUEUES must be slots by queue.*got 'default'"),
        ({"SQLA_RIVER_QUEUES": 5}, "SQLA_RIVER_QUEUES must be slots by queue.*got 5"),
        ({"SQLA_RIVER_QUEUES": {"default": "1"}}, "queue 'default' must have 1..10000 slots, got '1'"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_by_name(shop: Shop, settings: dict[str, Any], message: str) -> None:
    shop.app.config |= settings

    with pytest.raises(ConfigError, match=message):
        FlaskRiver(shop.app).runner()


class InSchema(JobMixin, RiverBase):
    __river_schema__ = "here"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SQLA_RIVER_NOTIFY": "off"}, "the River given to FlaskRiver says 'after_commit'"),
        ({"SQLA_RIVER_SCHEMA": "there"}, "SQLA_RIVER_SCHEMA is 'there', and InSchema is in 'here'"),
    ],
)
def test_settings_that_contradict_the_river_are_refused(settings: dict[str, Any], message: str) -> None:
    app = Flask("app")
    app.config |= settings

    with pytest.raises(ConfigError, match=message):
        FlaskRiver(app, river=River(job_class=InSchema, notify="after_commit"))


def test_all_that_the_library_reads_from_the_environment_may_stand_in_the_config(shop: Shop) -> None:
    """As with app.config.from_mapping(os.environ)."""
    package = Path(sqla_river.__file__).parent
    sources = [path.read_text() for path in package.rglob("*.py") if "ext" not in path.relative_to(package).parts]
    names = {name for source in sources for name in re.findall(r"SQLA_RIVER_\w+", source)}
    shop.app.config |= dict.fromkeys(names, "x") | {"SQLA_RIVER_QUEUES": "default=3, emails=2"}
    river = FlaskRiver(shop.app)

    assert {"SQLA_RIVER_PROCESSES", "SQLA_RIVER_METRICS_PORT", "SQLA_RIVER_SUPERVISOR"} < names
    assert names - set(extension.OF_RUNNER) - {extension.SCHEMA} == extension.OF_COMMAND_LINE
    assert river.runner().queues == {"default": 3, "emails": 2}


def test_one_extension_serves_several_apps(engine: Engine, url: str) -> None:
    first, second = Shop(url), Shop(url, SQLA_RIVER_QUEUES={"second": 1})
    river = FlaskRiver()
    river.init_app(first.app)
    river.init_app(second.app)

    with pytest.raises(ConfigError, match="attached to 2 apps"):
        river.runner()
    assert river.runner(second.app).queues == {"second": 1}
    with first.app.app_context():
        assert river.runner().queues == {"default": 10}
    with Flask("third").app_context(), pytest.raises(ConfigError, match=r"not attached to the app 'third'; call init_"):
        river.enqueue(Count(1))
    first.close()
    second.close()
