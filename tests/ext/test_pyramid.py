"""Pyramid: what a request enqueues, and what surrounds a job."""

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import pytest
import transaction
import zope.sqlalchemy
from pyramid import config as pyramid_config
from pyramid import request as pyramid_request
from pyramid import threadlocal
from pyramid.exceptions import ConfigurationConflictError, ConfigurationExecutionError
from pyramid.response import Response
from sqlalchemy import Engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_river import InsertOptions, Job, JobContext, River, Snooze, Unique, Workers
from sqla_river.errors import ConfigError, RegistrationError
from sqla_river.ext.pyramid import parse_queues, river_of, runner
from tests.database import emptied, shared_database
from tests.making import Count, Greet, eventually
from tests.working import HOUR, Base, Note, after, errors, notes, nothing, put, settled

Configurator: Any = cast("Any", pyramid_config).Configurator  # Pyramid has no types
Request: Any = cast("Any", pyramid_request).Request
get_current_request: Any = cast("Any", threadlocal).get_current_request
manager: Any = cast("Any", threadlocal).manager

workers = Workers()
"""Named by `test_a_directive_takes_workers_or_their_dotted_name`."""


@workers.register(Greet)
def greet(_: JobContext[Greet]) -> None:
    """Never called."""


OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """An engine whose connections must all be back when the test ends: none waits for the garbage collector."""
    for engine in emptied(url):
        Base.metadata.create_all(engine)
        yield engine
        kept: int = cast("Any", engine.pool).checkedout()
        if kept:
            with engine.begin() as connection:  # else what comes next waits for their locks
                connection.execute(text(f"SELECT pg_terminate_backend(pid) {OTHERS}"))
        assert kept == 0


def zoped(factory: "sessionmaker[Session]", request: Any) -> Session:
    """The session of a request, as Pyramid's starter for SQLAlchemy makes it."""
    session = factory(info={"request": request})
    cast("Any", zope.sqlalchemy).register(session, transaction_manager=request.tm)
    return session


def plain(factory: "sessionmaker[Session]", _request: Any) -> Session:
    """The session of a request, as an application without a transaction manager makes it."""
    return factory()


def configured(engine: Engine, settings: Mapping[str, Any] = {}, *, tm: bool = True) -> Any:
    """A Configurator with sessions, and with us."""
    config = Configurator(settings={"tm.manager_hook": "pyramid_tm.explicit_manager", **settings})
    factory = sessionmaker(engine)
    config.registry["dbsession_factory"] = factory
    if tm:
        config.include("pyramid_tm")
    config.add_request_method(partial(zoped if tm else plain, factory), "dbsession", reify=True)
    config.include("sqla_river.ext.pyramid")
    return config


def working(config: Any, handler: Any, **settings: Any) -> Any:
    """The application's registry; `Count` is worked by *handler*."""
    found = Workers()
    found.register(Count, **settings)(handler)
    config.add_river_workers(found)
    config.commit()
    return config.registry


def outcome(engine: Engine, registry: Any, **options: Any) -> Any:
    """The row of one job after one attempt by the application's runner."""
    (job_id,) = put(engine, 0)
    with runner(registry, **options):
        return settled(engine, job_id)


def numbers(engine: Engine) -> list[int]:
    with Session(engine) as session:
        return [args["number"] for args in session.scalars(select(Job.args).order_by(Job.id))]


# ---- requests --------------------------------------------------------------------------------------------------------

COUNTED = Unique(by_args=True)


def put_one(request: Any, number: int) -> None:
    request.enqueue(Count(number))


def put_later(request: Any, number: int) -> None:
    request.enqueue(Count(number), priority=2, scheduled_at=HOUR)


def put_unique(request: Any, number: int) -> None:
    assert request.enqueue(Count(number), unique=COUNTED).inserted


def put_many(request: Any, number: int) -> None:
    request.enqueue_many([Count(number)])


def put_many_unique(request: Any, number: int) -> None:
    assert request.enqueue_many([(Count(number), InsertOptions(unique=COUNTED))], returning=True).ids != [None]


@pytest.mark.parametrize("how", [put_one, put_later, put_unique, put_many, put_many_unique])
def test_jobs_commit_and_vanish_with_the_request(engine: Engine, how: Any) -> None:
    """The job is all that the request does: nothing else would make zope.sqlalchemy commit."""

    def view(request: Any) -> Response:
        how(request, int(request.params["number"]))
        if "doom" in request.params:
            request.tm.doom()
        if "raise" in request.params:
            raise LookupError
        return Response("done")

    config = configured(engine)
    config.add_route("put", "/")
    config.add_view(view, route_name="put")
    app = config.make_wsgi_app()

    assert Request.blank("/?number=1").get_response(app).text == "done"
    assert Request.blank("/?number=2&doom=1").get_response(app).text == "done"
    with pytest.raises(LookupError):
        Request.blank("/?number=3&raise=1").get_response(app)
    assert Request.blank("/?number=4").get_response(app).text == "done"

    assert numbers(engine) == [1, 4]


