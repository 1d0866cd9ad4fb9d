"""`Job` and `JobMixin` on everybody's Base: each pitfall of integration.md section 1 is a test."""

import ast
import asyncio
import itertools
import pickle
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    ForeignKey,
    MetaData,
    Text,
    create_engine,
    insert,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    Session,
    declarative_base,
    foreign,
    mapped_column,
    registry,
    relationship,
)
from sqlalchemy.sql.elements import conv

import sqla_river
from sqla_river import Job, JobMixin, JobState, River, create_all, enqueue, enqueue_many
from sqla_river.errors import ConfigError, InvalidOptionError, MappingError
from sqla_river.models import RiverBase
from sqla_river.tables import job_table, river_job
from tests.database import emptied, shared_database, statements_of
from tests.jobs import Ping


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


CONVENTION = {
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "pk": "pk_%(table_name)s",
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
}


def stored(engine: Engine, table: str = "river_job") -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


@pytest.fixture
def jobs_engine(empty_url: str) -> Iterator[Engine]:
    """Our tables in schema ``jobs`` only."""
    engine = create_engine(empty_url)
    create_all(engine, "jobs")
    yield engine
    engine.dispose()


def round_trip(engine: Engine, job_class: type[Any]) -> Any:
    """Store one job and two at once, read them back, and give the first."""
    with Session(engine) as session:
        session.add(job_class(Ping(1)))
        session.commit()
        session.add_all([job_class(Ping(2)), job_class(Ping(3))])
        session.commit()
        jobs = session.scalars(select(job_class).order_by(job_class.id)).all()

        assert [job.args for job in jobs] == [{"n": 1}, {"n": 2}, {"n": 3}]
        assert all(job.state is JobState.AVAILABLE for job in jobs)
        return jobs[0]


# ---- the names -------------------------------------------------------------------------------------------------------


def test_the_typed_names_are_the_columns_in_order() -> None:
    source = ast.parse(Path(sqla_river.__file__).with_name("models.py").read_text())
    mixin = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "JobMixin")
    typing_only = next(node for node in mixin.body if isinstance(node, ast.If))
    typed = {
        node.target.id: ast.unparse(node.annotation)
        for node in typing_only.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "Mapped[" in ast.unparse(node.annotation)
    }

    assert list(typed) == list(river_job.c.keys())
    assert {name: "None" in annotation for name, annotation in typed.items()} == {
        name: column.nullable for name, column in river_job.c.items()
    }


def test_the_column_metadata_is_the_attribute_metadata_(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Job(Ping(1), metadata={"a": 1}))
        session.commit()

        assert session.scalars(select(Job.metadata_)).one() == {"a": 1}
        assert session.execute(select(Job.__table__)).one().metadata == {"a": 1}
        assert isinstance(Job.metadata, MetaData)


# ---- the constructor -------------------------------------------------------------------------------------------------


def test_a_thousand_jobs_are_one_insert_and_one_for_the_first_of_each_queue(engine: Engine) -> None:
    with Session(engine) as session, statements_of(engine) as seen:
        session.add_all(
            [Job(Ping(n), priority=1 + n % 4, tags=["a"] * (n % 2), queue=f"q{n % 3}") for n in range(1000)]
        )
        session.flush()

        assert [statement.partition(" (")[0] for statement in seen] == ["INSERT INTO river_job"] * 4
        assert sum("pg_notify" in statement for statement in seen) == 3
        session.commit()
    assert stored(engine) == 1000


def test_a_thousand_jobs_for_one_time_are_one_insert_and_one_look_at_the_clock(engine: Engine) -> None:
    with Session(engine) as session, statements_of(engine) as seen:
        session.add_all([Job(Ping(n), scheduled_at=timedelta(minutes=n)) for n in range(1, 1001)])
        session.flush()

        assert [statement.partition(" (")[0].split("\n")[0] for statement in seen] == [
            "SELECT now() AS now, CAST(EXTRACT(epoch FROM clock_timestamp() - now()) AS DOUBLE PRECISION) AS age",
            "INSERT INTO river_job",
        ]


def test_after_the_flush_everything_is_there_without_another_select(engine: Engine) -> None:
    with Session(engine) as session:
        job = Job(Ping(1))
        assert vars(job).get("id") is None
        session.add(job)
        session.flush()

        with statements_of(engine) as seen:
            assert job.id == 1
            assert (job.state, job.attempt, job.errors, job.args) == (JobState.AVAILABLE, 0, None, {"n": 1})
            assert (job.queue, job.priority, job.max_attempts, job.tags) == ("default", 1, 25, [])
            assert job.created_at == job.scheduled_at
        assert seen == []


