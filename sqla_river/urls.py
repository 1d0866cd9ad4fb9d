"""Which database is meant."""

from typing import Final

from sqlalchemy import URL, make_url

from sqla_river.errors import InvalidOptionError

DRIVER: Final = "postgresql+psycopg"


def parse_url(value: str) -> URL:
    """A URL as PostgreSQL, Heroku or SQLAlchemy write it, whatever its driver: ours is psycopg 3.

    Raises:
        InvalidOptionError: it is none, or of another database; its password is never told.
    """
    scheme, colon, rest = value.partition("://")
    try:
        url = make_url(f"postgresql://{rest}" if scheme == "postgres" else f"{scheme}{colon}{rest}")
    except Exception:  # noqa: BLE001 - whatever it is, its text may quote the password
        raise InvalidOptionError(
            "url", "not a database URL; write postgresql://user:password@host:5432/database"
        ) from None
    if url.get_backend_name() != "postgresql":
        raise InvalidOptionError("url", f"sqla_river needs postgresql://..., got '{url.get_backend_name()}'")
    return url.set(drivername=DRIVER)
