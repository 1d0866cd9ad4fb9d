"""A runner inside the development server, and only there where requests are served."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import click
from flask import Flask
from flask.cli import ScriptInfo
from flask.helpers import get_debug_flag
from werkzeug.serving import is_running_from_reloader

from sqla_river.logs import Log
from sqla_river.runner import Runner

log: Final = Log(__name__)

LOOK_EVERY: Final = 0.02
"""Seconds between two looks whether the app is loaded."""


class InProcess:
    """Starts the runner of *app* once per process: with ``flask run`` as soon as the app is loaded, else at the first
    request.

    The reloader's parent loads the app as well, as do ``flask shell`` and ``flask db``; none of them serves a request.
    A start that fails (tables are missing, say) is logged and tried again at the next request.
    """

    def __init__(self, app: Flask, make: Callable[[Flask], Runner]) -> None:
        self._app = app
        self._make = make
        self._next: Callable[..., Iterable[bytes]] = app.wsgi_app
        self._lock = threading.Lock()
        self._begun = False
        self.runner: Runner | None = None

    def attach(self) -> None:
        """Watch for the first request, and for the end of loading under ``flask run``."""
        self._app.wsgi_app = self._serve  # type: ignore[method-assign]
        info = _serving()
        if info is not None:
            threading.Thread(target=self._when_loaded, args=(info,), name="sqla_river-starter", daemon=True).start()

    def _serve(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        if not self._begun:
            self._begin()
        return self._next(environ, start_response)

    def _when_loaded(self, info: ScriptInfo) -> None:
        # Earlier would be too early: a handler could run while the module that it stands in is still being imported.
        while getattr(info, "_loaded_app", self._app) is None:
            time.sleep(LOOK_EVERY)
        self._begin()

    def _begin(self) -> None:
        with self._lock:
            if self._begun or self._app.testing:
                return
            self._begun = True
        threading.Thread(target=self._start, name="sqla_river-starter", daemon=True).start()

    def _start(self) -> None:
        try:
            runner = self._make(self._app)
            runner.start()
            self.runner = runner
        except Exception as error:  # noqa: BLE001 - the server goes on without it
            self._begun = False
            log.error("the runner in this process does not start: %s", error)  # noqa: TRY400


def _serving() -> ScriptInfo | None:
    """What loads the app, if that is ``flask run``, in the process that will serve."""
    context = click.get_current_context(silent=True)
    if context is None or context.info_name != "run":
        return None
    reload = context.params.get("reload")
    if (get_debug_flag() if reload is None else reload) and not is_running_from_reloader():
        return None
    return context.find_object(ScriptInfo)