def test_args_are_taken_by_position(engine: Engine) -> None:
    """SQLAlchemy regenerates __init__ and loses a '/'."""
    assert Job(Ping(5)).args == {"n": 5}
    with pytest.raises(TypeError):
        Job(Ping(5), "default")  # type: ignore[call-arg, arg-type]
    with pytest.raises(TypeError, match="kind"):
        Job(Ping(5), kind="x")  # type: ignore[call-arg]


def test_args_of_none_do_not_pass_as_json_null(engine: Engine) -> None:
    with Session(engine) as session:
        job = Job(Ping(1))
        job.args = None  # type: ignore[assignment]
        session.add(job)

        with pytest.raises(Exception, match='null value in column "args"'):
            session.flush()


def test_a_job_can_be_pickled(engine: Engine) -> None:
    with Session(engine) as session:
        pending = pickle.loads(pickle.dumps(Job(Ping(1), scheduled_at=timedelta(hours=1))))
        session.add(pending)
        session.commit()
        session.refresh(pending)
        copy = pickle.loads(pickle.dumps(pending))

    assert (copy.id, copy.kind, copy.state) == (1, "ping", JobState.SCHEDULED)


def test_a_merged_job_keeps_its_time(engine: Engine) -> None:
    """merge() copies the columns and calls no constructor."""
    with Session(engine) as session:
        merged = session.merge(Job(Ping(1), scheduled_at=timedelta(hours=1)))
        session.commit()

        assert merged.state is JobState.SCHEDULED
        assert timedelta(minutes=59) < merged.scheduled_at - merged.created_at < timedelta(minutes=61)


def test_a_time_assigned_before_the_flush_wins(engine: Engine) -> None:
    at = datetime(2100, 1, 1, tzinfo=UTC)
    with Session(engine) as session:
        job = Job(Ping(1), scheduled_at=timedelta(hours=1))
        job.scheduled_at = at
        session.add(job)
        session.commit()

        assert (job.scheduled_at, job.state) == (at, JobState.SCHEDULED)


def test_a_naive_time_assigned_before_the_flush_is_refused(engine: Engine) -> None:
    with Session(engine) as session:
        job = Job(Ping(1))
        job.scheduled_at = datetime(2100, 1, 1)  # noqa: DTZ001
        session.add(job)

        with pytest.raises(InvalidOptionError, match="naive"):
            session.flush()


def test_a_job_added_again_after_a_rollback_counts_its_delay_anew(engine: Engine) -> None:
    with Session(engine) as session:
        job = Job(Ping(1), scheduled_at=timedelta(hours=1))
        session.add(job)
        session.flush()
        first = job.scheduled_at
        session.rollback()
        session.add(job)
        session.commit()

        assert job.scheduled_at > first
    assert stored(engine) == 1


def test_metadata_of_a_job_is_its_own(engine: Engine) -> None:
    shared = {"list": [1]}
    one, two = Job(Ping(1), metadata=shared), Job(Ping(2), metadata=shared)
    one.metadata_["list"].append(2)

    assert two.metadata_ == shared == {"list": [1]}


# ---- everybody's Base ------------------------------------------------------------------------------------------------


_numbers = itertools.count()


def on_river_base(theirs: MetaData, schema: str | None = None) -> type[Any]:
    """What ``class Mine(JobMixin, RiverBase): metadata = theirs`` makes, by a name of its own."""
    return type(f"Mine{next(_numbers)}", (JobMixin, RiverBase), {"metadata": theirs, "__river_schema__": schema})


def _plain() -> type[Any]:
    class Base(DeclarativeBase): ...

    class Mine(JobMixin, Base): ...

    return Mine


def _no_meta() -> type[Any]:
    class Base(DeclarativeBaseNoMeta): ...

    class Mine(JobMixin, Base): ...

    return Mine


def _function() -> type[Any]:
    return type("Mine", (JobMixin, declarative_base()), {})


def _registry() -> type[Any]:
    reg = registry()

    @reg.mapped
    class Mine(JobMixin):
        metadata = reg.metadata

    return Mine


def _abstract() -> type[Any]:
    class Base(DeclarativeBase): ...

    class Middle(JobMixin, Base):
        __abstract__ = True

    class Mine(Middle): ...

    return Mine


def _with_constructor() -> type[Any]:
    class Base(DeclarativeBase):
        def __init__(self, *args: Any, **words: Any) -> None:
            raise AssertionError

    class Mine(JobMixin, Base): ...

    return Mine


