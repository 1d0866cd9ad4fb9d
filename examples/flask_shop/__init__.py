"""The shop as a Flask app: ``flask --app flask_shop run``."""

import os

from flask import Flask
from sqlalchemy import make_url

from flask_shop.models import Customer, Product, db
from flask_shop.river import river
from flask_shop.views import views


def create_app() -> Flask:
    app = Flask(__name__)
    url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg")
    app.config.from_mapping(
        SECRET_KEY="for a shop to play in",
        SQLALCHEMY_DATABASE_URI=url,
        SQLALCHEMY_ENGINE_OPTIONS={"pool_pre_ping": True},
    )
    app.config.from_prefixed_env()
    db.init_app(app)
    river.init_app(app)
    app.register_blueprint(views)

    @app.cli.command("open-shop")
    def open_shop() -> None:
        """Make the shop's tables, and fill the shelf."""
        db.create_all()
        db.session.add(Product(name="teapot", stock=100))
        db.session.add(Customer(name="Ada", phone="+44 20 7946 0001", email="ada@example.org"))
        db.session.commit()

    return app
