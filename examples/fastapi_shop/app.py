"""The application: `uvicorn fastapi_shop.app:app`. Its views are coroutines, its jobs plain functions in threads."""

import os
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.templating import Jinja2Templates
from sqlalchemy import create_engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from shop.jobs import QUEUES, SendEmail, SendNotice, workers
from shop.models import Customer, Order, Product, Status, sessions
from shop.payment import payment_callback, place_order
from sqla_river import Job, Runner
from sqla_river.asyncio import enqueue, enqueue_many
from sqla_river.ext.asgi import lifespan

URL = os.environ["DATABASE_URL"]

engine = create_engine(URL, pool_pre_ping=True)  # of the runner and its handlers
sessions.configure(bind=engine)
async_sessions = async_sessionmaker(create_async_engine(URL, pool_pre_ping=True), expire_on_commit=False)

app = FastAPI(lifespan=lifespan(Runner(engine, workers, queues=QUEUES)))
templates = Jinja2Templates(Path(__file__).parent / "templates")


def to_home() -> Response:
    return RedirectResponse("/", status_code=303)


@app.get("/")
async def home(request: Request) -> Response:
    async with async_sessions() as session:
        page = {
            "product": (await session.scalars(select(Product))).one(),
            "orders": (await session.scalars(select(Order).order_by(Order.id.desc()).limit(10))).all(),
            "jobs": (await session.scalars(select(Job).order_by(Job.id.desc()).limit(20))).all(),
        }
    return templates.TemplateResponse(request, "home.html", page)


@app.post("/orders")
async def order() -> Response:
    try:
        async with async_sessions.begin() as session:
            customer = (await session.scalars(select(Customer))).one()
            product = (await session.scalars(select(Product))).one()
            await session.run_sync(place_order, customer, product)  # it enqueues with the plain verbs
    except IntegrityError:
        raise HTTPException(409, "Sold out.") from None
    return to_home()


@app.post("/orders/{order_id}/pay")
async def pay(order_id: int) -> Response:
    async with async_sessions.begin() as session:
        if not await session.run_sync(payment_callback, order_id, f"bank-{order_id}"):
            raise HTTPException(409, "This order does not wait for a payment.")
    return to_home()


@app.post("/orders/{order_id}/receipt")
async def send_receipt(order_id: int) -> Response:
    """Once more: the customer has lost the first."""
    async with async_sessions.begin() as session:
        found = await session.get(Order, order_id)
        if found is None or found.status != Status.PAID:
            raise HTTPException(404, "There is no such order, or it is not paid.")
        await enqueue(session, SendEmail(order_id), priority=1)
    return to_home()


@app.post("/notices")
async def send_notices() -> Response:
    """A hundred to each customer: by COPY, in one transaction."""
    async with async_sessions.begin() as session:
        addresses = (await session.scalars(select(Customer.email))).all()
        await enqueue_many(session, (SendNotice(each, f"offer {n}") for each in addresses for n in range(100)))
    return to_home()
