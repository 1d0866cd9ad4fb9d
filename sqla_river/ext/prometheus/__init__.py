"""Prometheus: metrics of runners and of the database behind them, with ``prometheus_client``.

::

    from sqla_river.ext.prometheus import make_wsgi_app, watch

    watch(runner)            # before or after its start; in the default registry
    app = make_wsgi_app()    # or make_asgi_app(): /metrics, to be mounted where you like

``sqla-river work --metrics-port 9100`` does both.

Labels are bounded: kinds are those that the runner has a worker for, queues those that it works, and of the database's
queues the hundred with most jobs; whatever else there is, is ``other``.

Several processes share one /metrics where ``PROMETHEUS_MULTIPROC_DIR`` names a folder, as prometheus_client has it. A
process says how its runners do from the start of the first on, so `watch` may stand in a module that a server loads
before it forks.
"""

import os
import threading
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakKeyDictionary

try:
    import prometheus_client
    from prometheus_client import REGISTRY, CollectorRegistry
except ModuleNotFoundError as error:
    if error.name != "prometheus_client":
        raise
    raise ModuleNotFoundError(
        "sqla_river.ext.prometheus needs prometheus_client; run pip install 'sqla-river[prometheus]'", name=error.name
    ) from error

from sqla_river.ext.prometheus.metrics import Metrics
from sqla_river.ext.prometheus.shared import Shared, folder, is_shared, shared_health
from sqla_river.runner import Runner

__all__ = ["make_asgi_app", "make_wsgi_app", "shared_health", "watch"]

WSGIApp = Callable[..., Any]
ASGIApp = Callable[..., Any]

_metrics: Final[WeakKeyDictionary[CollectorRegistry, Metrics]] = WeakKeyDictionary()
_lock: Final = threading.Lock()


def watch(runner: Runner, registry: CollectorRegistry = REGISTRY) -> None:
    """Export metrics of *runner* in *registry*; several runners in one registry are added up.

    Of ages and ratios the largest counts, and all are ready when each of them is. It costs a few microseconds per job,
    in the thread that writes the results, and none of the handlers'. The figures of a database are looked at by one
    runner of its fleet at a time, every 30 s; those of several databases, or schemas of one, are added up too.

    Raises:
        ConfigError: ``PROMETHEUS_MULTIPROC_DIR`` names no folder.
    """
    with _lock:
        metrics = _metrics.get(registry)
        if metrics is None:
            metrics = _metrics[registry] = Metrics(registry)
    metrics.watch(runner)


def make_wsgi_app(registry: CollectorRegistry = REGISTRY) -> WSGIApp:
    """A WSGI app that answers with the metrics in *registry*; with those of all processes in multi-process mode.

    Raises:
        ConfigError: as `watch`.
    """
    client: Any = prometheus_client  # whose types are loose
    app: WSGIApp = client.make_wsgi_app(_all_of(registry))
    return app


def make_asgi_app(registry: CollectorRegistry = REGISTRY) -> ASGIApp:
    """The same as an ASGI app."""
    client: Any = prometheus_client
    app: ASGIApp = client.make_asgi_app(_all_of(registry))
    return app


def _all_of(registry: CollectorRegistry) -> CollectorRegistry:
    if not is_shared():
        return registry
    folder()
    shared = CollectorRegistry()
    shared.register(Shared())
    return shared


def _forked() -> None:
    for metrics in list(_metrics.values()):
        metrics.forked()


os.register_at_fork(after_in_child=_forked)
# Else a child forked while another thread holds it could watch no runner.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
