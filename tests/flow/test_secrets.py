"""A canary: a secret of args, and a password, are looked for in all that is logged, stored and exported."""

import io
import json
import logging
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import attrs
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from sqla_river import Cancel, JobContext, Runner, Workers, enqueue
from sqla_river.ext.opentelemetry import SqlaRiverInstrumentor
from tests.making import eventually, make_job, read_jobs
from tests.working import after, working

CANARY = "canary-4f1c'7\"é"
PASSWORD = "pass-canary-88"
FRAGMENTS = ("canary-4f1c", "pass-canary", "canary")
SECRET: dict[str, Any] = {"sqla_river": {"redact": True}}


@attrs.frozen
class Charge:
    kind: ClassVar[str] = "charge"
    how: str
    card: str = attrs.field(metadata=SECRET)


@dataclass
class Login:
    kind: ClassVar[str] = "login"
    token: str = field(metadata=SECRET)


@pytest.fixture
def everything_logged() -> Iterator[io.StringIO]:
    """All that anybody logs, with every attribute of every record."""
    stream = io.StringIO()

    class Whole(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return super().format(record) + repr(record.__dict__)

    handler = logging.StreamHandler(stream)
    handler.setFormatter(Whole())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def charge(job: JobContext[Charge]) -> Cancel | None:
    card, cause = job.args.card, RuntimeError(f"gateway said {job.args!r}")
    job.log.info("charging %s", card, extra={"card": card})
    match job.args.how:
        case "text":
            raise ValueError(f"no such card: {card}")
        case "cause":
            try:
                raise cause
            except RuntimeError as error:
                job.log.exception("with %s", card)
                raise KeyError(card) from error
        case "database":
            engine = create_engine(f"postgresql+psycopg://app:{PASSWORD}@127.0.0.1:1/shop?connect_timeout=1")
            with engine.connect():
                return None
        case "url":
            raise ConnectionError(f"cannot reach amqp://app:{PASSWORD}@mq/ nor host=db password={PASSWORD}")
        case "cancel":
            return Cancel(f"{card} is stolen")
        case _:
            raise Cancel(json.dumps({"card": card}))


def test_no_secret_shows_in_logs_errors_kept_logs_spans_or_metrics(
    engine: Engine, everything_logged: io.StringIO
) -> None:
    workers = Workers()
    workers.register(Charge)(charge)

    @workers.register(Login, transactional=True)
    def login(job: JobContext[Login], session: Session) -> None:
        session.execute(text("SELECT CAST(:it AS int)"), {"it": job.args.token})

    def not_ours(job: JobContext[Any], error: BaseException) -> None:
        raise TypeError(f"{error} of {job.args}")

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    SqlaRiverInstrumentor().instrument(tracer_provider=tracers, meter_provider=meters)
    hows = ("text", "cause", "database", "url", "cancel", "raise")
    try:
        with Session(engine) as session, session.begin():
            for how in hows:
                enqueue(session, Charge(how, CANARY), max_attempts=1)
            enqueue(session, Login(CANARY))
        make_job(engine, kind="charge", args={"how": 7, "card": CANARY}, max_attempts=1)  # does not decode
        settings: dict[str, Any] = {"keep_logs": True, "log_args": True, "on_error": not_ours}
        with working(engine, workers, retry=after(timedelta(hours=1)), **settings) as runner:
            eventually(lambda: all(row["finalized"] or row["state"] == "retryable" for row in read_jobs(engine)), 20.0)
            shown = repr(runner.duties)
    finally:
        SqlaRiverInstrumentor().uninstrument()

    rows = read_jobs(engine)
    kept = "".join(json.dumps([row["all_errors"], row["metadata"]], ensure_ascii=False) for row in rows)
    exported = "".join(span.to_json() for span in spans.get_finished_spans())
    metrics = getattr(reader.get_metrics_data(), "to_json", str)()
    logged = everything_logged.getvalue()
    everywhere = {"kept": kept, "exported": exported, "metrics": metrics, "logged": logged, "shown": shown}
    for where, said in everywhere.items():
        for fragment in FRAGMENTS:
            assert fragment not in said, where
    assert kept.count("***") >= len(hows)
    assert {row["args"].get("card", row["args"].get("token")) for row in rows} == {
        CANARY
    }  # it is there, and only there
    assert logged.count(" failed in attempt 1 of ") >= 5
    assert "invalid input syntax" in kept
    assert len(spans.get_finished_spans()) > 2 * len(hows)


def test_the_password_of_a_database_that_refuses_us_shows_nowhere(url: str, everything_logged: io.StringIO) -> None:
    away = create_engine(make_url(url).set(username="nobody_of_that_name", password=PASSWORD))
    runner = Runner(away, Workers(), queues={"default": 1}, stop_timeout=timedelta(0))
    starts = threading.Thread(target=runner.start)
    starts.start()
    eventually(lambda: " failed (1 in a row): OperationalError" in everything_logged.getvalue(), 20.0)
    runner.stop()
    starts.join(20)
    with pytest.raises(OperationalError) as refused, away.connect():
        pass

    assert PASSWORD not in everything_logged.getvalue()
    assert PASSWORD not in "".join(traceback.format_exception(refused.value))
    assert PASSWORD not in repr(runner) + repr(away)
