"""How we log: one line per event, repeats kept back, passwords hidden."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_river import logs
from sqla_river.joblog import LONGEST_LOG, JobLog
from sqla_river.logs import Log, one_line, without_passwords
from sqla_river.rows import JobRow

EVIL = "two\nlines\r\x1b[31mred\x9b\u2028end\x00"
ROW = JobRow(1, 0.0, 7, "mail\nbox", "evil\x1b[2J", 2, 25, "{}", "{}", None, "host:1:00/3")
log = Log("sqla_river.tried")


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@given(st.text())
def test_no_text_makes_a_second_line_or_moves_a_terminal(text: str) -> None:
    line = one_line(text)

    assert len(f"{line}.".splitlines()) == 1
    assert "\x1b" not in line
    line.encode()


def test_a_control_character_is_written_out_and_all_else_stays(caplog: pytest.LogCaptureFixture) -> None:
    log.warning("job %d (%s): %s", 7, EVIL, ["größer ✓", EVIL])

    (line,) = said(caplog)
    assert line.startswith(r"job 7 (two\nlines\r\x1b[31mred\x9b\u2028end\x00): ['größer ✓', ")
    assert len(line.splitlines()) == 1


def test_a_message_in_order_keeps_its_template_for_whoever_groups_by_it(caplog: pytest.LogCaptureFixture) -> None:
    log.warning("%d jobs of %s", 3, "mail", queue="default")

    (record,) = caplog.records
    assert (record.msg, record.args) == ("%d jobs of %s", (3, "mail"))
    assert (record.__dict__["queue"], record.__dict__["runner"], record.filename) == ("default", "", "test_logs.py")


def test_args_that_do_not_fit_the_message_are_not_printed_by_logging(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    log.info("%d of %d", "secret")  # noqa: PLE1206

    assert said(caplog) == ["%d of %d (with args that do not fit)"]
    assert "secret" not in capsys.readouterr().err


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1_000.0]
    monkeypatch.setattr(logs, "monotonic", lambda: now[0])
    return now


def test_what_is_said_again_within_a_second_is_counted_and_said_with_the_next(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(50):
        log.warning("job %d failed: %s", number, f"order {number} is gone")
        log.warning("job %d failed: %s", number, "another error")
    clock[0] += 1.0
    log.warning("job %d failed: %s", 50, "order 50 is gone")

    assert said(caplog) == [
        "job 0 failed: order 0 is gone",
        "job 0 failed: another error",
        "job 50 failed: order 50 is gone (and 49 more like it)",
    ]


def test_a_reminder_comes_every_ten_minutes(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(21):
        log.remind("the backlog grows")
        clock[0] += 60.0

    assert said(caplog) == ["the backlog grows"] + 2 * ["the backlog grows (and 9 more like it)"]


def test_one_runner_does_not_keep_another_quiet(caplog: pytest.LogCaptureFixture) -> None:
    for runner in ("a", "b", "a"):
        token = logs.RUNNER.set(runner)
        log.info("it works")
        logs.RUNNER.reset(token)

    assert [record.__dict__["runner"] for record in caplog.records] == ["a", "b"]


def test_a_filter_of_the_users_that_raises_is_said_on_stderr_and_ends_no_thread_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def current_app(_: logging.LogRecord) -> bool:
        raise LookupError("no app here")

    logger = logging.getLogger("sqla_river.tried")
    logger.addFilter(current_app)
    try:
        log.warning("the job failed")
    finally:
        logger.removeFilter(current_app)

    assert "LookupError: no app here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "postgresql+psycopg://app:hunter2@db/shop is away",
        "amqp://app:hun%40ter2@hunter2@db:5672",
        "host=db password=hunter2 user=app",
        "host=db password='hunter2 hunter2' user=app",
        "connect(**{'user': 'app', 'password': 'hunter2'})",
        '{"user": "app", "PASSWORD": "hunter2"}',
    ],
)
def test_a_password_of_a_url_or_connection_string_is_hidden(text: str) -> None:
    assert "hunter2" not in without_passwords(text)
    assert "app" in without_passwords(text)


@pytest.mark.parametrize("text", ["see https://db:5432/x", "wrong password for user app", "a://b c@d"])
def test_what_holds_no_password_stays_as_it_is(text: str) -> None:
    assert without_passwords(text) == text


# ---- job.log -------------------------------------------------------------------------


def hide(text: str) -> str:
    return text.replace("hunter2", "***")


def test_a_line_of_a_job_carries_who_it_is_and_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    JobLog(ROW, hide, None).warning("sends %s to %s", EVIL, "hunter2", extra={"mine": "hunter2", "kind": "no"})

    (record,) = caplog.records
    about = {name: record.__dict__[name] for name in ("job_id", "kind", "queue", "attempt", "runner", "mine")}
    assert about == {
        "job_id": 7,
        "kind": r"evil\x1b[2J",
        "queue": r"mail\nbox",
        "attempt": 2,
        "runner": "host:1:00",
        "mine": "***",
    }
    assert record.getMessage().endswith("to ***")
    assert len(record.getMessage().splitlines()) == 1
    assert (record.name, record.filename) == ("sqla_river.job", "test_logs.py")


def test_the_traceback_of_a_job_keeps_its_lines_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    mine = JobLog(ROW, hide, 0.0)
    for text in ("plain", "of hunter2\x1b[31m"):
        try:
            raise ValueError(text)  # noqa: TRY301
        except ValueError:
            mine.exception("it broke")

    plain, secret = caplog.records
    assert plain.exc_info is not None
    assert secret.exc_info is None  # nobody behind us may look into it
    formatted = logging.Formatter().format(secret)
    assert r"ValueError: of ***\x1b[31m" in formatted
    assert "raise ValueError(text)" in formatted
    assert "hunter2" not in formatted + (mine.kept() or "")
    assert r"ValueError: of ***\x1b[31m" in (mine.kept() or "")


def test_what_is_kept_is_bounded_and_the_end_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "sqla_river.job")
    mine = JobLog(ROW, hide, 0.0)
    for number in range(5_000):
        mine.info("line %d: %s", number, "ä" * 20)
    mine.debug("not kept")
    mine.info("x" * 100_000)

    kept = mine.kept() or ""
    assert len(kept.encode()) <= LONGEST_LOG
    assert len(kept.encode()) > LONGEST_LOG * 0.85
    assert kept.startswith("... ")
    assert " earlier lines are left out\n+" in kept
    assert "line 4999: ää" in kept
    assert kept.endswith("x...")
    assert caplog.records == []


def test_without_the_wish_to_keep_it_nothing_is_kept() -> None:
    mine = JobLog(ROW, hide, None)
    mine.warning("hello")

    assert mine.kept() is None
