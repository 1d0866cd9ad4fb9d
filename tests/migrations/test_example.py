"""The commands of the example's README, run as they stand there."""

import re
import shutil
from pathlib import Path

from tests.migrations.projects import ROOT, connected, environment, run

EXAMPLE = ROOT / "examples" / "alembic_project"


def commands(readme: str) -> list[tuple[str, str]]:
    """Each command of the console block, with what it prints."""
    block = re.search(r"```console\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    parts = re.split(r"^\$ ", block.group(1), flags=re.MULTILINE)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2].strip()) for part in parts]


def test_the_readme_can_be_followed(tmp_path: Path, empty_url: str) -> None:
    folder = tmp_path / "project"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    env = environment(tmp_path)
    said = commands((folder / "README.md").read_text())
    assert len(said) == 8
    for command, output in said:
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            assert value.startswith("postgresql+psycopg://")
            env[name] = empty_url  # the one thing that a reader changes, too
            continue
        done = run("sh", "-c", command, folder=folder, env=env, ok=not output.startswith("FAILED"))
        printed = done.stdout + done.stderr
        assert output in printed, (command, printed)
        assert (done.returncode == 0) != output.startswith("FAILED")

    [migration] = (folder / "migrations" / "versions").glob("*.py")
    text = migration.read_text()
    steps = [line.strip() for line in text.splitlines() if line.strip().startswith("op.")]
    assert steps[0] == "op.river_upgrade(version=1, from_version=0, schema='river')"
    assert steps[-1] == "op.river_downgrade(version=0, from_version=1, schema='river')"
    assert [step.split("(")[0] for step in steps[1:-1]] == ["op.create_table", "op.drop_table"]
    with connected(empty_url) as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM orders WHERE confirmed").scalar_one() == 3


def test_the_readme_shows_what_env_py_says() -> None:
    readme, env = ((EXAMPLE / name).read_text() for name in ("README.md", "migrations/env.py"))
    for word in (
        "sqla_river_alembic.lock(connection)",
        '["alembic.autogenerate.*", "sqla_river"]',
        '{"schema": "river"}',
    ):
        assert word in readme
        assert word in env
