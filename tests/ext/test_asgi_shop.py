"""`examples/fastapi_shop`, as its README runs it: page and jobs in one process of uvicorn."""

from pathlib import Path

from sqlalchemy import create_engine, text

from tests.ext.serving import ask, let_half_an_hour_go_by, process, rows, run
from tests.making import count_states, eventually


def test_an_order_is_placed_and_paid_and_its_jobs_are_worked(empty_url: str, tmp_path: Path) -> None:
    run(tmp_path, empty_url, "python", "-m", "fastapi_shop.initialize")
    engine = create_engine(empty_url)
    with process(tmp_path, empty_url, "uvicorn", "fastapi_shop.app:app", "--port", "0") as web:
        shop = web.wait_for(r"running on (http://127.0.0.1:\d+)")
        assert "99 teapots on the shelf, 1 set aside" in ask(f"{shop}/orders", post=True)[1]
        assert ask(f"{shop}/orders/1/receipt", post=True)[0] == 404
        status, page = ask(f"{shop}/orders/1/pay", post=True)
        assert (status, rows(page)[0][:2]) == (200, ["order 1", "paid"])
        assert ask(f"{shop}/orders/1/pay", post=True)[0] == 409
        assert ask(f"{shop}/orders/1/receipt", post=True)[0] == 200
        assert ask(f"{shop}/notices", post=True)[0] == 200
        let_half_an_hour_go_by(engine)

        # 1 check, SMS, e-mail, points, and the e-mail again, 100 notices; what was refused enqueued nothing.
        eventually(lambda: count_states(engine) == {"completed": 105}, 60)

        web.stop()
        assert "Application shutdown complete" in web.said
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM river_runner")).scalar() == 0
    engine.dispose()
