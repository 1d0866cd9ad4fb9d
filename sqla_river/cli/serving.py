"""/metrics, /healthz and /readyz on a port, for `work`."""

import atexit
import importlib
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import click

from sqla_river.cli.database import told
from sqla_river.health import LIMIT, Health
from sqla_river.logs import Log

if TYPE_CHECKING:
    from sqla_river.runner import Runner

log: Final = Log(__name__)

FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client keeps what processes share."""
TEXT: Final = (("Content-Type", "text/plain; charset=utf-8"),)

metrics_port_option: Final = click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    envvar="SQLA_RIVER_METRICS_PORT",
    show_envvar=True,
    help="Serve /metrics for Prometheus, and /healthz and /readyz, on this port of every address; 0 is any.",
)


class _Server(ThreadingMixIn, WSGIServer):
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True
    request_queue_size = 16

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4 comes in as well
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, OSError):  # a probe may break off when it likes; the base class prints a traceback
            log.debug("a request of %s broke off: %r", client_address[0], error)
        else:
            super().handle_error(request, client_address)


class _Handler(WSGIRequestHandler):
    timeout = 10  # a client that says nothing holds a thread no longer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
        log.debug(format, *args)


class Serving:
    """An HTTP server in threads of its own, for scrapers and probes: without authentication, so mind the network.

    ``/healthz`` is 503 while an inner loop hangs: then the process should be started anew. ``/readyz`` is 503 as well
    before the start, during the stop, and while a loop cannot do its work or too many handlers hang.

    Args:
        port: 0 is any that is free.
        metrics: the WSGI app of /metrics.
        health: asked at each probe.
    """

    def __init__(self, port: int, metrics: Callable[..., Iterable[bytes]], health: Callable[[], Health]) -> None:
        self._metrics = metrics
        self._health = health
        self._server = make_server("", port, self._answer, server_class=_Server, handler_class=_Handler)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="sqla_river-http", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        log.info("serves /metrics, /healthz and /readyz on port %d", self.port)

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        if path not in {"/healthz", "/readyz"}:
            start_response("404 Not Found", list(TEXT))
            return [b"there are /metrics, /healthz and /readyz\n"]
        health = self._health()
        well = health.alive if path == "/healthz" else health.ready
        start_response(
            "200 OK" if well else "503 Service Unavailable", list(TEXT)
        )  # the server adds to the list that it is given
        return ["\n".join(health.problems or ("ok",)).encode() + b"\n"]


def serve(runner: "Runner", port: int, limit: timedelta = LIMIT) -> Serving:
    """Serve the metrics and the health of *runner* on *port*, from now on.

    Raises:
        click.ClickException: without prometheus_client, or where the port is taken, or PROMETHEUS_MULTIPROC_DIR names
            no folder.
    """
    adapter = _adapter()
    with told():
        adapter.watch(runner)
    return _serve(port, adapter, lambda: runner.health(limit))


def serve_processes(port: int) -> Serving:
    """Serve the metrics and the health of processes that are started from now on, and that each call `share`.

    They share a folder, which is gone when this process ends, unless PROMETHEUS_MULTIPROC_DIR names one.

    Raises:
        click.ClickException: as `serve`.
    """
    if FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="sqla_river-metrics-")
        atexit.register(folder.cleanup)
        os.environ[FOLDER] = folder.name
    adapter = _adapter()
    return _serve(port, adapter, adapter.shared_health)


def share(runner: "Runner") -> None:
    """Let the process that called `serve_processes` show the metrics and the health of *runner*."""
    adapter = _adapter()
    with told():
        adapter.watch(runner)


def _adapter() -> Any:
    try:
        # By its name, as a user's own module: skins know each other through the core alone.
        return importlib.import_module("sqla_river.ext.prometheus")
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise click.ClickException(
            "--metrics-port needs prometheus_client; run pip install 'sqla-river[prometheus]'"
        ) from error


def _serve(port: int, adapter: Any, health: Callable[[], Health]) -> Serving:
    with told():
        metrics = adapter.make_wsgi_app()
    try:
        serving = Serving(port, metrics, health)
    except OSError as error:
        raise click.ClickException(f"cannot listen on port {port}: {error.strerror}; choose another") from error
    serving.start()
    return serving
