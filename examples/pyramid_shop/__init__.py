"""The shop as a Pyramid application. `main` is what `development.ini` names."""

import os
from typing import Any

from pyramid.config import Configurator
from sqlalchemy import create_engine

from shop.models import sessions


def main(_global_config: dict[str, str], **settings: Any) -> Any:
    """The WSGI application."""
    engine = create_engine(os.environ["DATABASE_URL"], pool_pre_ping=True)
    sessions.configure(bind=engine)
    with Configurator(settings=settings) as config:
        config.registry["dbsession_factory"] = sessions
        config.include("pyramid_jinja2")
        config.include("pyramid_shop.dbsession")
        config.include("sqla_river.ext.pyramid")
        config.add_river_workers("shop.jobs.workers")
        config.add_river_workers("pyramid_shop.receipts.workers")
        config.add_route("home", "/")
        config.add_route("orders", "/orders")
        config.add_route("pay", "/orders/{order_id}/pay")
        config.add_route("receipt", "/orders/{order_id}/receipt")
        config.add_route("notices", "/notices")
        config.scan("pyramid_shop.views")
    return config.make_wsgi_app()