def test_without_a_transaction_manager_the_session_decides(engine: Engine) -> None:
    config = configured(engine, tm=False)
    config.commit()
    with river_of(config.registry).request() as request:
        request.enqueue(Count(1))
        request.enqueue_many([Count(2)])
        request.dbsession.commit()
        request.enqueue_many([Count(3)])
        request.dbsession.close()

    assert sorted(numbers(engine)) == [1, 2]


def test_the_session_may_have_another_name(engine: Engine) -> None:
    config = configured(engine, {"sqla_river.session": "db"}, tm=False)
    config.add_request_method(partial(plain, sessionmaker(engine)), "db", reify=True)
    config.commit()

    with river_of(config.registry).request() as request:
        job = request.enqueue(Count(1))
        assert job in request.db
        request.db.close()


def test_a_request_without_a_session_is_told_the_setting(engine: Engine) -> None:
    def broken(request: Any) -> Any:
        return request.nothing_of_that_name

    config = configured(engine, {"sqla_river.session": "db"})
    config.add_request_method(broken, "broken", reify=True)
    config.commit()
    other = configured(engine, {"sqla_river.session": "broken"})
    other.add_request_method(broken, "broken", reify=True)
    other.commit()

    with (
        river_of(config.registry).request() as request,
        pytest.raises(ConfigError, match=r"no 'db'; let the setting sqla_river.session"),
    ):
        request.enqueue(Count(1))
    with river_of(other.registry).request() as request, pytest.raises(AttributeError, match="nothing_of_that_name"):
        request.enqueue(Count(1))


# ---- settings and directives -----------------------------------------------------------------------------------------


def test_including_needs_no_setting_and_no_workers() -> None:
    config = Configurator()
    config.include("sqla_river.ext.pyramid")
    config.commit()

    assert river_of(config.registry).river.job_class is Job
    with pytest.raises(ConfigError, match="there are no workers"):
        runner(config.registry)


def test_without_the_include_a_runner_says_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"no sqla_river; write config\.include"):
        runner(Configurator().registry)


def test_settings_make_the_river_and_the_queues(engine: Engine) -> None:
    said = {"sqla_river.schema": "jobs", "sqla_river.notify": "off", "sqla_river.queues": "default=3\nemails=5"}
    config = configured(engine, said)
    working(config, greet)
    river = river_of(config.registry).river

    assert river.job_class.__table__.schema == "jobs"
    assert river.settings.notify == "off"
    assert runner(config.registry).queues == {"default": 3, "emails": 5}
    assert runner(config.registry, queues={"default": 1}).queues == {"default": 1}
    assert river_of(configured(engine, said).registry).river.job_class is river.job_class


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"queue": "a=1"}, "no such setting: sqla_river.queue; there are sqla_river.base_url, "),
        ({"queues": "default"}, "as in 'default=10 emails=50', got 'default'"),
        ({"queues": "a=1 a=2"}, "each once"),
        ({"queues": "a=x"}, "got 'a=x'"),
    ],
)
def test_a_wrong_setting_is_refused_at_the_include(said: dict[str, str], complaint: str) -> None:
    config = Configurator(settings={f"sqla_river.{name}": value for name, value in said.items()})

    with pytest.raises(ConfigError, match=complaint):
        config.include("sqla_river.ext.pyramid")


def test_queues_are_parted_by_spaces_commas_or_lines() -> None:
    assert parse_queues("\n default=10\n emails=50,sms=1, bulk=2") == {"default": 10, "emails": 50, "sms": 1, "bulk": 2}


def test_a_river_of_its_own_and_its_settings_exclude_each_other(engine: Engine) -> None:
    own = River.of(Job)
    config = configured(engine)
    config.set_river_options(river=own)
    config.commit()
    both = configured(engine, {"sqla_river.notify": "off"})
    both.set_river_options(river=own)

    assert river_of(config.registry).river is own
    with pytest.raises(
        ConfigurationExecutionError, match=r"sqla_river.notify and set_river_options\(river=...\) are both said"
    ):
        both.commit()


