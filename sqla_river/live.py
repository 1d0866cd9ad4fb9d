"""The queues of a Runner, which may change while it works."""

import threading
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Final

from sqla_river.errors import ConfigError, QueueNotFoundError
from sqla_river.options import check_queue

MAX_SLOTS: Final = 10_000


class Queues(Mapping[str, int]):
    """Slots by queue. Each change takes effect at once, also in a Runner that works; any thread may make it.

    Readers see one state or the next, never something in between. What was changed stays so for the Runner's next
    start.

    Raises:
        ConfigError: no queue at all, or slots outside 1..10,000.
        InvalidOptionError: a name that River does not take.
    """

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._slots = _checked(slots)
        self._lock = threading.Lock()
        self._changed: Callable[[Mapping[str, int]], None] | None = None

    def add(self, name: str, slots: int) -> None:
        """Work another queue. Its jobs are fetched at once.

        While the Runner works this returns once the queue has its row, so that ``pause(session, '*')`` finds it, or
        after 10 s without a database.

        Raises:
            ConfigError: it is worked here already; or slots outside 1..10,000.
            InvalidOptionError: a name that River does not take.
        """
        check_queue(name)
        _check_slots(name, slots)
        with self._lock:
            if name in self._slots:
                raise ConfigError(
                    f"queue '{name}' is worked here already, with {self._slots[name]} slots; "
                    f"write runner.queues['{name}'] = {slots} to change that"
                )
            self._change({**self._slots, name: slots})

    def replace(self, slots: Mapping[str, int]) -> None:
        """Work these queues instead of all that were worked so far; see `add` and `remove`.

        Raises:
            ConfigError: no queue at all, or slots outside 1..10,000.
            InvalidOptionError: a name that River does not take.
        """
        slots = _checked(slots)
        with self._lock:
            self._change(slots)

    def remove(self, name: str) -> None:
        """Work a queue no more. Its running jobs go on to their end; what was fetched and has not begun goes back at
        once, with its attempt.

        Raises:
            QueueNotFoundError: it is not worked here.
            ConfigError: it is the last one.
        """
        with self._lock:
            self._check_known(name)
            if len(self._slots) == 1:
                raise ConfigError(f"queue '{name}' is the last one, a Runner needs at least one; stop() it instead")
            self._change({other: slots for other, slots in self._slots.items() if other != name})

    def __setitem__(self, name: str, slots: int) -> None:
        """Change the slots of a queue. More take jobs at once; with fewer no further job starts until fewer run, but
        for what a fetch that is on its way brings.

        Raises:
            QueueNotFoundError: it is not worked here.
            ConfigError: slots outside 1..10,000.
        """
        _check_slots(name, slots)
        with self._lock:
            self._check_known(name)
            self._change({**self._slots, name: slots})

    def _check_known(self, name: str) -> None:
        if name not in self._slots:
            raise QueueNotFoundError(
                name, f"queue {name!r} is not worked here, only {', '.join(self._slots)}; runner.queues.add() it first"
            )

    def _change(self, slots: Mapping[str, int]) -> None:
        self._slots = slots
        if self._changed is not None:
            self._changed(slots)

    @property
    def now(self) -> Mapping[str, int]:
        """All of them at this moment; what comes later does not change it."""
        return self._slots

    def follow(self, changed: Callable[[Mapping[str, int]], None] | None) -> None:
        """Call *changed* with what they are now, and again after each change, one at a time; None ends that."""
        with self._lock:
            self._changed = changed
            if changed is not None:
                changed(self._slots)

    def __getitem__(self, name: str) -> int:
        return self._slots[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    # The views that Mapping makes would read the names at one moment and the slots at another.

    def keys(self) -> KeysView[str]:
        return self._slots.keys()

    def values(self) -> ValuesView[int]:
        return self._slots.values()

    def items(self) -> ItemsView[str, int]:
        return self._slots.items()

    def __repr__(self) -> str:
        return repr(self._slots)


def _checked(slots: Mapping[str, int]) -> Mapping[str, int]:
    if not slots:
        raise ConfigError("queues is empty: a Runner needs at least one, as in queues={'default': 10}")
    return {check_queue(name): _check_slots(name, slots[name]) for name in slots}


def _check_slots(name: str, slots: object) -> int:
    if type(slots) is not int or not 1 <= slots <= MAX_SLOTS:
        raise ConfigError(f"queue {name!r} must have 1..{MAX_SLOTS} slots, got {slots!r}")
    return slots
