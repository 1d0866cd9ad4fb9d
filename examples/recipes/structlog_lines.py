"""Each log record of sqla_river, and of your handlers' ``job.log``, as one line of JSON by structlog.

What ``extra`` says (job_id, kind, queue, attempt, runner) becomes fields.
"""

import logging
import sys
from typing import TextIO

import structlog


def set_up(stream: TextIO = sys.stderr) -> None:
    """Call it once, before `Runner.run`."""
    lines = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="iso"),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(lines)
    logger = logging.getLogger("sqla_river")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # `sqla-river work` has set up the root logger by now: it would write each line once more
