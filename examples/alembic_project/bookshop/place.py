"""Place orders: ``python -m bookshop.place 3``."""

import sys

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from bookshop.database import engine
from bookshop.jobs import Confirm
from bookshop.models import Job, Order, river

with Session(engine) as session, session.begin():
    for _ in range(int(sys.argv[1])):
        order = Order()
        session.add(order)
        session.flush()
        job = river.enqueue(session, Confirm(order.id))
        session.flush()
        order.job_id = job.id
    count = select(func.count())
    orders = session.scalar(count.select_from(Order))
    jobs = session.scalar(count.select_from(Job))
    print(f"{orders} orders, {jobs} jobs")
