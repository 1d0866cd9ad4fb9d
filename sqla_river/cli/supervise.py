"""The supervisor: starts processes, hears them, and does what its `Crew` decides.

It never imports the app, so nothing of it is shared by a fork: each process is this same command, started anew.
"""

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

from sqla_river.cli.child import VARIABLE
from sqla_river.cli.crew import Action, Ask, Crew, Kill, Member, Start
from sqla_river.cli.reload import Watch

log: Final = logging.getLogger(__name__)

LOOK_EVERY: Final = 0.5
"""Seconds between two looks at the files that are watched."""
LONGEST_WAIT: Final = 60.0


class Process:
    """A started process, and our end of the line to it."""

    def __init__(self, place: int) -> None:
        self.line, theirs = socket.socketpair()
        try:
            with theirs:
                self._popen = subprocess.Popen(  # noqa: S603 - the command that this process runs itself
                    [sys.executable, *sys.orig_argv[1:]],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, VARIABLE: str(theirs.fileno())},
                )
        except OSError:
            self.line.close()
            raise
        self.line.setblocking(False)
        self.member = Member(place, self._popen.pid, time.monotonic())
        self._heard = b""

    def words(self) -> list[dict[str, Any]]:
        """What it has said since the last time.

        Raises:
            OSError: it has let go of the line.
        """
        with suppress(BlockingIOError):
            while True:
                data = self.line.recv(65_536)
                if not data:
                    raise ConnectionResetError
                self._heard += data
        *lines, self._heard = self._heard.split(b"\n")
        return [json.loads(line) for line in lines]

    def ask(self, step: int) -> None:
        with suppress(OSError):  # it is ending already
            self.line.send(bytes([step]))

    def kill(self) -> None:
        self._popen.kill()

    def ended(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._popen.poll()


class Supervisor:
    """Runs *crew* until it is over.

    SIGTERM and SIGINT stop it, each further one goes a step further; SIGHUP replaces the processes one after the other.
    """

    def __init__(self, crew: Crew, watch: Watch | None = None) -> None:
        self._crew = crew
        self._watch = watch
        self._processes: dict[Member, Process] = {}
        self._selector = selectors.DefaultSelector()
        self._had_terminal = _has_terminal()

    def run(self) -> int:
        """The exit code: 0 after a clean stop."""
        look_at = time.monotonic() + LOOK_EVERY
        with _signals() as signals, self._selector:
            self._selector.register(signals, selectors.EVENT_READ)
            while not self._crew.over:
                now = time.monotonic()
                self._do(self._crew.decide(now), now)
                until = min(self._crew.next_at(now), look_at if self._watch is not None else now + LONGEST_WAIT)
                for key, _ in self._selector.select(max(until - time.monotonic(), 0.0)):
                    if key.data is None:
                        self._obey(signals.recv(64))
                    else:
                        self._hear(key.data)
                self._reap()
                if self._watch is not None and time.monotonic() >= look_at:
                    self._look(self._watch)
                    look_at = time.monotonic() + LOOK_EVERY
        return self._crew.exit_code

    def _do(self, actions: Sequence[Action], now: float) -> None:
        for action in actions:
            match action:
                case Start(place):
                    self._start(place, now)
                case Ask(member, step):
                    self._processes[member].ask(step)
                case Kill(member):
                    self._processes[member].kill()

    def _start(self, place: int, now: float) -> None:
        try:
            process = Process(place)
        except OSError as error:
            self._crew.not_started(place, error, now)
            return
        self._processes[process.member] = process
        self._selector.register(process.line, selectors.EVENT_READ, process)
        self._crew.started(process.member)

    def _hear(self, process: Process) -> None:
        try:
            words = process.words()
        except OSError:
            self._selector.unregister(process.line)  # its end comes with SIGCHLD
            return
        for word in words:
            if self._watch is not None:
                self._watch.add(word.pop("files", ()))
            if word:
                self._crew.heard(process.member, word, time.monotonic())

    def _reap(self) -> None:
        for member, process in list(self._processes.items()):
            code = process.ended()
            if code is not None:
                with suppress(KeyError):
                    self._selector.unregister(process.line)
                process.line.close()
                del self._processes[member]
                self._crew.ended(member, code, time.monotonic())

    def _look(self, watch: Watch) -> None:
        changed = watch.changed()
        if changed is not None:
            log.info("%s has changed", os.path.relpath(changed))
            self._restart()

    def _restart(self) -> None:
        now = time.monotonic()
        self._do(self._crew.restart(now), now)

    def _obey(self, numbers: bytes) -> None:
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT) or (number == signal.SIGHUP and self._hung_up()):
                self._crew.stop()
            elif number == signal.SIGHUP and self._watch is None:
                self._crew.roll()
            elif number == signal.SIGHUP:
                self._restart()

    def _hung_up(self) -> bool:
        """Whether SIGHUP means what it once did: the terminal that we were started on is gone."""
        return self._had_terminal and not _has_terminal()


def _has_terminal() -> bool:
    """Whether a terminal controls this process, wherever its output goes."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@contextmanager
def _signals() -> Generator[socket.socket, None, None]:
    """A socket that brings the number of each signal that comes; SIGHUP stays ignored under nohup."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.discard(signal.SIGHUP)
    handlers = {number: signal.signal(number, _noted) for number in numbers}
    with reading, writing:
        descriptor = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _noted(_number: int, _frame: FrameType | None) -> None:
    """What counts is the byte on the socket."""
