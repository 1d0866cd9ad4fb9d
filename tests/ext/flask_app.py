"""An app for tests that run Flask as a process of its own; its settings come from the environment (``FLASK_...``)."""

import os
from typing import Any

from flask import Flask, current_app
from flask_sqlalchemy import SQLAlchemy

from sqla_river import JobContext
from sqla_river.ext.flask import FlaskRiver
from tests.making import Count

db: Any = SQLAlchemy()
river = FlaskRiver()


@river.workers.register(Count)
def count(job: JobContext[Count]) -> None:
    """Says which process works it."""
    job.output({"pid": os.getpid(), "app": current_app.name})


def create_app() -> Flask:
    app = Flask("counting")
    app.config.from_prefixed_env()
    db.init_app(app)
    river.init_app(app)

    @app.get("/pid")
    def pid() -> str:
        return str(os.getpid())

    @app.post("/jobs")
    def put() -> str:
        job = river.enqueue(Count(1))
        db.session.commit()
        return str(job.id)

    return app