def _with_types() -> type[Any]:
    class Base(DeclarativeBase):
        type_annotation_map = {int: Text, str: BigInteger, datetime: Text}  # noqa: RUF012

    class Mine(JobMixin, Base): ...

    return Mine


def _with_conventions() -> type[Any]:
    class Base(DeclarativeBase):
        metadata = MetaData(naming_convention=CONVENTION)

    class Mine(JobMixin, Base): ...

    return Mine


def _with_our_columns() -> type[Any]:
    class Base(DeclarativeBase):
        id: Mapped[str] = mapped_column(Text, primary_key=True)
        created_at: Mapped[str] = mapped_column(Text)

    class Mine(JobMixin, Base): ...  # type: ignore[misc]

    return Mine


def _only_metadata() -> type[Any]:
    class Base(DeclarativeBase):
        tenant: Mapped[str] = mapped_column()

    return on_river_base(Base.metadata)


def _dataclass_metadata() -> type[Any]:
    class Base(MappedAsDataclass, DeclarativeBase): ...

    return on_river_base(Base.metadata)


@pytest.mark.parametrize(
    "make",
    [
        _plain,
        _no_meta,
        _function,
        _registry,
        _abstract,
        _with_constructor,
        _with_types,
        _with_conventions,
        _with_our_columns,
        _only_metadata,
        _dataclass_metadata,
    ],
)
def test_the_mixin_works_on_every_kind_of_base(engine: Engine, make: Any) -> None:
    mine = make()

    assert round_trip(engine, mine).id == 1
    assert mine.__table__.name == "river_job"
    assert mine.__table__.metadata is not Job.metadata
    assert [repr(column.type) for column in mine.__table__.c] == [repr(column.type) for column in river_job.c]


def test_naming_conventions_leave_rivers_names_alone() -> None:
    table = job_table(MetaData(naming_convention=CONVENTION))

    assert {constraint.name for constraint in table.constraints} == {
        constraint.name for constraint in river_job.constraints
    }
    assert {index.name for index in table.indexes} == {"river_job_unique_idx"}
    assert all(isinstance(constraint.name, conv) for constraint in table.constraints)


def test_columns_that_a_base_brings_along_are_refused_with_the_way_out() -> None:
    class Base(DeclarativeBase):
        updated_at: Mapped[datetime] = mapped_column()

    with pytest.raises(MappingError, match=r"updated_at.*metadata = Base\.metadata"):

        class Mine(JobMixin, Base):  # pyright: ignore[reportUnusedClass]
            pass


def test_columns_of_the_users_own_class_are_refused() -> None:
    class Base(DeclarativeBase): ...

    with pytest.raises(MappingError, match="tenant"):

        class Mine(JobMixin, Base):  # pyright: ignore[reportUnusedClass]
            tenant: Mapped[str] = mapped_column()


def test_columns_that_are_only_annotated_are_refused_too() -> None:
    class Base(DeclarativeBase): ...

    class Tenants(DeclarativeBase):
        tenant: Mapped[str]

    with pytest.raises(ArgumentError, match="Can't add additional column 'tenant'"):

        class Mine(JobMixin, Base):  # pyright: ignore[reportUnusedClass]
            tenant: Mapped[str]

    with pytest.raises(MappingError, match="tenant"):

        class Yours(JobMixin, Tenants):  # pyright: ignore[reportUnusedClass]
            pass


@pytest.mark.parametrize("first", [True, False])
def test_a_dataclass_base_is_refused_with_the_way_out(first: bool) -> None:
    class Base(MappedAsDataclass, DeclarativeBase): ...

    with pytest.raises(MappingError, match=r"dataclass.*metadata = Base\.metadata"):
        type("Mine", (JobMixin, Base) if first else (Base, JobMixin), {})


def test_a_base_order_that_hides_the_constructor_is_refused_with_the_way_out() -> None:
    class Base(DeclarativeBase): ...

    with pytest.raises(
        MappingError, match=r"Base hides the constructor of a job; write class Mine\(JobMixin, \.\.\.\)"
    ):

        class Mine(Base, JobMixin):  # pyright: ignore[reportUnusedClass]
            pass


def test_a_schema_that_rivers_channels_cannot_carry_is_refused() -> None:
    class Base(DeclarativeBase): ...

    with pytest.raises(InvalidOptionError, match="schema"):

        class Mine(JobMixin, Base):  # pyright: ignore[reportUnusedClass]
            __river_schema__ = "no-dashes"


