"""The commands, put together."""

import click

from sqla_river.cli.bench import bench
from sqla_river.cli.demo import demo
from sqla_river.cli.health import health
from sqla_river.cli.jobs import jobs
from sqla_river.cli.queues import queues
from sqla_river.cli.stats import stats
from sqla_river.cli.tables import check_db, migrate
from sqla_river.cli.work import work


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sqla-river")
def app() -> None:
    """River for SQLAlchemy: background jobs that commit with your data."""


for _command in (bench, check_db, demo, health, jobs, migrate, queues, stats, work):
    app.add_command(_command)
