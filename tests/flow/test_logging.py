"""What a running Runner logs, and what it keeps of ``job.log``."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

import attrs
import pytest
import sentry_sdk
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport
from sqlalchemy import Engine

from recipes import sentry_errors, structlog_lines
from sqla_river import Cancel, JobContext, Snooze, Workers
from tests.database import emptied, shared_database
from tests.making import Count, eventually, make_job, read_job
from tests.working import after, handling, nothing, put, released, settled, working


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(shared: str) -> Iterator[Engine]:
    yield from emptied(shared)


@attrs.frozen
class Pay:
    kind: ClassVar[str] = "pay"
    order: int
    card: str = attrs.field(metadata={"sqla_river": {"redact": True}})


def greets(job: JobContext[Count]) -> None:
    job.log.info("hello")


def test_each_event_is_one_line_with_the_job_and_the_runner_in_extra(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(job: JobContext[Count]) -> None:
        job.log.warning("about to break\nin two \x1b[31mlines")
        raise ValueError("first\nsecond \x1b[2J")

    with caplog.at_level(logging.INFO), working(engine, breaks) as runner:
        name = runner.id
        (job_id,) = put(engine, 1)
        settled(engine, job_id)

    ours = [record for record in caplog.records if record.name.startswith("sqla_river")]
    assert all(len(record.getMessage().splitlines()) == 1 for record in ours)
    assert not any("\x1b" in record.getMessage() for record in ours)
    assert {record.__dict__["runner"] for record in ours} == {name}
    about = [record for record in ours if "job_id" in record.__dict__]
    assert [(record.name, record.levelname) for record in about] == [
        ("sqla_river.job", "WARNING"),
        ("sqla_river.judge", "WARNING"),
    ]
    for record in about:
        found = {key: record.__dict__[key] for key in ("job_id", "kind", "queue", "attempt")}
        assert found == {"job_id": job_id, "kind": "count", "queue": "default", "attempt": 1}
    assert r"ValueError: first\nsecond \x1b[2J" in about[1].getMessage()
    assert not any("job_args" in record.__dict__ for record in ours)


def test_a_storm_of_one_error_is_a_line_a_second(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def breaks(job: JobContext[Count]) -> None:
        raise ValueError(f"order {job.args.number} is gone")

    ids = put(engine, *range(200), max_attempts=1)
    with working(engine, breaks, slots=20):
        for job_id in ids:
            settled(engine, job_id, within=30.0)

    said = [record.getMessage() for record in caplog.records if " failed in attempt " in record.getMessage()]
    assert 1 <= len(said) < 40  # a line a second, of 200 within very few
    assert "order" in said[0]


def test_args_are_logged_where_that_is_asked_for_and_their_secrets_never(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(_: JobContext[Pay]) -> None:
        raise ValueError

    workers = Workers()
    workers.register(Pay)(breaks)
    job_id = make_job(engine, kind="pay", args={"order": 5, "card": "4111-1111"})
    with working(engine, workers, log_args=True):
        settled(engine, job_id)

    (record,) = [record for record in caplog.records if record.name == "sqla_river.judge"]
    assert json.loads(record.__dict__["job_args"]) == {"order": 5, "card": "***"}


# ---- kept with the job ---------------------------------------------------------------


def test_what_a_job_logs_is_kept_attempt_by_attempt_in_the_shape_of_river(engine: Engine) -> None:
    def logs(job: JobContext[Count]) -> Snooze | Cancel | None:
        job.log.debug("left out")
        job.log.info("try %d", job.attempt)
        if job.attempt == 1:
            try:
                raise ValueError("half\nway")  # noqa: TRY301
            except ValueError:
                job.log.exception("it broke")
            raise ValueError
        return Cancel("enough")

    with working(engine, handling(logs, retry=after(timedelta(0)), keep_logs=True)):
        (job_id,) = put(engine, 1, metadata={"mine": 1})
        eventually(lambda: read_job(engine, job_id)["state"] == "cancelled")

    metadata = read_job(engine, job_id)["metadata"]
    first, second = metadata["river:log"]
    assert metadata["mine"] == 1
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert set(first) == {"attempt", "log"}
    assert first["log"].split("\n")[0].endswith(" INFO try 1")
    assert " ERROR it broke\nTraceback (most recent call last):\n" in first["log"]
    assert first["log"].endswith("ValueError: half\nway")
    assert "left out" not in first["log"]
    assert second["log"].endswith(" INFO try 2")


@pytest.mark.parametrize(
    ("of_runner", "of_worker", "kept"), [(True, None, True), (True, False, False), (False, True, True)]
)
def test_keeping_logs_is_asked_for_by_the_runner_or_the_worker(
    engine: Engine, of_runner: bool, of_worker: bool | None, kept: bool
) -> None:
    with working(engine, handling(greets, keep_logs=of_worker), keep_logs=of_runner):
        (job_id,) = put(engine, 1)
        row = settled(engine, job_id)

    assert ("river:log" in row["metadata"]) == kept


def test_a_job_that_logs_nothing_is_completed_on_the_lean_path(engine: Engine) -> None:
    with working(engine, handling(nothing), keep_logs=True):
        (job_id,) = put(engine, 1)

        assert settled(engine, job_id)["metadata"] == {}


def test_the_log_of_a_handler_that_hangs_is_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqla_river.watch.STUCK_AFTER", 0.05)
    with released() as release:

        def hangs(job: JobContext[Count]) -> None:
            job.log.info("hangs now")
            release.wait(30)

        workers = handling(hangs, timeout=timedelta(milliseconds=50), keep_logs=True)
        with working(engine, workers, stop_timeout=timedelta(0)):
            (job_id,) = put(engine, 1)
            row = settled(engine, job_id)
            release.set()

    assert "hangs now" in row["metadata"]["river:log"][0]["log"]


def test_only_the_last_attempts_logs_are_kept_and_bad_metadata_harms_nothing(engine: Engine) -> None:
    many = [{"attempt": number, "log": "x"} for number in range(40)]
    long = make_job(engine, metadata={"river:log": many})
    odd = make_job(engine, metadata={"river:log": "no list"})
    with working(engine, handling(greets, keep_logs=True)):
        kept = [settled(engine, job_id)["metadata"]["river:log"] for job_id in (long, odd)]

    assert [each["attempt"] for each in kept[0]] == [*range(16, 40), 1]
    assert [each["attempt"] for each in kept[1]] == [1]


# ---- recipes -------------------------------------------------------------------------


def test_the_recipe_for_structlog_gives_a_line_of_json_per_event(engine: Engine) -> None:
    def breaks(job: JobContext[Pay]) -> None:
        job.log.info("charges %s", job.args.card)
        raise ValueError("no such\ncard: 4111-1111")

    stream = io.StringIO()
    logger = logging.getLogger("sqla_river")
    before = logger.handlers[:], logger.level, logger.propagate
    structlog_lines.set_up(stream)
    workers = Workers()
    workers.register(Pay)(breaks)
    try:
        with working(engine, workers):
            job_id = make_job(engine, kind="pay", args={"order": 5, "card": "4111-1111"})
            settled(engine, job_id)
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
        logger.setLevel(before[1])

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    of_job = [line for line in lines if line.get("job_id") == job_id]
    assert [line["event"] for line in of_job] == [
        "charges ***",
        f"job {job_id} (pay) failed in attempt 1 of 25: ValueError: no such\\ncard: ***",
    ]
    assert {(line["kind"], line["queue"], line["attempt"]) for line in of_job} == {("pay", "default", 1)}
    assert all(line["runner"] and line["timestamp"] and line["level"] for line in lines)


class Kept(Transport):
    """Keeps what would be sent."""

    events: ClassVar[list[dict[str, Any]]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event()
        if event is not None:
            self.events.append(dict(event))


def test_the_recipe_for_sentry_sends_each_failure_once_and_no_secret(engine: Engine) -> None:
    def breaks(job: JobContext[Pay]) -> None:
        job.log.info("charges %s", job.args.card)
        secret = job.args.card
        raise ValueError(f"no such card: {secret}")

    async def later(job: JobContext[Count]) -> None:
        raise Snooze(timedelta(hours=1)) if job.args.number else ValueError("async")

    Kept.events.clear()
    sentry_errors.set_up("http://key@localhost/1", transport=Kept, default_integrations=True, release="1.0")
    workers = Workers()
    workers.register(Pay)(breaks)
    workers.register(Count)(later)
    try:
        with working(engine, workers, on_error=sentry_errors.report):
            ids = [make_job(engine, kind="pay", args={"order": 5, "card": "4111-1111"}), *put(engine, 0, 1)]
            for job_id in ids:
                settled(engine, job_id)
    finally:
        sentry_sdk.get_client().close()
        sentry_sdk.init()

    values = [event["exception"]["values"][-1] for event in Kept.events]
    assert sorted((each["type"], each["value"]) for each in values) == [
        ("ValueError", "async"),
        ("ValueError", "no such card: ***"),
    ]
    (pay,) = [event for event in Kept.events if event["tags"]["job.kind"] == "pay"]
    assert pay["contexts"]["job"] == {"id": ids[0], "attempt": 1, "max_attempts": 25}
    assert pay["tags"]["job.queue"] == "default"
    assert "4111" not in json.dumps(Kept.events, default=str)
