"""Spans and metrics of a real job: enqueued, processed, settled."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

import attrs
import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_river import Cancel, InsertOptions, Job, JobContext, Snooze, Workers, enqueue, enqueue_many
from sqla_river.config import INSERT_EVERYWHERE
from sqla_river.ext.opentelemetry import SqlaRiverInstrumentor
from sqla_river.hooks import EVENTS_EVERYWHERE, WORK_EVERYWHERE
from tests.database import emptied, shared_database
from tests.making import Count, Greet, eventually, make_job, read_job
from tests.working import after, handling, nothing, put, settled, working


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(shared: str) -> Iterator[Engine]:
    yield from emptied(shared)


@pytest.fixture
def other(server: str, template: str) -> Iterator[Engine]:
    for url in shared_database(server, template):
        yield from emptied(url)


class Telemetry:
    """What was exported."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    def spans(self, name: str, count: int = 1) -> list[ReadableSpan]:
        """The spans of that name, once there are so many, by start."""

        def there() -> list[ReadableSpan]:
            found = [span for span in self.exporter.get_finished_spans() if span.name == name]
            return found if len(found) >= count else []

        return sorted(eventually(there, what=f"{count} spans {name}"), key=lambda span: span.start_time or 0)

    def points(self, name: str) -> list[Any]:
        """The data points of a metric."""
        data: Any = self.reader.get_metrics_data()
        metrics = [each for found in data.resource_metrics for scope in found.scope_metrics for each in scope.metrics]
        return [point for metric in metrics if metric.name == name for point in metric.data.data_points]


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    found = Telemetry()
    SqlaRiverInstrumentor().instrument(tracer_provider=found.tracers, meter_provider=found.meters)
    yield found
    SqlaRiverInstrumentor().uninstrument()
    assert [*INSERT_EVERYWHERE, *WORK_EVERYWHERE, *EVENTS_EVERYWHERE] == []


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def about(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_job_is_enqueued_processed_and_settled_in_linked_traces(engine: Engine, telemetry: Telemetry) -> None:
    tracer = telemetry.tracers.get_tracer("mine")

    def handles(job: JobContext[Count]) -> None:
        with tracer.start_as_current_span("inner"):
            pass

    with tracer.start_as_current_span("request") as request, Session(engine) as session, session.begin():
        job = enqueue(session, Count(1))
        session.flush()
        job_id = job.id
    with working(engine, handles):
        settled(engine, job_id)
        (settle,) = telemetry.spans("settle default")
    (sent,) = telemetry.spans("enqueue default")
    (process,) = telemetry.spans("process default")
    (inner,) = telemetry.spans("inner")

    assert (sent.kind, process.kind, settle.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.CLIENT)
    assert parent_of(sent) == request.get_span_context().span_id
    assert process.parent is None
    assert [link.context.span_id for link in process.links] == [id_of(sent)]
    assert (parent_of(inner), parent_of(settle)) == (id_of(process), id_of(process))
    assert (settle.start_time or 0) >= (process.end_time or 0)
    row = read_job(engine, job_id)["metadata"]
    assert set(row) == {"traceparent"}
    assert sent.context is not None
    assert row["traceparent"].startswith(f"00-{sent.context.trace_id:032x}-{id_of(sent):016x}-0")
    common = {
        "messaging.system": "sqla_river",
        "messaging.destination.name": "default",
        "sqla_river.job.kind": "count",
    }
    of_job = {"messaging.message.id": str(job_id), "sqla_river.job.attempt": 1}
    assert about(sent) == {**common, "messaging.operation.name": "enqueue", "messaging.operation.type": "send"}
    assert about(process) == {
        **common,
        **of_job,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
    }
    assert about(settle) == {
        **common,
        **of_job,
        "messaging.operation.name": "settle",
        "messaging.operation.type": "settle",
        "sqla_river.outcome": "completed",
    }


def test_every_way_in_carries_the_trace_and_a_block_is_one_span(engine: Engine, telemetry: Telemetry) -> None:
    with Session(engine) as session, session.begin():
        one = Job(Count(1), queue="other", metadata={"mine": 1, "tracestate": "kept=1"})
        session.add(one)
        many = enqueue_many(
            session, [Count(2), (Greet("you"), InsertOptions(queue="other")), Greet("me")], returning=True
        )
        session.flush()
        ids = [one.id, *(many.ids or [])]

    (block,) = telemetry.spans("enqueue")
    (single,) = telemetry.spans("enqueue other")
    assert about(block)["messaging.batch.message_count"] == 3
    assert "messaging.destination.name" not in about(block)
    rows = [read_job(engine, job_id or 0)["metadata"] for job_id in ids]
    assert [each["traceparent"].split("-")[2] for each in rows] == [
        f"{id_of(single):016x}",
        *3 * [f"{id_of(block):016x}"],
    ]
    assert {key: rows[0][key] for key in ("mine", "tracestate")} == {"mine": 1, "tracestate": "kept=1"}
    assert sorted(
        (point.attributes["messaging.destination.name"], point.attributes["sqla_river.job.kind"], point.value)
        for point in telemetry.points("messaging.client.sent.messages")
    ) == [("default", "count", 1), ("default", "greet", 1), ("other", "count", 1), ("other", "greet", 1)]


@attrs.frozen
class Pay:
    kind: ClassVar[str] = "pay"
    card: str = attrs.field(metadata={"sqla_river": {"redact": True}})


@pytest.mark.parametrize("colour", ["plain", "async"])
def test_a_failure_is_recorded_without_secrets_and_its_retry_links_to_the_same_sender(
    engine: Engine, telemetry: Telemetry, colour: str
) -> None:
    tracer = telemetry.tracers.get_tracer("mine")

    def breaks(job: JobContext[Pay]) -> None:
        with tracer.start_as_current_span("inner", record_exception=False, set_status_on_exception=False):
            if job.attempt == 1:
                raise ValueError(f"no such card: {job.args.card}")

    async def breaks_later(job: JobContext[Pay]) -> None:
        await asyncio.sleep(0)
        breaks(job)

    workers = Workers()
    if colour == "plain":
        workers.register(Pay, retry=after(timedelta(0)))(breaks)
    else:
        workers.register(Pay, retry=after(timedelta(0)))(breaks_later)
    with working(engine, workers), Session(engine) as session:
        with session.begin():
            enqueue(session, Pay("4111-1111"))
        first, second = telemetry.spans("process default", 2)
        settles = telemetry.spans("settle default", 2)

    assert first.status.status_code == StatusCode.ERROR
    assert second.status.status_code == StatusCode.UNSET
    assert about(first)["error.type"] == "ValueError"
    (event,) = first.events
    recorded: Any = event.attributes
    assert (event.name, recorded["exception.type"]) == ("exception", "ValueError")
    assert "breaks" in recorded["exception.stacktrace"]
    assert first.status.description == "ValueError: no such card: ***"
    assert [len(span.links) for span in (first, second)] == [1, 1]
    assert first.links[0].context.span_id == second.links[0].context.span_id
    inner = telemetry.spans("inner", 2)
    processes = [id_of(span) for span in (first, second)]
    assert list(map(parent_of, inner)) == processes
    assert [about(span)["sqla_river.outcome"] for span in settles] == ["failed", "completed"]
    assert list(map(parent_of, settles)) == processes
    exported = "".join(span.to_json() for span in telemetry.exporter.get_finished_spans())
    assert "4111" not in exported
    durations = telemetry.points("messaging.process.duration")
    assert sorted((point.count, point.attributes.get("error.type", "")) for point in durations) == [
        (1, ""),
        (1, "ValueError"),
    ]
    assert [point.value for point in telemetry.points("messaging.client.consumed.messages")] == [2]
    assert sorted(
        (point.attributes["sqla_river.outcome"], point.value) for point in telemetry.points("sqla_river.jobs.settled")
    ) == [("completed", 1), ("failed", 1)]


def test_a_wish_is_no_error_and_a_transactional_job_is_settled_too(engine: Engine, telemetry: Telemetry) -> None:
    def wishes(job: JobContext[Count], session: Session) -> Snooze | Cancel | None:
        if job.args.number == 1:
            return Cancel("no")
        raise Snooze(timedelta(hours=1))

    with working(engine, handling(wishes, transactional=True)):
        put(engine, 1, 2)
        settles = telemetry.spans("settle default", 2)

    assert {about(span)["sqla_river.outcome"] for span in settles} == {"cancelled", "snoozed"}
    assert all(span.status.status_code == StatusCode.UNSET for span in telemetry.spans("process default", 2))


def test_jobs_of_two_databases_with_the_same_id_are_told_apart(
    engine: Engine, other: Engine, telemetry: Telemetry
) -> None:
    both = threading.Barrier(2)

    def meets(_: JobContext[Count]) -> None:
        both.wait(30)

    workers = handling(meets)
    (job_id,), (other_id,) = put(engine, 1), put(other, 1, queue="there")
    with working(engine, workers), working(other, workers, queues={"there": 1}):
        (settle,) = telemetry.spans("settle default")
        (settle_there,) = telemetry.spans("settle there")
    (process,), (process_there,) = telemetry.spans("process default"), telemetry.spans("process there")

    assert job_id == other_id
    assert [parent_of(settle), parent_of(settle_there)] == [id_of(process), id_of(process_there)]


def test_a_job_without_a_usable_trace_begins_one_of_its_own(engine: Engine, telemetry: Telemetry) -> None:
    odd: list[dict[str, Any]] = [{}, {"traceparent": 7}, {"traceparent": "nonsense", "tracestate": []}]
    for metadata in odd:
        make_job(engine, metadata=metadata)
    with working(engine, nothing):
        spans = telemetry.spans("process default", 3)

    assert [list(span.links) for span in spans] == [[], [], []]


class _Strict(SpanProcessor):
    """Needs what only stands around handlers, as Flask's current_app does."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if span.name.startswith("settle"):
            raise LookupError("no app here")


def test_a_span_processor_that_raises_keeps_no_outcome_from_being_written_and_counted_once(
    engine: Engine, telemetry: Telemetry
) -> None:
    telemetry.tracers.add_span_processor(_Strict())
    with working(engine, nothing) as runner:
        states = [settled(engine, put(engine, number)[0], within=10)["state"] for number in range(2)]
        eventually(lambda: runner.worked >= 2, within=10, what="the count")
        worked = runner.worked

    assert states == ["completed", "completed"]
    assert worked == 2
    assert [point.value for point in telemetry.points("sqla_river.jobs.settled")] == [2]


def test_without_a_provider_nothing_is_added(engine: Engine) -> None:
    SqlaRiverInstrumentor().instrument(tracer_provider=trace.NoOpTracerProvider())
    try:
        (job_id,) = put(engine, 1)
        with working(engine, nothing):
            settled(engine, job_id)
    finally:
        SqlaRiverInstrumentor().uninstrument()

    assert read_job(engine, job_id)["metadata"] == {}


def test_the_instrumentor_is_found_by_opentelemetry_instrument() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="opentelemetry_instrumentor", name="sqla_river")
    assert found.load() is SqlaRiverInstrumentor
