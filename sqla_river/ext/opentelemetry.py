"""OpenTelemetry: spans and metrics by the semantic conventions for messaging. Needs the extra ``otel``.

::

    SqlaRiverInstrumentor().instrument()  # or run the program under opentelemetry-instrument

Three spans tell the story of a job:

- ``enqueue <queue>`` (PRODUCER), where ``Job(args)`` is made, or a block of many; its context travels in the job's
  metadata as ``traceparent`` and ``tracestate``, as River's own clients write it;
- ``process <queue>`` (CONSUMER), around the handler, linked to the first; the handler's own spans are its children;
- ``settle <queue>`` (CLIENT), a child of the second, once its outcome is committed.

Metrics: ``messaging.client.sent.messages``, ``messaging.client.consumed.messages``, ``messaging.process.duration``
(seconds) and ``sqla_river.jobs.settled``, by queue and kind. Nothing of it shows args; the values of redacted fields
are hidden in what is said of exceptions.
"""

import threading
import time
from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("opentelemetry"):
        raise
    raise ModuleNotFoundError(
        "sqla_river.ext.opentelemetry needs OpenTelemetry; run pip install 'sqla-river[otel]'", name=error.name
    ) from error

from sqla_river import failure
from sqla_river.config import INSERT_EVERYWHERE
from sqla_river.context import JobContext
from sqla_river.heartbeat import library_version
from sqla_river.hooks import EVENTS_EVERYWHERE, WORK_EVERYWHERE, Event
from sqla_river.outcomes import Cancel, Snooze
from sqla_river.rows import InsertRow

SYSTEM: Final = "sqla_river"
_SCHEMA: Final = "https://opentelemetry.io/schemas/1.30.0"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_MOST_UNSETTLED: Final = 10_000
_PROPAGATOR: Final = TraceContextTextMapPropagator()


class SqlaRiverInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Traces and measures every River and every Runner of this process, those that exist already too."""

    _telling: "Telling | None" = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """None: it is part of what it instruments."""
        return ()

    def _instrument(self, **kwargs: Any) -> None:
        """Begin. *tracer_provider* and *meter_provider*: the global ones unless said otherwise."""
        version = library_version()
        self._telling = telling = Telling(
            trace.get_tracer("sqla_river", version, kwargs.get("tracer_provider"), _SCHEMA),
            metrics.get_meter("sqla_river", version, kwargs.get("meter_provider"), _SCHEMA),
        )
        INSERT_EVERYWHERE.append(telling)
        WORK_EVERYWHERE.append(telling)
        EVENTS_EVERYWHERE.append(telling.settled)

    def _uninstrument(self, **_: Any) -> None:
        telling, self._telling = self._telling, None
        if telling is not None:
            INSERT_EVERYWHERE.remove(telling)
            WORK_EVERYWHERE.remove(telling)
            EVENTS_EVERYWHERE.remove(telling.settled)


class Telling:
    """The middleware around inserts and handlers, and what is told of events."""

    def __init__(self, tracer: trace.Tracer, meter: metrics.Meter) -> None:
        self._tracer = tracer
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Jobs made to be enqueued, whether or not they commit"
        )
        self._consumed = meter.create_counter("messaging.client.consumed.messages", "{message}", "Handlers begun")
        self._duration = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "How long handlers ran",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._outcomes = meter.create_counter("sqla_river.jobs.settled", "{job}", "Outcomes committed, by outcome")
        self._unsettled: dict[tuple[str, int], SpanContext] = {}
        """By token and id: of two databases both have a first job, and both of them a first attempt."""
        self._lock = threading.Lock()

    def insert(
        self, rows: Sequence[InsertRow], call_next: Callable[[Sequence[InsertRow]], Sequence[InsertRow]], /
    ) -> Sequence[InsertRow]:
        """A span that ends before anything is sent; each row carries its context away."""
        queues, kinds = {row.queue for row in rows}, {row.kind for row in rows}
        about: dict[str, str | int] = {
            "messaging.system": SYSTEM,
            "messaging.operation.name": "enqueue",
            "messaging.operation.type": "send",
        }
        if len(queues) == 1:
            about["messaging.destination.name"] = min(queues)
        if len(kinds) == 1:
            about["sqla_river.job.kind"] = min(kinds)
        if len(rows) != 1:
            about["messaging.batch.message_count"] = len(rows)
        name = " ".join(["enqueue", *(queues if len(queues) == 1 else ())])
        with self._span(name, SpanKind.PRODUCER, about) as span:
            carrier: dict[str, str] = {}
            _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
            if carrier:
                rows = [row._replace(metadata={**carrier, **row.metadata}) for row in rows]
            passed = call_next(rows)
        for row in passed:
            self._sent.add(1, _labels("enqueue", row.queue, row.kind))
        return passed

    def work(self, job: JobContext[Any], call_next: Callable[[JobContext[Any]], Any], /) -> Any:
        """A span around the handler; around an async one, when it is awaited."""
        span, began = self._begin(job)
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                outcome = call_next(job)
        except BaseException as error:
            self._end(job, span, began, error)
            raise
        if isinstance(outcome, Awaitable):
            return self._awaited(job, span, began, cast("Awaitable[object]", outcome))
        self._end(job, span, began, None)
        return outcome

    async def _awaited(self, job: JobContext[Any], span: Span, began: float, outcome: Awaitable[object]) -> object:
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                came_to = await outcome
        except BaseException as error:
            self._end(job, span, began, error)
            raise
        self._end(job, span, began, None)
        return came_to

    def settled(self, event: Event) -> None:
        """An outcome is committed."""
        if event.job_id is None or event.job_kind is None:
            return  # of a queue
        labels = _labels("settle", event.queue, event.job_kind)
        self._outcomes.add(1, {**labels, "sqla_river.outcome": event.kind})
        with self._lock:
            context = self._unsettled.pop((event.token or "", event.job_id), None)
        if context is None:
            return  # its handler was never called
        about: dict[str, str | int] = {
            **labels,
            "messaging.operation.type": "settle",
            "messaging.message.id": str(event.job_id),
            "sqla_river.job.attempt": event.attempt or 0,
            "sqla_river.outcome": event.kind,
        }
        parent = trace.set_span_in_context(trace.NonRecordingSpan(context))
        self._tracer.start_span(f"settle {event.queue}", parent, SpanKind.CLIENT, about).end()

    def _begin(self, job: JobContext[Any]) -> tuple[Span, float]:
        labels = _labels("process", job.queue, job.kind)
        self._consumed.add(1, labels)
        about: dict[str, str | int] = {
            **labels,
            "messaging.operation.type": "process",
            "messaging.message.id": str(job.id),
            "sqla_river.job.attempt": job.attempt,
        }
        carrier = {key: job.metadata.get(key) for key in ("traceparent", "tracestate")}
        sender = trace.get_current_span(
            _PROPAGATOR.extract({key: value for key, value in carrier.items() if isinstance(value, str)}, Context())
        ).get_span_context()
        links = [Link(sender)] if sender.is_valid else []
        span = self._tracer.start_span(f"process {job.queue}", kind=SpanKind.CONSUMER, attributes=about, links=links)
        with self._lock:
            if len(self._unsettled) >= _MOST_UNSETTLED:  # outcomes that came too late are never settled
                del self._unsettled[next(iter(self._unsettled))]
            self._unsettled[job.row.token, job.id] = span.get_span_context()
        return span, time.monotonic()

    def _end(self, job: JobContext[Any], span: Span, began: float, error: BaseException | None) -> None:
        labels = _labels("process", job.queue, job.kind)
        if error is not None and not isinstance(error, Snooze | Cancel):  # which are wishes
            labels["error.type"] = type(error).__qualname__
            _tell(span, error, job.redact)
        self._duration.record(time.monotonic() - began, labels)
        span.end()

    @contextmanager
    def _span(self, name: str, kind: SpanKind, about: dict[str, str | int]) -> Generator[Span]:
        with self._tracer.start_as_current_span(
            name, kind=kind, attributes=about, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                _tell(span, error, None)
                raise


def _labels(operation: str, queue: str, kind: str) -> dict[str, str]:
    return {
        "messaging.system": SYSTEM,
        "messaging.operation.name": operation,
        "messaging.destination.name": queue,
        "sqla_river.job.kind": kind,
    }


def _tell(span: Span, error: BaseException, hide: Callable[[str], str] | None) -> None:
    """Say of *span* that *error* ended it: what the SDK would record, without the secrets; without a text where
    nobody knows them.
    """
    name = type(error).__qualname__
    span.set_attribute("error.type", name)
    about: dict[str, str] = {"exception.type": name}
    if hide is None:
        span.set_status(Status(StatusCode.ERROR))
    else:
        said = failure.attempt_error(0, error, hide)
        about["exception.message"] = said.error
        about["exception.stacktrace"] = said.trace
        span.set_status(Status(StatusCode.ERROR, said.error))
    span.add_event("exception", about)
