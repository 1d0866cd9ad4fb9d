"""`sqla-river demo` through a real PgBouncer. How it goes, and how it is interrupted, test_cli.py says."""

import pytest
from sqlalchemy import Engine, make_url

from sqla_river import JobState
from tests.commands import ask, run
from tests.database import catalog
from tests.making import make_job
from tests.pooling import pgbouncer

HURRY = {"SHOP_PAY_WITHIN": "2", "SHOP_SMS_PAUSE": "0.2", "SHOP_SENDING_TAKES": "0.01"}
MINE = "SELECT array_agg(river_job::text ORDER BY id) FROM river_job"


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("ignored", ["options", "extra_float_digits"], ids=["drops options", "refuses options"])
def test_a_demo_through_a_pooler_touches_no_row_and_no_table_of_the_user(
    url: str, engine: Engine, mode: str, ignored: str
) -> None:
    for state in JobState:
        make_job(engine, state=state)
    before, tables = ask(url, MINE), catalog(make_url(url))

    with pgbouncer(url, mode, ignored=ignored) as through:
        ended = run("demo", "--orders", "3", "--database-url", through, env=HURRY)

    assert ask(url, MINE) == before
    assert catalog(make_url(url)) == tables
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "through a pooler" in ended.stdout
    assert "orders: 1 cancelled, 2 paid; teapots: 98 on the shelf" in ended.stdout
