"""Who takes part: on which server, with which packages, and how many of the jobs."""

from collections.abc import Sequence
from typing import Final, Literal

import attrs

Kind = Literal["postgres", "redis", "rabbitmq"]


@attrs.frozen
class Entry:
    """A peer."""

    name: str
    module: str
    server: Kind
    requirements: Sequence[str] = ()
    """What pip installs into its own environment; without any it runs in ours."""
    programs: Sequence[str] = ()
    """What must be on the PATH besides."""
    packages: str = ""
    """Debian's name for what has these programs."""
    variant: str = ""
    share: float = 1.0
    """Of the jobs that are asked for: what takes a tenth of the jobs a second needs no more of them for a figure."""


LOOP: Final = "loop"
OURS: Final = "sqla_river-threads"

CATALOG: Final = (
    Entry(LOOP, "loop", "postgres"),
    Entry(OURS, "runner", "postgres", variant="threads"),
    Entry("sqla_river-asyncio", "runner", "postgres", variant="asyncio"),
    Entry("pgqueuer", "on_pgqueuer", "postgres", ["pgqueuer[asyncpg]==1.6.0"], share=0.5),
    Entry("awa", "on_awa", "postgres", ["awa-pg==0.6.9"], share=0.5),
    Entry("chancy", "on_chancy", "postgres", ["chancy==0.26.0", "psycopg[binary]==3.3.9"], share=0.25),
    Entry(
        "procrastinate", "on_procrastinate", "postgres", ["procrastinate==3.10.0", "psycopg[binary]==3.3.9"], share=0.05
    ),
    Entry("sidekiq", "on_sidekiq", "redis", programs=["ruby", "sidekiq"], packages="ruby-sidekiq", share=0.5),
    Entry("dramatiq-redis", "on_dramatiq", "redis", ["dramatiq[redis,rabbitmq]==2.2.1"], variant="redis", share=0.25),
    Entry(
        "dramatiq-rabbitmq",
        "on_dramatiq",
        "rabbitmq",
        ["dramatiq[redis,rabbitmq]==2.2.1"],
        variant="rabbitmq",
        share=0.25,
    ),
    Entry("celery-redis", "on_celery", "redis", ["celery[redis]==5.7.0"], share=0.1),
    Entry("rq-redis", "on_rq", "redis", ["rq==3.0.0"], share=0.01),
)
