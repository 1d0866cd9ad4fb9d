"""The shop's durations. The demo and the tests are in a hurry: they set the environment before the shop is imported."""

import os
from datetime import timedelta


def seconds(name: str, otherwise: float) -> timedelta:
    return timedelta(seconds=float(os.environ.get(name, otherwise)))


PAY_WITHIN = seconds("SHOP_PAY_WITHIN", 30 * 60)
SMS_PAUSE = seconds("SHOP_SMS_PAUSE", 60)
EMAIL_PAUSE = seconds("SHOP_EMAIL_PAUSE", 30)
SENDING_TAKES = seconds("SHOP_SENDING_TAKES", 0.03)
