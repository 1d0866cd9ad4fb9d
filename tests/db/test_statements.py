"""The text of every statement, kept where reviewers see it; and what each must say of itself."""

import ast
import os
import re
from pathlib import Path

import pytest
from sqlalchemy import Executable

from sqla_river import statements
from tests.making import compiled

KEPT = Path(__file__).parent / "statements"
SOURCES = Path(statements.__file__).parent
REWRITE = "SQLA_RIVER_WRITE_STATEMENTS"
NAMED = {name: value for name, value in vars(statements).items() if name.isupper() and isinstance(value, Executable)}


@pytest.fixture(scope="module", autouse=True)
def rewritten() -> None:
    if os.environ.get(REWRITE):
        KEPT.mkdir(exist_ok=True)
        for path in KEPT.glob("*.sql"):
            path.unlink()
        for name, statement in NAMED.items():
            (KEPT / f"{name}.sql").write_text(compiled(statement))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_statement_is_what_was_reviewed(name: str) -> None:
    kept = KEPT / f"{name}.sql"

    assert kept.exists(), f"run the tests once with {REWRITE}=1, and review what it writes"
    assert compiled(NAMED[name]) == kept.read_text(), f"if this change is meant, run the tests once with {REWRITE}=1"


def test_no_text_is_kept_of_a_statement_that_is_gone() -> None:
    assert {path.stem for path in KEPT.glob("*.sql")} == set(NAMED)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_parameters_never_bear_the_name_of_a_column(name: str) -> None:
    assert [each for each in re.findall(r"%\((\w+)\)s", compiled(NAMED[name])) if not each.startswith("p_")] == []


@pytest.mark.parametrize("name", sorted(NAMED))
def test_no_statement_names_a_schema(name: str) -> None:
    assert not re.search(r"\b(public|river)\.", compiled(NAMED[name]))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_states_are_literals_or_a_generic_plan_cannot_use_a_partial_index(name: str) -> None:
    assert not re.search(r"\bstate(?: AS TEXT\))? (?:=|IN) [(]?%\(", compiled(NAMED[name]))


def _sources() -> dict[str, str]:
    """Each named statement with the comment that stands before it; empty for one without."""
    found: dict[str, str] = {}
    for path in SOURCES.glob("*.py"):
        lines = path.read_text().splitlines()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in NAMED:
                first = node.lineno - 1
                while lines[first - 1].startswith("#"):
                    first -= 1
                found[node.target.id] = " ".join(line[1:].strip() for line in lines[first : node.lineno - 1])
    return found


COMMENTS = _sources()


def test_every_statement_is_built_where_statements_are_built() -> None:
    assert set(COMMENTS) == set(NAMED)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_statement_says_who_calls_it(name: str) -> None:
    assert re.search(r"Caller: [\w/]+(\.py)?\b|[Tt]he same", COMMENTS[name]), COMMENTS[name]


@pytest.mark.parametrize(
    "name", sorted(name for name in NAMED if re.search(r"\bFROM river_job\b|UPDATE river_job\b", compiled(NAMED[name])))
)
def test_a_statement_that_searches_jobs_says_by_which_index(name: str) -> None:
    assert re.search(r"Index\b|[Tt]he same|river_job_\w+_idx|river_job_pkey", COMMENTS[name]), COMMENTS[name]


@pytest.mark.parametrize("name", sorted(name for name in NAMED if "FOR UPDATE" in compiled(NAMED[name])))
def test_a_statement_that_locks_says_what(name: str) -> None:
    assert re.search(r"[Ll]ocks\b|[Ll]ocked|[Tt]he same|SKIP LOCKED", COMMENTS[name]), COMMENTS[name]
