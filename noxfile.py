"""The suite on both lines of SQLAlchemy and on the oldest versions that pyproject.toml allows, and the linters."""

import re
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "tests-3.11", "lowest"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


@nox.session(python=PYTHONS)
@nox.parametrize("sqlalchemy", ["2.0", "2.1"])
def tests(session: nox.Session, sqlalchemy: str) -> None:
    """Run the suite with the newest release of one line of SQLAlchemy."""
    session.install("-e", ".[test]", f"sqlalchemy~={sqlalchemy}.0")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Run the suite with the oldest versions of all that pyproject.toml names."""
    session.install("-e", ".[test]", *_floors())
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check format, style and types."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("pyright")
    session.run("pytest", "-n", "0", "tests/typing")  # that each refusal is one: elsewhere there are no checkers


def _floors() -> list[str]:
    """Turn each ``name[extra]>=1.2`` of pyproject.toml into ``name==1.2``."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = project["dependencies"] + [each for name in extras if name not in {"dev", "lint"} for each in extras[name]]
    found = (re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+).*", each) for each in named)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})
