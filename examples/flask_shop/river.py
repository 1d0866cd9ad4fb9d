"""The extension that the views enqueue with."""

from flask_shop.jobs import QUEUES, workers
from sqla_river.ext.flask import FlaskRiver

river = FlaskRiver(workers=workers, queues=QUEUES)
