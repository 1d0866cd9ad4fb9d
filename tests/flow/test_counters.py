"""What a runner finished is in the figures: soon while it runs, all of it once it has stopped."""

from datetime import timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_river import Cancel, JobContext, JobState, Snooze, queue_stats, stats_history
from tests.crashing import spawn
from tests.making import Count, Gate, eventually
from tests.working import HOUR, after, handling, put, working


def by_state(engine: Engine) -> dict[str, int]:
    with Session(engine) as session:
        found = queue_stats(session, "default")
    return {state: jobs for state, jobs in found.by_state.items() if jobs}


def _each_in_its_way(job: JobContext[Count]) -> Any:
    match job.args.number:
        case 1:
            raise ValueError("it failed")
        case 2:
            return Cancel("no")
        case 3:
            return Snooze(HOUR)
        case _:
            return None


def test_a_clean_stop_loses_no_count(engine: Engine) -> None:
    workers = handling(_each_in_its_way, retry=after(HOUR))
    put(engine, *[0] * 50, 1, 1, 2, 3)
    put(engine, 1, max_attempts=1)
    with working(engine, workers, heartbeat=timedelta(minutes=5), lease=HOUR) as runner:  # no beat tells of it
        eventually(lambda: by_state(engine).get("retryable") == 2 and "running" not in by_state(engine))
        eventually(lambda: runner._incarnation is not None and not runner._incarnation.completer.backlog)
        before = by_state(engine)

    assert "completed" not in before
    assert by_state(engine) == {"completed": 50, "discarded": 1, "cancelled": 1, "retryable": 2, "scheduled": 1}
    with Session(engine) as session:
        minutes = stats_history(session, None, timedelta(minutes=5))
    assert sum(minute.completed for minute in minutes) == 50
    assert sum(minute.by_state[JobState.RETRYABLE] for minute in minutes) == 2


def test_a_runner_that_goes_on_tells_with_its_heartbeat(engine: Engine) -> None:
    gate = Gate(opened=True)
    with working(engine, gate, heartbeat=timedelta(milliseconds=200), lease=timedelta(seconds=3)):
        put(engine, *range(20))
        eventually(lambda: by_state(engine) == {"completed": 20}, what="its counts")


PROGRAM = """
import sys
from datetime import timedelta
from sqlalchemy import create_engine
from sqla_river import Runner, Workers
from tests.making import Count

workers = Workers()
workers.register(Count)(lambda job: None)
beat = timedelta(seconds=0.2)
Runner(create_engine(sys.argv[1]), workers, queues={"default": 4}, heartbeat=beat, lease=3 * beat).run()
"""


def test_a_kill_loses_no_count_that_a_heartbeat_has_told(engine: Engine, url: str) -> None:
    with spawn(PROGRAM, url) as runner:
        put(engine, *range(20))
        eventually(lambda: by_state(engine) == {"completed": 20}, what="its counts")
        runner.kill()
        runner.wait(30)

    assert by_state(engine) == {"completed": 20}
