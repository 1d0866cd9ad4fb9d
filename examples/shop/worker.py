"""`sqla-river work -A shop.worker:runner` finds the runner here. Importing this opens and starts nothing."""

import os

from sqlalchemy import create_engine, make_url

from shop.jobs import QUEUES, workers
from shop.models import sessions
from sqla_river import Runner

engine = create_engine(make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg"))
sessions.configure(bind=engine)
runner = Runner(engine, workers, queues=QUEUES)
