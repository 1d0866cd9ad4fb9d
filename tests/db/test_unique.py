"""Unique jobs: who holds a key, who comes second, and that no race makes two rows or a deadlock."""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final, cast

import attrs
import pytest
from sqlalchemy import Engine, MetaData, create_engine, event, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from sqla_river import InsertOptions, Job, JobMixin, JobState, River, Unique, delete, enqueue, enqueue_many, retry
from sqla_river.args import CattrsCodec, JobArgs
from sqla_river.errors import InvalidOptionError, UniqueKeyTakenError, UniqueNeedsEnqueueError, UniqueRaceError
from sqla_river.models import RiverBase
from sqla_river.statements import SCHEDULE_DUE, SCHEDULE_KEYLESS, SCHEDULE_ONE
from sqla_river.states import FINALIZED
from sqla_river.unique import ALWAYS
from tests.database import emptied, shared_database
from tests.jobs import Ping
from tests.making import make_job, opened, read_job, read_jobs
from tests.racing import Second
from tests.river_vectors import MARKED, VECTORS, unique_of

BY_ARGS = Unique(by_args=True)


@attrs.frozen
class Bill:
    kind: ClassVar[str] = "bill"

    customer: int
    number: int


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(shared: str) -> Iterator[Engine]:
    yield from emptied(shared)


def put(engine: Engine, number: int = 1, **options: Any) -> tuple[int, bool]:
    with Session(engine) as session, session.begin():
        given: Any = {"unique": BY_ARGS, **options}
        job = enqueue(session, Ping(number), **given)
        return job.id, job.inserted


def jobs_in(engine: Engine) -> list[int]:
    with Session(engine) as session:
        return list(session.scalars(select(Job.id).order_by(Job.id)))


def move(engine: Engine, job_id: int, state: JobState) -> None:
    with engine.begin() as connection:
        finalized = datetime.now(UTC) if state in FINALIZED else None
        connection.execute(update(Job).where(Job.id == job_id).values(state=state, finalized_at=finalized))


def test_the_second_of_a_key_is_the_first(engine: Engine) -> None:
    first, second, other = put(engine), put(engine), put(engine, 2)

    assert first[1] is True
    assert second == (first[0], False)
    assert other[1] is True
    assert jobs_in(engine) == [first[0], other[0]]


def test_of_many_with_one_key_in_a_block_the_first_is_kept(engine: Engine) -> None:
    by_customer = InsertOptions(unique=Unique(by_args=["customer"]))
    items = [Bill(number % 20, number) for number in range(1_000)]
    with Session(engine) as session, session.begin():
        inserted = enqueue_many(session, [(each, by_customer) for each in items], returning=True)

    kept = {row["id"]: row["args"]["number"] for row in read_jobs(engine)}
    assert (inserted.count, inserted.skipped) == (20, 980)
    assert inserted.ids is not None
    assert [kept.get(job_id) for job_id in inserted.ids if job_id is not None] == list(range(20))


