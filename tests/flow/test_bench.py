"""`sqla-river bench`, as a process of its own, on the server of the tests."""

import json
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import create_engine, text

COMMAND = [sys.executable, "-c", "from sqla_river.cli import main; main()", "bench"]
SHORT = ["--jobs", "300", "--seconds", "0.2", "--rate", "50", "--slots", "10"]


def _bench(url: str, *arguments: str) -> str:
    ended = subprocess.run(
        [*COMMAND, *SHORT, "--database-url", url, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout


def _schemas(url: str) -> list[str]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'sqla_river_bench%'"))
        names = list(found.scalars())
    engine.dispose()
    return names


@pytest.mark.parametrize("handlers", ["threads", "asyncio"])
def test_every_profile_gives_its_figures_and_leaves_nothing_behind(empty_url: str, handlers: str) -> None:
    told: dict[str, Any] = json.loads(_bench(empty_url, "--json", "--handlers", handlers))

    figures = {(figure["profile"], figure["name"]): figure["value"] for figure in told["figures"]}
    assert {profile for profile, _ in figures} == {"insert", "work", "latency", "mixed"}
    assert all(value > 0 for value in figures.values())
    assert figures["latency", "idle, p50"] <= figures["latency", "idle, p95"] <= figures["latency", "idle, max"]
    assert told["settings"]["handlers"] == handlers
    assert set(told["versions"]) == {"postgresql", "sqlalchemy", "psycopg", "python"}
    assert _schemas(empty_url) == []


def test_a_profile_that_is_named_is_measured_alone_and_shown_in_a_table(empty_url: str) -> None:
    shown = _bench(empty_url, "work")

    assert "| work " in shown
    assert "insert" not in shown
    assert "your server, in schema sqla_river_bench_" in shown