def test_the_users_class_may_have_relationships_hybrids_and_methods(engine: Engine) -> None:
    class Base(DeclarativeBase): ...

    class Mine(JobMixin, Base):
        orders: Mapped[list["Order"]] = relationship(back_populates="job")

        def shout(self) -> str:
            return self.kind.upper()

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        job_id: Mapped[int | None] = mapped_column(ForeignKey("river_job.id", ondelete="SET NULL"))
        job: Mapped[Mine | None] = relationship("Mine", back_populates="orders")

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        order = Order(job=Mine(Ping(1)))
        session.add(order)
        session.commit()

        assert order.job is not None
        assert (order.job_id, order.job.shout(), order.job.orders) == (1, "PING", [order])


def test_the_shipped_job_can_be_linked_to_with_and_without_a_foreign_key(engine: Engine) -> None:
    class Base(DeclarativeBase): ...

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        job_id: Mapped[int | None] = mapped_column(ForeignKey(Job.id, ondelete="SET NULL"))
        soft_id: Mapped[int | None] = mapped_column(BigInteger)
        job: Mapped[Job | None] = relationship(Job)
        soft: Mapped[Job | None] = relationship(
            lambda: Job, primaryjoin=lambda: Job.id == foreign(Order.soft_id), viewonly=True
        )

    Base.metadata.create_all(engine, tables=[Base.metadata.tables["orders"]])
    with Session(engine) as session:
        job = enqueue(session, Ping(1))
        session.flush()
        order = Order(job=Job(Ping(2)), soft_id=job.id)
        session.add(order)
        session.commit()

        assert order.soft is job
        assert order.job is not None
        assert order.job.args == {"n": 2}


# ---- schemas ---------------------------------------------------------------------------------------------------------


def _by_attribute() -> type[Any]:
    class Base(DeclarativeBase): ...

    class Mine(JobMixin, Base):
        __river_schema__ = "jobs"

    return Mine


def _by_metadata() -> type[Any]:
    class Base(DeclarativeBase):
        metadata = MetaData(schema="jobs")

    class Mine(JobMixin, Base): ...

    return Mine


def _by_river_base() -> type[Any]:
    return on_river_base(MetaData(), "jobs")


@pytest.mark.parametrize("make", [_by_attribute, _by_metadata, _by_river_base])
def test_a_job_class_carries_its_schema_and_so_does_its_enum(jobs_engine: Engine, make: Any) -> None:
    mine = make()

    round_trip(jobs_engine, mine)
    with jobs_engine.begin() as connection:
        assert River.of(mine).enqueue(connection, Ping(4)).id == 4
    with Session(jobs_engine) as session:
        assert River.of(mine).enqueue_many(session, [Ping(5)], returning=True).ids == [5]
        session.commit()
    assert stored(jobs_engine, "jobs.river_job") == 5


@pytest.mark.parametrize(
    ("theirs", "own"),
    [({None: "jobs"}, None), ({"symbol": "jobs"}, "symbol"), ({"symbol": "jobs", None: "nowhere"}, "symbol")],
)
def test_a_translate_map_of_the_users_is_respected(jobs_engine: Engine, theirs: Any, own: str | None) -> None:
    mine = on_river_base(MetaData(), own)
    mapped = jobs_engine.execution_options(schema_translate_map=theirs)

    round_trip(mapped, mine)
    with mapped.begin() as connection:
        River.of(mine).enqueue(connection, Ping(4), scheduled_at=timedelta(0))
        River.of(mine).enqueue_many(connection, [Ping(5)], returning=True)
    with Session(jobs_engine) as session:
        session.connection(execution_options={"schema_translate_map": theirs})
        River.of(mine).enqueue(session, Ping(6))
        River.of(mine).enqueue_many(session, [Ping(7)])
        session.commit()
    assert stored(jobs_engine, "jobs.river_job") == 7


def test_maps_of_every_shape_take_turns_on_one_engine(empty_url: str) -> None:
    """SQLAlchemy's statement cache cannot tell a map with a None key from one without."""
    engine = create_engine(empty_url)
    for schema in (None, "one", "two"):
        create_all(engine, schema)

    mine = on_river_base(MetaData(), "two")
    for _ in range(2):
        for theirs in ({}, {None: "one"}, {"x": "y"}):
            with engine.execution_options(schema_translate_map=theirs).begin() as connection:
                enqueue(connection, Ping(1))
                enqueue_many(connection, [Ping(1)], returning=True)
                River.of(mine).enqueue(connection, Ping(2))
                River.of(mine).enqueue_many(connection, [Ping(2)])

    assert [stored(engine, name) for name in ("public.river_job", "one.river_job", "two.river_job")] == [8, 4, 12]
    engine.dispose()


