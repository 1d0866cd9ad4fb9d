"""sqla_river in a Flask app, with Flask-SQLAlchemy or without: see `FlaskRiver`."""

try:
    from sqla_river.ext.flask.extension import FlaskRiver
except ModuleNotFoundError as error:
    if error.name != "flask":
        raise
    raise ImportError("sqla_river.ext.flask needs Flask; run pip install 'sqla-river[flask]'", name="flask") from error

__all__ = ["FlaskRiver"]
