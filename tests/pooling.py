"""A real PgBouncer in front of a test's database."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from sqlalchemy import make_url

from tests.making import eventually
from tests.programs import program

LISTENING = 6432


@contextmanager
def pgbouncer(url: str, mode: str, *, ignored: str = "options") -> Generator[str]:
    """The URL of *url*'s database through a PgBouncer of the test's own, which drops *ignored* of what a client starts
    with, and refuses the rest.
    """
    path = program("pgbouncer")
    server = make_url(url)
    host, port = str(server.query.get("host") or server.host), server.query.get("port") or server.port or 5432
    # Not root, and whoever may enter the folder of the server's socket.
    user = Path(host).stat().st_uid if host.startswith("/") and os.geteuid() == 0 else os.geteuid()
    folder = Path(tempfile.mkdtemp(prefix="river-bouncer-"))
    settings = folder / "pgbouncer.ini"
    settings.write_text(  # on a socket of its own: a port might be somebody else's by then
        f"[databases]\n* = host={host} port={port} user={server.username or 'postgres'} "
        f"{f'password={server.password}' if server.password else ''}\n"
        f"[pgbouncer]\nlisten_addr =\nlisten_port = {LISTENING}\nunix_socket_dir = {folder}\n"
        f"auth_type = any\npool_mode = {mode}\ndefault_pool_size = 20\nignore_startup_parameters = {ignored}\n"
    )
    os.chown(folder, user, -1)
    folder.chmod(0o755)
    process = subprocess.Popen([path, str(settings)], user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pooled = server.set(host=None, port=None, query={"host": str(folder), "port": str(LISTENING)})
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
        process.wait(30)
        shutil.rmtree(folder)