def test_a_wrong_mode_is_refused_when_the_application_starts() -> None:
    config = Configurator(settings={"sqla_river.notify": "loudly", "sqla_river.schema": "mode"})
    config.include("sqla_river.ext.pyramid")

    with pytest.raises(ConfigurationExecutionError, match=r"notify must be one of .* got 'loudly'"):
        config.commit()


def test_workers_are_an_object_or_its_dotted_name(engine: Engine) -> None:
    config = configured(engine)
    config.add_river_workers(f"{__name__}.workers")
    late = Workers()
    config.add_river_workers(late)
    config.commit()
    late.register(Count)(nothing)

    assert runner(config.registry).workers.kinds == [Count.kind, Greet.kind]

    config.add_river_workers(workers)
    with pytest.raises(ConfigError, match="takes a Workers or its dotted name, got function"):
        config.add_river_workers(f"{__name__}.greet")
    config.commit()
    with pytest.raises(RegistrationError, match="'greet' has a worker already"):
        runner(config.registry)


def test_options_are_said_once_and_those_of_the_call_come_first(engine: Engine) -> None:
    config = configured(engine)
    config.set_river_options(queues={"a": 1})
    working(config, greet)

    assert runner(config.registry).queues == {"a": 1}
    assert runner(config.registry, queues={"b": 2}).queues == {"b": 2}
    config.set_river_options(queues={"a": 1})
    config.set_river_options(queues={"a": 2})
    with pytest.raises(ConfigurationConflictError):
        config.commit()


# ---- jobs ------------------------------------------------------------------------------------------------------------


def write(words: str) -> Any:
    """Write with the session of the current request; the request."""
    request = get_current_request()
    assert request is not None
    request.dbsession.add(Note(words=words))
    request.dbsession.flush()
    return request


def test_each_job_has_a_request_and_a_transaction_of_its_own(engine: Engine) -> None:
    """And whatever ends the handler, the request is closed after it."""
    seen: list[Any] = []
    finished: list[Any] = []

    def handler(job: JobContext[Count]) -> Any:
        number = job.args.number
        request = write(f"note {number}")
        request.add_finished_callback(finished.append)
        request.enqueue_many([Count(number + 100)])
        seen.append((request, request.tm.get(), request.route_url("home")))
        if number == 1:
            raise LookupError
        if number == 2:
            raise Snooze(HOUR)
        if number == 3:
            request.tm.doom()
        return Snooze(HOUR) if number == 4 else None

    config = configured(engine, {"sqla_river.base_url": "https://shop.example.org/eu"})
    config.add_route("home", "/home")
    registry = working(config, handler, retry=after(HOUR))
    ids = put(engine, 0, 1, 2, 3, 4, queue="first")
    with runner(registry, queues={"first": 1}):
        rows = [settled(engine, job_id) for job_id in ids]

    assert [row["state"] for row in rows] == ["completed", "retryable", "scheduled", "retryable", "scheduled"]
    assert ["DoomedTransaction" in str(errors(row)) for row in rows] == [False, False, False, True, False]
    assert sorted(notes(engine)) == ["note 0", "note 4"]
    assert sorted(numbers(engine)) == [0, 1, 2, 3, 4, 100, 104]
    requests = [request for request, _, _ in seen]
    assert finished == requests
    assert len(set(map(id, requests))) == len({id(begun) for _, begun, _ in seen}) == len(ids)
    assert {url for _, _, url in seen} == {"https://shop.example.org/eu/home"}
    assert manager.stack == []  # of this thread: runner() has made a request too


