"""The servers of the peers: started for the bench, with their data in temporary folders, and removed again."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Self

import psycopg
from sqlalchemy import URL, make_url

from sqla_river.embedded import EmbeddedPostgres
from tests.bench.catalog import Kind

SETTINGS: Final = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
}
PATIENCE: Final = 60.0
RABBITMQ: Final = "/usr/lib/rabbitmq/bin/rabbitmq-server"
"""Debian's program itself: the one on the PATH changes to an account of its own, which cannot enter our folders."""


class Unavailable(Exception):
    """A server or program is not on this machine; the text says how to get it."""


class Servers:
    """Starts what the peers ask for, once, and keeps it until the end."""

    def __init__(self, postgres: URL | None) -> None:
        self._postgres = postgres
        self._rabbitmq = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fresh(self, kind: Kind) -> AbstractContextManager[str]:
        """Give the URL of a server, or a database of one, that has no jobs in it."""
        return {"postgres": self._database, "redis": _redis, "rabbitmq": self._broker}[kind]()

    def settle(self, url: str) -> None:
        """Leave a database as one that has been in use for a while, with nothing to catch up on."""
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")

    def version(self) -> str:
        """Tell which PostgreSQL it is."""
        with psycopg.connect(self._admin(), autocommit=True) as connection:
            row = connection.execute("SHOW server_version").fetchone()
        return str(row[0]) if row else ""

    def _admin(self) -> str:
        if self._postgres is None:
            server = self._stack.enter_context(EmbeddedPostgres(settings=SETTINGS, durable=True))
            self._postgres = make_url(server.url())
        return _plain(self._postgres)

    @contextmanager
    def _database(self) -> Generator[str]:
        name = f"sqla_river_bench_{secrets.token_hex(4)}"
        with psycopg.connect(self._admin(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        assert self._postgres is not None
        try:
            yield _plain(self._postgres.set(database=name))
        finally:
            with psycopg.connect(self._admin(), autocommit=True) as connection:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

    @contextmanager
    def _broker(self) -> Generator[str]:
        # It needs some seconds to start, so that all share one; a peer that has worked all its jobs leaves none.
        if not self._rabbitmq:
            self._rabbitmq = self._stack.enter_context(_rabbitmq())
        yield self._rabbitmq


def _plain(url: URL) -> str:
    """Write *url* as libpq, asyncpg and sqlx all read it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def _redis() -> Generator[str]:
    """A Redis that keeps nothing on disk."""
    if shutil.which("redis-server") is None:
        raise Unavailable("redis-server is not here; apt-get install redis-server")
    port = _free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with tempfile.TemporaryDirectory() as folder, _running([*command, "--dir", folder], folder, {}):
        _wait_for("redis-server", lambda: _answers(port))
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def _rabbitmq() -> Generator[str]:
    """A RabbitMQ as it comes, with a name service of its own."""
    if not Path(RABBITMQ).exists() or shutil.which("epmd") is None:
        raise Unavailable("rabbitmq-server is not here; apt-get install rabbitmq-server")
    port, names, distribution = _free_port(), _free_port(), _free_port()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "ERL_EPMD_PORT": str(names),
            "HOME": folder,  # for the cookie
            "RABBITMQ_NODENAME": "bench@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        }
        epmd = ["epmd", "-address", "127.0.0.1", "-port", str(names)]
        with _running(epmd, folder, {}), _running([RABBITMQ], folder, settings):
            _wait_for("rabbitmq-server", lambda: _answers(port))
            yield f"amqp://guest:guest@127.0.0.1:{port}"


@contextmanager
def _running(command: Sequence[str], folder: str, settings: dict[str, str]) -> Generator[None]:
    with (Path(folder) / f"{Path(command[0]).name}.out").open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **settings}, cwd=folder, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _wait_for(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > deadline:
            raise Unavailable(f"{what} does not answer after {PATIENCE:.0f} s")
        time.sleep(0.05)
