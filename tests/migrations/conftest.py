"""The plugin, as the entry point of an installation would register it, and projects to use it in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.runtime.plugins import Plugin

import sqla_river_alembic
from tests.migrations.projects import Project, is_installed

if not is_installed():
    Plugin.setup_plugin_from_module(sqla_river_alembic, "sqla_river")


@pytest.fixture
def project(tmp_path: Path, empty_url: str) -> Project:
    """A project on an empty database."""
    return Project(tmp_path, empty_url)


@pytest.fixture
def new_project(tmp_path: Path) -> Callable[..., Project]:
    """A project of one's own making: ``new_project(url, **settings)``."""

    def make(url: str, **settings: Any) -> Project:
        return Project(tmp_path, url, **settings)

    return make
