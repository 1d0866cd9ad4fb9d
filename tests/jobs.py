"""Args classes that several tests enqueue."""

from typing import ClassVar

import attrs

from sqla_river.options import InsertOptions


@attrs.frozen
class Ping:
    """The plainest job."""

    kind: ClassVar[str] = "ping"
    n: int = 0


@attrs.frozen
class SendSMS:
    """A job whose class says how it is put in."""

    kind: ClassVar[str] = "send_sms"
    options: ClassVar[InsertOptions] = InsertOptions(
        queue="notifications", priority=2, max_attempts=3, tags=("sms",), metadata={"from": "class"}
    )
    order_id: str
