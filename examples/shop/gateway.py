"""The world outside, which is not in the transaction. These only pretend."""

import logging
import threading
import time

from shop import settings

log = logging.getLogger(__name__)


class GatewayError(Exception):
    pass


class Gateway:
    """Sends messages. One that comes again under the same key is not sent again: that is what keys are for.

    The first *failures* calls fail, as such services do.
    """

    def __init__(self, name: str, failures: int = 0) -> None:
        self.sent: dict[str, str] = {}
        self._name = name
        self._failures = failures
        self._lock = threading.Lock()

    def send(self, to: str, text: str, key: str) -> None:
        time.sleep(settings.SENDING_TAKES.total_seconds())
        with self._lock:
            if self._failures:
                self._failures -= 1
                raise GatewayError(f"the {self._name} gateway is out of order")
            self.sent.setdefault(key, f"{to}: {text}")


sms = Gateway("SMS", failures=1)
email = Gateway("e-mail")