def test_inserted_answers_for_the_last_call_where_both_return_one_object(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        answers: list[bool] = []
        jobs: list[Job] = []
        for _ in range(2):
            jobs.append(enqueue(session, Ping(1), unique=Unique(by_args=True)))
            answers.append(jobs[-1].inserted)

    assert jobs[0] is jobs[1]
    assert answers == [True, False]


@pytest.mark.parametrize("state", list(JobState))
def test_a_key_is_held_in_the_states_of_the_mask_only(engine: Engine, state: JobState) -> None:
    first, _ = put(engine)
    move(engine, first, state)

    again, new = put(engine)
    assert new is (state in {JobState.CANCELLED, JobState.DISCARDED})
    assert (again == first) is not new


def test_the_row_that_holds_the_key_is_neither_locked_nor_rewritten(engine: Engine) -> None:
    put(engine)
    with Session(engine) as session, session.begin():
        before = session.execute(text("SELECT xmin::text, ctid::text FROM river_job")).one()
        enqueue(session, Ping(1), unique=BY_ARGS)

        with engine.begin() as other:
            other.execute(text("SELECT 1 FROM river_job FOR UPDATE NOWAIT"))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT xmin::text, ctid::text FROM river_job")).one() == before


@attrs.frozen
class Customer:
    id: str = attrs.field(metadata={"sqla_river": {"unique": True}})
    name: str


@attrs.frozen
class Nested:
    kind: ClassVar[str] = "nested"
    customer: Customer
    n: int


@attrs.frozen
class Omit:
    kind: ClassVar[str] = "omit"
    a: int | None = attrs.field(default=None, metadata={"sqla_river": {"unique": True}})
    b: int = 1


class OmitEmpty(CattrsCodec):
    """Leaves out what is None, as ``omitempty`` does in Go."""

    def encode(self, args: JobArgs) -> bytes:
        given: dict[str, Any] = json.loads(super().encode(args))
        return json.dumps({key: value for key, value in given.items() if value is not None}).encode()


class Omitting(JobMixin, RiverBase):
    metadata = MetaData()


RIVER: Final[River[Any]] = River(job_class=Omitting, codec=OmitEmpty())


@attrs.frozen
class Struct:
    """A struct of Go's: its fields keep their order, where the keys of a map are sorted."""

    z: int
    a: int


def args_of(vector: dict[str, Any]) -> Any:
    """The args that River was given, as a class of ours."""
    given = json.loads(vector["encoded_args"])
    if vector["name"] == "struct_types":
        given["i"] = Struct(**given["i"])
    if vector["name"] in MARKED:
        return Nested(Customer(**given["customer"]), given["n"]) if "customer" in given else Omit(None, **given)
    anything: Any = Any
    named: dict[str, Any] = {
        f"field_{number}": attrs.field(
            type=Struct if isinstance(value, Struct) else anything, metadata={"sqla_river": {"name": key}}
        )
        for number, (key, value) in enumerate(given.items())
    }
    return attrs.make_class("Args", named, class_body={"kind": vector["kind"]})(*given.values())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_key_that_is_stored_is_that_of_river(engine: Engine, vector: dict[str, Any]) -> None:
    unique, _ = unique_of(vector)
    options: Any = {"unique": unique, "queue": vector["queue"]}
    options["scheduled_at"] = datetime.fromisoformat(vector["now"])  # whose period counts
    args = args_of(vector)
    with Session(engine) as session, session.begin():
        new = [RIVER.enqueue(session, args, **options).inserted]
        many = RIVER.enqueue_many(session, [(args, InsertOptions(**options))] * 2, returning=True)
        new.append(RIVER.enqueue(session, args, **options).inserted)

    with engine.connect() as connection:
        row = connection.execute(
            text("SELECT kind, args, encode(unique_key, 'hex'), unique_states::int FROM river_job")
        )
        expected = json.loads(vector["encoded_args"]), vector["key_hex"], vector["bitmask"]
        assert row.all() == [(vector["kind"], *expected)]
    assert new == [True, False]
    assert (many.count, many.skipped, many.ids) == (0, 2, [None, None])


@attrs.frozen
class Mapped:
    kind: ClassVar[str] = "mapped"
    numbers: dict[str, float]
    anything: Any


def test_equal_args_are_one_job_and_different_ones_are_not(engine: Engine) -> None:
    given = [
        Mapped({"a": 1.2345e-5, "b": 1}, [{"c": 1, "d": {"e": 1, "f": 2}}]),
        Mapped({"b": 1, "a": 1.2345e-5}, [{"d": {"f": 2, "e": 1}, "c": 1}]),
        Mapped({"a": 1.2399e-5, "b": 1}, [{"c": 1, "d": {"e": 1, "f": 2}}]),
    ]
    with Session(engine) as session, session.begin():
        jobs = [enqueue(session, args, unique=BY_ARGS) for args in given]

    assert given[0] == given[1]
    assert [job is jobs[0] for job in jobs] == [True, True, False]


@attrs.frozen
class Pay:
    kind: ClassVar[str] = "pay"
    payment: str = attrs.field(metadata={"sqla_river": {"unique": True, "name": "paymentId"}})
    note: str = ""


@attrs.frozen
class RefundOf(Pay):
    kind: ClassVar[str] = "refund"


def test_marked_fields_are_all_that_counts_and_named_ones_beat_them(engine: Engine) -> None:
    with Session(engine) as session, session.begin():

        def new(*args: str, **unique: Any) -> bool:
            return enqueue(session, Pay(*args), unique=Unique(**unique)).inserted

        assert [new(*pay, by_args=True) for pay in (("1", "a"), ("1", "b"), ("2", "a"))] == [True, False, True]
        assert [new(*pay, by_args=["note"]) for pay in (("1", "a"), ("2", "a"), ("1", "b"))] == [True, False, True]
        assert [new("1", by_queue=True), new("2", by_queue=True)] == [True, False]


def test_without_the_kind_jobs_of_two_kinds_are_one_and_the_first_stays_as_it_is(engine: Engine) -> None:
    """River's ON CONFLICT DO UPDATE writes the second kind over the first."""
    unique = Unique(by_args=True, exclude_kind=True)
    with Session(engine) as session, session.begin():
        first = enqueue(session, Pay("1", "a"), unique=unique)
        second = enqueue(session, RefundOf("1", "a"), unique=unique)

        assert (second.id, second.kind, second.inserted) == (first.id, "pay", False)
        assert enqueue(session, RefundOf("2", "a"), unique=unique).kind == "refund"


@pytest.mark.parametrize("many", [False, True])
def test_what_is_wrong_is_refused_at_the_call_and_the_session_goes_on(engine: Engine, many: bool) -> None:
    """With a name that no field has, all jobs of a kind would be the same one."""

    def put_one(session: Session, unique: Unique) -> object:
        if many:
            return enqueue_many(session, [(Pay("1"), InsertOptions(unique=unique))])
        return enqueue(session, Pay("1"), unique=unique)

    with Session(engine) as session, session.begin():
        session.execute(text("SELECT 1"))
        for by_args in (["payment"], ["paymentId", "typo"], ["customer.id"]):
            with pytest.raises(InvalidOptionError, match=r"by_args names .* JSON keys: note, paymentId"):
                put_one(session, Unique(by_args=by_args))
        with pytest.raises(InvalidOptionError, match=r"unique must be Unique\(...\)"):
            enqueue(session, Pay("1"), unique=cast("Any", {"by_args": True}))
        with pytest.raises(InvalidOptionError, match="stands alone"):
            enqueue(session, Pay("1"), unique=Unique(key="payment-4711", by_args=True))
        assert enqueue(session, Pay("1"), unique=Unique(by_args=["paymentId"])).inserted

    assert len(jobs_in(engine)) == 1


def test_the_unit_of_work_refuses_a_unique_job() -> None:
    with pytest.raises(UniqueNeedsEnqueueError, match="enqueue"):
        Job(Ping(1), unique=BY_ARGS)


def test_a_key_of_ones_own_repeats_an_enqueue_safely(engine: Engine) -> None:
    key = Unique(key="payment-4711")

    first = put(engine, 1, unique=key)
    with Session(engine) as session, session.begin():  # the reply to the first COMMIT was lost, and it is done again
        again = enqueue(session, Ping(1), unique=key)
        other = enqueue(session, Pay("4711"), unique=key)  # a key of one's own stands for itself, whatever the kind

        assert (first[1], again.inserted, again.id) == (True, False, first[0])
        assert (other.inserted, other.id) == (False, first[0])
        assert enqueue(session, Ping(1), unique=Unique(key="payment-4712")).inserted


def test_jobs_of_different_periods_are_different(engine: Engine) -> None:
    hourly = Unique(by_period=timedelta(hours=1))
    at = datetime(2040, 1, 1, 12, 30, tzinfo=UTC)

    assert [put(engine, 1, unique=hourly, scheduled_at=at + timedelta(minutes=m))[1] for m in (0, 29, 30)] == [
        True,
        False,
        True,
    ]


def test_many_keep_uniqueness_among_themselves_and_against_what_is_there(engine: Engine) -> None:
    held, _ = put(engine, 1)
    unique = InsertOptions(unique=BY_ARGS)
    with Session(engine) as session, session.begin():
        items: list[Any] = [(Ping(1), unique), (Ping(2), unique), Ping(2), (Ping(2), unique), (Ping(3), unique)]
        inserted = enqueue_many(session, items, returning=True)

    assert (inserted.count, inserted.skipped) == (3, 2)
    assert inserted.ids is not None
    assert [job_id is not None for job_id in inserted.ids] == [False, True, True, False, True]
    assert jobs_in(engine) == sorted([held, *(job_id for job_id in inserted.ids if job_id is not None)])


def test_it_joins_the_transaction(engine: Engine) -> None:
    with Session(engine) as session:
        enqueue(session, Ping(1), unique=BY_ARGS)
        session.rollback()

    assert jobs_in(engine) == []
    assert put(engine)[1] is True


def enqueue_one(session: Session) -> tuple[int, bool]:
    job = enqueue(session, Ping(1), unique=BY_ARGS)
    return job.id, job.inserted


def test_the_second_waits_for_the_first_and_takes_its_row(engine: Engine) -> None:
    with Session(engine) as session:
        first, _ = enqueue_one(session)
        second = Second(engine, enqueue_one)
        second.waits(engine)
        session.commit()
    second.thread.join(30)

    assert second.outcome == (first, False)
    assert jobs_in(engine) == [first]


def test_the_second_takes_the_key_when_the_first_rolls_back(engine: Engine) -> None:
    with Session(engine) as session:
        enqueue_one(session)
        second = Second(engine, enqueue_one)
        second.waits(engine)
        session.rollback()
    second.thread.join(30)

    assert second.outcome[1] is True
    assert len(jobs_in(engine)) == 1


def test_crossing_keys_in_bulk_do_not_deadlock(engine: Engine) -> None:
    unique = InsertOptions(unique=BY_ARGS)

    def both(order: list[int]) -> Callable[[Session], int]:
        return lambda session: enqueue_many(session, [(Ping(number), unique) for number in order]).count

    for _ in range(10):
        seconds = [Second(engine, both([1, 2])), Second(engine, both([2, 1]))]
        for second in seconds:
            second.thread.join(30)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_job"))

        assert [second.error for second in seconds] == [None, None]
        assert sorted(second.outcome for second in seconds) == [0, 2]


def test_repeatable_read_fails_as_postgresql_says_and_makes_no_second_row(engine: Engine) -> None:
    def after_a_look(session: Session) -> tuple[int, bool]:
        session.execute(text("SELECT 1 FROM river_job"))
        looked.set()
        go.wait(30)
        return enqueue_one(session)

    looked, go = threading.Event(), threading.Event()
    second = Second(engine, after_a_look, "REPEATABLE READ")
    assert looked.wait(30)
    put(engine)
    go.set()
    second.thread.join(30)

    assert isinstance(second.error, OperationalError | DBAPIError)
    assert len(jobs_in(engine)) == 1


def test_the_holder_that_finishes_between_insert_and_select_leaves_the_key_to_the_second(engine: Engine) -> None:
    """The pair of statements is tried twice."""
    holder, _ = put(engine)
    mine = create_engine(engine.url)

    @event.listens_for(mine, "before_cursor_execute")
    def before(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "AS holder" in statement:
            move(engine, holder, JobState.DISCARDED)

    job_id, new = put(mine)
    mine.dispose()

    assert new is True
    assert jobs_in(engine) == [holder, job_id]


def test_a_holder_that_comes_and_goes_is_an_error_by_name_and_no_second_row(engine: Engine) -> None:
    holder, _ = put(engine)
    mine = create_engine(engine.url)

    @event.listens_for(mine, "before_cursor_execute")
    def before(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "AS holder" in statement or "INSERT INTO river_job" in statement:
            move(engine, holder, JobState.DISCARDED if "AS holder" in statement else JobState.AVAILABLE)

    with pytest.raises(UniqueRaceError, match="enqueue it again"):
        put(mine)
    mine.dispose()

    assert jobs_in(engine) == [holder]


@pytest.mark.parametrize(("end", "count"), [("commit", 1), ("rollback", 2)])
def test_a_bulk_insert_waits_for_the_holder_and_counts_what_is_new(engine: Engine, end: str, count: int) -> None:
    def both(session: Session) -> Any:
        unique = InsertOptions(unique=BY_ARGS)
        return enqueue_many(session, [(Ping(number), unique) for number in (2, 1)], returning=True)

    with Session(engine) as session:
        enqueue_one(session)
        second = Second(engine, both)
        second.waits(engine)
        getattr(session, end)()
    inserted = second.join()

    assert (inserted.count, inserted.skipped) == (count, 2 - count)
    assert [job_id is not None for job_id in inserted.ids] == [True, end == "rollback"]
    assert len(jobs_in(engine)) == 2


@pytest.mark.parametrize("unique_states", [None, "00000001", "11111111"])
def test_a_due_job_waits_for_a_key_in_the_way_only_if_it_would_take_it(
    engine: Engine, unique_states: str | None
) -> None:
    job_id = make_job(engine, state="scheduled", unique_key="k", unique_states=unique_states, due_in=-timedelta(1))
    with opened(engine) as own:
        own.execute(SCHEDULE_KEYLESS, {"p_schema": None})
        free = read_job(engine, job_id)["state"]
        own.execute(SCHEDULE_ONE, {"p_schema": None})

    assert free == ("scheduled" if unique_states == "00000001" else "available")
    assert read_job(engine, job_id)["state"] == "available"


def test_due_jobs_whose_key_a_newer_one_has_are_discarded_with_that_reason_and_the_others_go_on(engine: Engine) -> None:
    """And a retry by hand names the holder, until that one lets go."""
    unique: Any = {"unique": Unique(by_args=True, by_state=[*ALWAYS, JobState.DISCARDED])}  # not while it is retryable
    old = [put(engine, number, **unique)[0] for number in range(5)]
    for job_id in old:
        move(engine, job_id, JobState.RETRYABLE)
    new = [put(engine, number, **unique)[0] for number in range(3)]

    with opened(engine) as own:
        own.execute(SCHEDULE_DUE, {"p_schema": None})

    rows = {row["id"]: row for row in read_jobs(engine)}
    assert [rows[job_id]["state"] for job_id in old] == ["discarded"] * 3 + ["available"] * 2
    assert {rows[job_id]["metadata"].get("unique_key_conflict") for job_id in old[:3]} == {"scheduler_discarded"}
    with Session(engine) as session, session.begin():
        with pytest.raises(UniqueKeyTakenError, match=f"job {new[0]} holds"):
            retry(session, old[0])
        delete(session, new[0])
        assert retry(session, Job.id.in_(old[:2])).left == {old[1]: f"key taken by job {new[1]}"}


def test_it_works_in_a_schema_of_its_own(empty_url: str) -> None:
    from sqlalchemy.orm import DeclarativeBase

    from sqla_river import JobMixin, River, create_all

    class Base(DeclarativeBase):
        pass

    class Mine(JobMixin, Base):
        __river_schema__ = "jobs"

    engine = create_engine(empty_url)
    create_all(engine, "jobs")
    river = River(job_class=Mine)
    with Session(engine) as session, session.begin():
        outcomes = [river.enqueue(session, Ping(1), unique=BY_ARGS).inserted for _ in range(2)]
        assert session.scalars(select(Mine)).one().unique_states == BY_ARGS.states
    engine.dispose()

    assert outcomes[1] is False
