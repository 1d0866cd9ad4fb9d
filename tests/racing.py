"""Two transactions at once: the test's own, and one in a thread that waits for it."""

import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from tests.making import eventually


class Second:
    """A second transaction, which works in a thread and waits there for the first."""

    def __init__(self, engine: Engine, work: Callable[[Session], Any], isolation: str = "READ COMMITTED") -> None:
        self._engine = engine.execution_options(isolation_level=isolation)
        self._work = work
        self.outcome: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with Session(self._engine) as session, session.begin():
                self.outcome = self._work(session)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def join(self) -> Any:
        """What its work came to, or raised, once it has committed."""
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.outcome

    def waits(self, engine: Engine) -> None:
        """Return once it waits for the other transaction."""
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            waiting = text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            eventually(lambda: connection.execute(waiting).scalar_one() > 0, what="the second to wait")
