"""The shop as a Pyramid application. `main` is what `development.ini` names."""

import os
from typing import Any

from pyramid.config import Configurator
from sqlalchemy import create_engine

from shop.models import sessions


def main(_global_config: dict[str, str], **settings: Any) -> Any:
    """The WSGI application."""
    engine = create_engine(os.environ["DATABASE_URL"], pool_pre_ping=True, pool_size=35)  # one for each slot, below
    sessions.configure(bind=engine)
    config: Any = Configurator(settings=settings)
    config.registry["dbsession_factory"] = sessions
    config.include("pyramid_jinja2")
    config.include("pyramid_shop.dbsession")
    config.include("sqla_river.ext.pyramid")
    config.add_river_workers("shop.jobs.workers")
    config.add_river_workers("pyramid_shop.receipts.workers")
    config.include("pyramid_shop.views")
    return config.make_wsgi_app()
