"""Flask-SQLAlchemy and Flask-Migrate, with and without binds: ``flask db migrate`` and ``upgrade``, and that is all."""

import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from sqla_river import ddl
from tests.migrations.projects import connected, environment, run

APP = """
import os
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Integer
from sqlalchemy.orm import mapped_column
{imports}
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["MAIN_URL"]
app.config["SQLALCHEMY_BINDS"] = {binds}
db = SQLAlchemy(app)
Migrate(app, db, autogenerate_plugins=["alembic.autogenerate.*", "sqla_river"]{options})

class Order(db.Model):
    id = mapped_column(Integer, primary_key=True)

{models}
"""
ARCHIVE = """
class Archive(db.Model):
    __bind_key__ = "other"
    id = mapped_column(Integer, primary_key=True)
"""
JOB = """
class Job(JobMixin, db.Model):
    __bind_key__ = "other"
"""


def flask(folder: Path, urls: tuple[str, str], *commands: str) -> None:
    env = environment(folder, MAIN_URL=urls[0], OTHER_URL=urls[1], FLASK_APP="app")
    for command in commands:
        run(sys.executable, "-m", "flask", *command.split(), folder=folder, env=env)


def tables(url: str, schema: str = "public") -> set[str]:
    with connected(url) as connection:
        query = "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(:s) AND relkind = 'r'"
        return set(connection.execute(text(query), {"s": schema}).scalars()) - {"alembic_version"}


@pytest.fixture
def other_url(empty_url: str, server: str) -> object:
    from tests.conftest import _database  # pyright: ignore[reportPrivateUsage]

    yield from _database(server, "")


def test_one_database(tmp_path: Path, empty_url: str) -> None:
    options = ", sqla_river={'schema': 'river'}"
    (tmp_path / "app.py").write_text(APP.format(imports="", binds={}, options=options, models=""))
    flask(tmp_path, (empty_url, ""), "db init", "db migrate", "db upgrade", "db check")
    assert tables(empty_url) == {"order"}
    assert tables(empty_url, "river") == set(ddl.TABLES)

    flask(tmp_path, (empty_url, ""), "db downgrade")
    assert tables(empty_url) == tables(empty_url, "river") == set()


@pytest.mark.parametrize("where", ["main", "other"])
def test_binds(tmp_path: Path, empty_url: str, other_url: str, where: str) -> None:
    """Without a Job of one's own the tables are in the main database; with one, where it is."""
    models = ARCHIVE + (JOB if where == "other" else "")
    imports = "from sqla_river import JobMixin" if where == "other" else ""
    binds = '{"other": os.environ["OTHER_URL"]}'
    (tmp_path / "app.py").write_text(APP.format(imports=imports, binds=binds, options="", models=models))
    urls = (empty_url, other_url)
    flask(tmp_path, urls, "db init --multidb", "db migrate", "db upgrade", "db check")
    ours = set(ddl.TABLES)
    assert tables(empty_url) == {"order"} | (ours if where == "main" else set())
    assert tables(other_url) == {"archive"} | (ours if where == "other" else set())

    flask(tmp_path, urls, "db downgrade")
    assert tables(empty_url) == tables(other_url) == set()
