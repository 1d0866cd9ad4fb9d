"""sqla_river in a Flask app, with Flask-SQLAlchemy or without: see `FlaskRiver`."""

try:
    import flask as _flask  # noqa: F401 - to say what is missing
except ModuleNotFoundError as error:
    if error.name != "flask":
        raise
    raise ImportError("sqla_river.ext.flask needs Flask; run pip install 'sqla-river[flask]'", name="flask") from error

from sqla_river.ext.flask.extension import FlaskRiver

__all__ = ["FlaskRiver"]