def test_two_schemas_in_one_metadata(empty_url: str) -> None:
    engine = create_engine(empty_url)
    create_all(engine, "one")
    create_all(engine, "two")

    class Base(DeclarativeBase): ...

    class One(JobMixin, Base):
        __river_schema__ = "one"

    class Two(JobMixin, Base):
        __river_schema__ = "two"

    with Session(engine) as session:
        session.add_all([One(Ping(1)), Two(Ping(2)), One(Ping(3))])
        session.commit()

        assert len(session.scalars(select(One)).all()) == 2
        assert session.scalars(select(Two.args)).all() == [{"n": 2}]
    engine.dispose()


def test_jobs_in_a_schema_and_the_users_rows_in_public_share_a_session_and_a_foreign_key(jobs_engine: Engine) -> None:
    class Base(DeclarativeBase): ...

    class Mine(JobMixin, Base):
        __river_schema__ = "jobs"

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        job_id: Mapped[int | None] = mapped_column(ForeignKey(Mine.id))
        job: Mapped[Mine | None] = relationship(Mine)

    Base.metadata.create_all(jobs_engine, tables=[Base.metadata.tables["orders"]])
    with Session(jobs_engine) as session:
        session.add(Order(job=Mine(Ping(1))))
        River.of(Mine).enqueue_many(session, [Ping(2)])
        session.add(Order())
        session.commit()
        session.add(Order(job=Mine(Ping(3))))
        session.commit()

        assert session.scalars(select(Order.job_id).order_by(Order.id)).all() == [1, None, 3]
    assert stored(jobs_engine, "jobs.river_job") == 3


# ---- drivers ---------------------------------------------------------------------------------------------------------

MASKS: list[frozenset[JobState] | None] = [
    None,
    frozenset(),
    frozenset(JobState),
    frozenset({JobState.AVAILABLE}),
    frozenset({JobState.SCHEDULED, JobState.RUNNING}),
]


def _keep_masks(session: Session) -> list[frozenset[JobState] | None]:
    for mask in MASKS:
        job = Job(Ping(1))
        job.unique_states = mask
        session.add(job)
        session.flush()
    session.commit()
    found = session.scalars(select(Job.unique_states).order_by(Job.id)).all()
    assert session.scalars(select(Job.id).where(Job.unique_states == MASKS[3])).all() == [4]
    return list(found)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_sets_of_states_come_back_on(url: str, engine: Engine, driver: str) -> None:
    other = create_engine(make_url(url).set(drivername=f"postgresql+{driver}"))
    with Session(other) as session:
        assert _keep_masks(session) == MASKS
    other.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_sets_of_states_come_back_awaited_on(url: str, engine: Engine, driver: str) -> None:
    async def go() -> list[frozenset[JobState] | None]:
        other = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"))
        async with AsyncSession(other) as session:
            found = await session.run_sync(_keep_masks)
        await other.dispose()
        return found

    assert asyncio.run(go()) == MASKS


# ---- one River per class ---------------------------------------------------------------------------------------------


def test_a_river_writes_its_settings_onto_its_class(engine: Engine) -> None:
    mine = _plain()
    river = River(job_class=mine, defaults=sqla_river.InsertOptions(queue="mine", priority=3))

    with Session(engine) as session:
        session.add(mine(Ping(1)))
        river.enqueue(session, Ping(2))
        river.enqueue_many(session, [Ping(3)])
        session.commit()

        assert session.execute(select(mine.queue, mine.priority)).all() == [("mine", 3)] * 3


def test_a_second_river_with_other_settings_is_refused_and_with_the_same_is_not() -> None:
    mine = _plain()
    River(job_class=mine, notify="off")
    River(job_class=mine, notify="off")

    with pytest.raises(ConfigError, match="other settings"):
        River(job_class=mine)
    assert mine.__river__.notify == "off"


def test_an_orm_insert_statement_of_the_users_works_too(engine: Engine) -> None:
    """No event fires for it, so no notification either: the poll finds it."""
    with Session(engine) as session:
        row = session.scalars(insert(Job).returning(Job), [{"kind": "raw", "args": {"a": 1}}]).one()
        session.commit()

        assert (row.kind, row.state) == ("raw", JobState.AVAILABLE)


def test_the_mapping_reaches_core_connections_of_any_isolation(engine: Engine) -> None:
    def add(connection: Connection) -> None:
        with Session(connection) as session:
            session.add(Job(Ping(1)))
            session.commit()

    with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
        add(connection)
        connection.commit()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        add(connection)
    assert stored(engine) == 2
