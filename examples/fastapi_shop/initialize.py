"""`python -m fastapi_shop.initialize`: makes the tables, and fills the shelf. Once."""

import os

from sqlalchemy import create_engine

from shop.models import Customer, sessions
from shop.story import open_shop
from sqla_river import create_all

engine = create_engine(os.environ["DATABASE_URL"])
create_all(engine)
open_shop(engine)
with sessions.begin() as session:
    session.add(Customer(name="Ada", phone="+44 20 7946 0001", email="ada@example.org"))
