"""A supervised process's end of the line to its supervisor: word of how it is goes up, orders to stop come down.

The line is a socket pair. Its end tells each side that the other is gone, whatever killed it.
"""

import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from sqla_river.cli.crew import GRACE

if TYPE_CHECKING:
    from sqla_river.runner import Runner

log: Final = logging.getLogger(__name__)

VARIABLE: Final = "SQLA_RIVER_SUPERVISOR"
"""The environment variable that names the socket's descriptor to the process that it is for."""
OFTEN: Final = 0.05
SELDOM: Final = 1.0
"""Seconds between two words, before the Runner works and after."""


class Line:
    """The line, followed by a thread of its own from the first moment.

    Args:
        line: the socket.
        files: whether to tell which files the modules are from.
    """

    def __init__(self, line: socket.socket, *, files: bool = False) -> None:
        self._line = line
        self._files = files
        self._told: set[str] = set()
        self._unsent = b""
        self.runner: Runner | None = None
        """Set once there is one."""
        threading.Thread(target=self._follow, name="sqla_river-line", daemon=True).start()

    @classmethod
    def found(cls, *, files: bool = False) -> Self | None:
        """The line to the supervisor that has started this process; None if nobody has."""
        descriptor = os.environ.pop(VARIABLE, None)  # it is not for programs that handlers start
        if descriptor is None:
            return None
        line = socket.socket(fileno=int(descriptor))
        line.set_inheritable(False)
        return cls(line, files=files)

    def _follow(self) -> None:
        while True:
            works = self.runner is not None and self.runner.started
            self._tell(self.runner)
            self._line.settimeout(SELDOM if works and not self._unsent else OFTEN)
            try:
                orders = self._line.recv(16)
            except TimeoutError:
                continue
            except OSError:
                orders = b""
            if not orders:
                break
            self._obey(max(orders))
        log.warning("the supervisor is gone; this process stops too")
        self._obey(1)
        time.sleep(GRACE + (self.runner.stop_timeout.total_seconds() if self.runner is not None else 0.0))
        os._exit(1)  # what the supervisor would have done

    def _obey(self, step: int) -> None:
        if self.runner is not None:
            self.runner.ask(step)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, runner: "Runner | None") -> None:
        """Send what is new, as far as that goes without waiting: a supervisor may be frozen."""
        if not self._unsent:
            word: dict[str, Any] = {}
            if runner is not None:
                word = {
                    "stop_timeout": runner.stop_timeout.total_seconds(),
                    "lease": runner.lease.total_seconds(),
                    "works": runner.started,
                    "jobs": runner.worked,
                    "rss": resident(),
                }
            if self._files and (fresh := module_files() - self._told):
                self._told |= fresh
                word["files"] = sorted(fresh)
            self._unsent = json.dumps(word).encode() + b"\n" if word else b""
        self._line.settimeout(0)
        try:
            while self._unsent:
                self._unsent = self._unsent[self._line.send(self._unsent) :]
        except OSError:  # full for now, or the other end is gone, which reading tells
            return


def module_files() -> set[str]:
    """The Python files of all modules that are imported by now."""
    found = (getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values()))
    return {file for file in found if isinstance(file, str) and file.endswith(".py")}


def resident() -> int:
    """The resident memory of this process in bytes; its highest so far where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
