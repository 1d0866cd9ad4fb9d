"""examples/flask_shop as its users run it: a web server, a worker, and a browser that looks at the page."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException, WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from sqlalchemy import create_engine, text

from tests.making import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 30.0


@pytest.fixture
def environment(empty_url: str) -> Mapping[str, str]:
    path = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SHOP_", "FLASK_"))}
    return {**plain, "PYTHONPATH": path, "DATABASE_URL": empty_url, "SHOP_SMS_PAUSE": "0.2"}


@pytest.fixture
def page(environment: Mapping[str, str]) -> Iterator[str]:
    """The address of the shop, whose worker works; at the end both stop as they should."""

    def start(*words: str, stderr: int | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flask", "--app", "flask_shop", *words]
        return subprocess.Popen(command, cwd=EXAMPLES, env=environment, stderr=stderr, text=True)

    for making in [start("river", "migrate"), start("open-shop")]:
        assert making.wait(PATIENCE) == 0
    worker, server = start("river", "work"), start("run", "--port", "0", stderr=subprocess.PIPE)
    with server, worker:
        try:
            assert server.stderr is not None
            yield next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(PATIENCE) == 0
        finally:
            worker.kill()
            server.kill()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    """A headless Chromium; in CI it has to be there."""
    found, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (found and driver):
        if os.environ.get("CI"):
            pytest.fail("CI has no browser: apt-get install chromium chromium-driver")
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = found
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}"):
        options.add_argument(word)
    browser = Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def _changes(error: WebDriverException) -> bool:
    """Whether a look came upon a page that loads anew: it is asked again. One case of it Chromium tells by no name."""
    return isinstance(error, StaleElementReferenceException | NoSuchElementException) or (
        "does not belong to the document" in str(error)
    )


class Reader:
    """Reads a page that changes under its eyes."""

    def __init__(self, browser: Chrome, address: str) -> None:
        self._browser = browser
        browser.get(address)

    def text(self, css: str) -> str:
        try:
            return self._browser.find_element(By.CSS_SELECTOR, css).text
        except WebDriverException as error:
            if not _changes(error):
                raise
            return ""

    def wait(self, css: str, *parts: str) -> None:
        """Until the element says all of *parts*."""
        eventually(lambda: all(part in self.text(css) for part in parts), PATIENCE, f"{css} to say {parts}")

    def click(self, css: str) -> None:
        def clicked() -> bool:
            try:
                self._browser.find_element(By.CSS_SELECTOR, css).click()
            except WebDriverException as error:
                if not _changes(error):
                    raise
                return False
            return True

        eventually(clicked, PATIENCE)


def test_a_customer_orders_pays_and_sees_the_jobs_happen(browser: Chrome, page: str, empty_url: str) -> None:
    reader = Reader(browser, page)
    reader.wait("#shelf", "100 teapots on the shelf, 0 set aside", "Ada has 0 points")

    reader.click("#order")
    reader.wait("#shelf", "99 teapots on the shelf, 1 set aside")
    reader.wait("#order-1", "pending")
    reader.wait("#jobs", "check_paid scheduled")

    reader.click("#order-1 button")
    reader.wait("#shelf", "99 teapots on the shelf, 0 set aside", "Ada has 10 points")
    reader.wait("#order-1", "paid")
    reader.wait("#jobs", "add_points completed 1 of 25", "send_email completed 1 of 5")
    reader.wait("#jobs", "send_sms completed 2 of 3 GatewayError: the SMS gateway is out of order")

    reader.click("#order")
    reader.wait("#order-2", "pending")
    engine = create_engine(empty_url)
    with engine.begin() as connection:  # half an hour goes by
        due = "UPDATE river_job SET state = 'available', scheduled_at = now() WHERE args @> '{\"order_id\": 2}'"
        connection.execute(text(due))
    engine.dispose()
    reader.wait("#order-2", "cancelled")
    reader.wait("#shelf", "99 teapots on the shelf, 0 set aside", "Ada has 10 points")