def test_a_request_that_cannot_be_made_or_closed_fails_the_attempt_and_leaves_nothing_in_the_thread(
    engine: Engine,
) -> None:
    depths: list[int] = []

    def fails(_: Any) -> None:
        raise LookupError("at the end")

    def handler(job: JobContext[Count]) -> None:
        depths.append(len(manager.stack))
        if job.args.number == 1:
            get_current_request().add_finished_callback(fails)

    def root(request: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            depths.append(len(manager.stack))
            if len(depths) == 1:
                raise LookupError("no root")

    config = configured(engine)
    config.set_root_factory(root)
    registry = working(config, handler, retry=after(HOUR))
    ids = put(engine, 0, 1, 2)
    with runner(registry, queues={"default": 1}):
        rows = [settled(engine, job_id) for job_id in ids]

    assert [errors(row) for row in rows] == [["LookupError: no root"], ["LookupError: at the end"], []]
    assert depths == [1] * 5


def test_without_pyramid_tm_the_handler_commits(engine: Engine) -> None:
    def handler(_: JobContext[Count]) -> None:
        write("kept").dbsession.commit()
        write("lost").dbsession.close()

    row = outcome(engine, working(configured(engine, tm=False), handler))

    assert row["state"] == "completed"
    assert notes(engine) == ["kept"]


def test_in_a_transactional_job_the_session_of_the_request_is_the_jobs(engine: Engine) -> None:
    def handler(job: JobContext[Count], session: Session) -> None:
        request = write(f"note {job.args.number}")
        assert request.dbsession is session
        request.enqueue(Count(job.args.number + 100))
        session.commit()
        if job.args.number == 1:
            raise LookupError

    registry = working(configured(engine), handler, transactional=True, retry=after(HOUR))
    ids = put(engine, 0, 1, queue="first")
    with runner(registry, queues={"first": 2}):
        rows = [settled(engine, job_id) for job_id in ids]

    assert [row["state"] for row in rows] == ["completed", "retryable"]
    assert notes(engine) == ["note 0"]
    assert sorted(numbers(engine)) == [0, 1, 100]


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit manager", "manager of the thread"])
def test_a_transactional_job_that_ends_the_transaction_manager_stores_nothing(
    engine: Engine, *, explicit: bool
) -> None:
    def handler(job: JobContext[Count], session: Session) -> None:
        tm = write(f"note {job.args.number}").tm
        ends = [(tm.abort,), (tm.doom,), (tm.commit, tm.begin)]
        for end in ends[job.args.number]:
            end()

    hook = "pyramid_tm.explicit_manager" if explicit else None
    registry = working(configured(engine, {"tm.manager_hook": hook}), handler, transactional=True, retry=after(HOUR))
    ids = put(engine, 0, 1, 2)
    with runner(registry):
        rows = [settled(engine, job_id) for job_id in ids]

    assert [row["state"] for row in rows] == ["retryable"] * 3
    assert "ended the transaction of request.tm" in str(errors(rows[0]))
    assert notes(engine) == []


def test_transactional_sessions_are_of_the_applications_class(engine: Engine) -> None:
    class Own(Session):
        pass

    seen: list[bool] = []

    def handler(_: JobContext[Count], session: Session) -> None:
        seen.append(isinstance(session, Own) and not session.expire_on_commit)

    factory = sessionmaker(engine, class_=Own, expire_on_commit=False)
    for given in (factory, scoped_session(factory)):
        config = configured(engine)
        config.registry["dbsession_factory"] = given
        assert outcome(engine, working(config, handler, transactional=True))["state"] == "completed"
    config = configured(engine)
    del config.registry["dbsession_factory"]
    assert outcome(engine, working(config, handler, transactional=True))["state"] == "completed"

    assert seen == [True, True, False]


def test_sessions_that_zope_commits_are_refused_for_transactional_jobs(engine: Engine) -> None:
    def handler(*_: Any) -> None:
        """Never called."""

    def registry(**settings: Any) -> Any:
        config = configured(engine)
        factory = sessionmaker(engine)
        cast("Any", zope.sqlalchemy).register(factory, transaction_manager=transaction.TransactionManager())
        config.registry["dbsession_factory"] = factory
        return working(config, handler, **settings)

    runner(registry())
    runner(registry(transactional=True), sessions=sessionmaker(engine))
    with pytest.raises(ConfigError, match=r"registry\['dbsession_factory'\].* are registered with zope.sqlalchemy"):
        runner(registry(transactional=True))
    with pytest.raises(ConfigError, match="must be a sessionmaker or a scoped_session, got type"):
        runner(registry(), sessions=AsyncSession)


def test_an_async_handler_has_no_request(engine: Engine) -> None:
    made: list[str] = []
    seen: list[Any] = []

    def root(_: Any) -> None:
        made.append(threading.current_thread().name)

    async def handler(_: JobContext[Count]) -> None:
        seen.append(get_current_request())

    config = configured(engine)
    config.set_root_factory(root)
    assert outcome(engine, working(config, handler))["state"] == "completed"
    assert seen == [None]
    assert made == [threading.current_thread().name]  # that of runner(), to find the engine


def test_middleware_of_the_application_runs_inside_the_request(engine: Engine) -> None:
    seen: list[str] = []

    class Middleware:
        def work(self, job: JobContext[Any], call_next: Any, /) -> Any:
            seen.append(type(get_current_request()).__name__)
            return call_next(job)

    config = configured(engine)
    config.set_river_options(middleware=[Middleware()])
    outcome(engine, working(config, nothing))

    eventually(lambda: seen == ["Request"])
