"""``request.dbsession``, joined to ``request.tm``, as Pyramid's own starter for SQLAlchemy has it."""

from typing import Any, cast

import zope.sqlalchemy
from sqlalchemy.orm import Session


def includeme(config: Any) -> None:
    config.include("pyramid_tm")
    config.add_request_method(dbsession, reify=True)


def dbsession(request: Any) -> Session:
    session: Session = request.registry["dbsession_factory"]()
    cast("Any", zope.sqlalchemy).register(session, transaction_manager=request.tm)
    return session
