"""`examples/pyramid_shop`, as its README runs it: the page by pserve, the jobs by priver."""

from pathlib import Path

from sqlalchemy import create_engine, text

from tests.ext.serving import EXAMPLES, ask, let_half_an_hour_go_by, process, rows, run
from tests.making import count_states, eventually

INI = EXAMPLES / "pyramid_shop" / "development.ini"


def test_an_order_is_placed_and_paid_and_its_jobs_are_worked(empty_url: str, tmp_path: Path) -> None:
    run(tmp_path, empty_url, "python", "-m", "pyramid_shop.initialize")
    engine = create_engine(empty_url)
    ini = tmp_path / "test.ini"
    ini.write_text(INI.read_text().replace("localhost:6543", "localhost:%(port)s"))
    queues = "default=2,notifications=2,notices=5"
    with (
        process(tmp_path, empty_url, "pserve", str(ini), "port=0") as web,
        process(tmp_path, empty_url, "priver", str(ini), "port=8443", "--queues", queues) as worker,
    ):
        shop = web.wait_for(r"Serving on .*(http://127.0.0.1:\d+)")
        assert "100 teapots on the shelf, 0 set aside" in ask(shop)[1]

        assert "99 teapots on the shelf, 1 set aside" in ask(f"{shop}/orders", post=True)[1]
        status, page = ask(f"{shop}/orders/1/pay", post=True)
        assert (status, rows(page)[0][:2]) == (200, ["order 1", "paid"])
        assert ask(f"{shop}/orders/1/pay", post=True)[0] == 409
        assert ask(f"{shop}/notices", post=True)[0] == 200
        let_half_an_hour_go_by(engine)

        # 1 check, SMS, e-mail, points and receipt, 100 notices; what was refused enqueued nothing.
        eventually(lambda: count_states(engine) == {"completed": 105}, 60)
        status, receipt = ask(f"{shop}/orders/1/receipt")
        assert (status, "http://localhost:8443/orders/1/receipt" in receipt) == (200, True)
        assert rows(ask(shop)[1])[0] == ["order 1", "paid", "receipt"]

        assert worker.stop() == 0, worker.said
        assert "works queues default=2, notifications=2, notices=5" in worker.said
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM river_runner")).scalar() == 0
    engine.dispose()
