"""LISTEN through a real PgBouncer: found out and reported where it cannot work, and left alone where it can."""

import logging
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, make_url

from sqla_river import Runner
from tests.making import eventually
from tests.programs import program
from tests.working import SLOW_POLL, nothing, put, settled, working

SAID = "LISTEN goes through a transaction pooler"


@contextmanager
def pgbouncer(url: str, mode: str) -> Generator[str]:
    """The URL of *url*'s database through a PgBouncer of the test's own."""
    path = program("pgbouncer")
    server = make_url(url)
    host, port = str(server.query.get("host") or server.host), server.query.get("port") or server.port or 5432
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listening = free.getsockname()[1]
    # Not root, and whoever may enter the folder of the server's socket.
    user = Path(host).stat().st_uid if host.startswith("/") and os.geteuid() == 0 else os.geteuid()
    folder = Path(tempfile.mkdtemp(prefix="river-bouncer-"))
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n* = host={host} port={port} user={server.username or 'postgres'} "
        f"{f'password={server.password}' if server.password else ''}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {listening}\nunix_socket_dir =\n"
        f"auth_type = any\npool_mode = {mode}\ndefault_pool_size = 20\nignore_startup_parameters = options\n"
    )
    os.chown(folder, user, -1)
    folder.chmod(0o755)
    process = subprocess.Popen([path, str(settings)], user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pooled = server.set(host="127.0.0.1", port=listening, query={})
    try:

        def answers() -> bool:
            assert process.poll() is None, "PgBouncer has ended"
            with suppress(psycopg.OperationalError):
                psycopg.connect(pooled.set(drivername="postgresql").render_as_string(hide_password=False)).close()
                return True
            return False

        eventually(answers, what="PgBouncer to answer")
        yield pooled.render_as_string(hide_password=False)
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)


def hears(runner: Runner) -> bool:
    incarnation = runner._incarnation
    return incarnation is not None and incarnation._fetcher._hears()


def test_a_listener_on_a_transaction_pooler_is_found_out_and_jobs_are_polled_for(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with pgbouncer(url, "transaction") as through:
        pooled = create_engine(through, connect_args={"prepare_threshold": None})
        with caplog.at_level(logging.WARNING), working(pooled, nothing, poll=timedelta(milliseconds=100)) as runner:
            (job_id,) = put(engine, 1)
            assert settled(engine, job_id)["state"] == "completed"
            assert not hears(runner)
        warned = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
        caplog.clear()
        with working(pooled, nothing, listen=engine, poll=SLOW_POLL) as runner:
            (job_id,) = put(engine, 2)
            assert settled(engine, job_id)["state"] == "completed"
            assert hears(runner)
        pooled.dispose()

    assert len(warned) == 1
    assert "give the Runner listen=" in warned[0]
    assert SAID not in caplog.text


def test_a_listener_on_a_session_pooler_hears(url: str, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with pgbouncer(url, "session") as through:
        pooled = create_engine(through)
        with working(engine, nothing, listen=pooled, poll=SLOW_POLL) as runner:
            (job_id,) = put(engine, 1)
            assert settled(engine, job_id)["state"] == "completed"
            assert hears(runner)
        pooled.dispose()

    assert SAID not in caplog.text
