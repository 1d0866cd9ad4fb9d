"""Jobs that the database refuses to change, and a full queue of notifications."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine, text


def refuse(engine: Engine, job_ids: Sequence[int], code: str = "P0001", *, at_commit: bool = False) -> None:
    """Let a trigger refuse each change of these jobs, with the error *code*, at once or not before the commit."""
    trigger = "TRIGGER refuse BEFORE UPDATE ON river_job"
    if at_commit:
        trigger = "CONSTRAINT TRIGGER refuse AFTER UPDATE ON river_job DEFERRABLE INITIALLY DEFERRED"
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE refused AS SELECT unnest(CAST(:ids AS bigint[])) AS id"), {"ids": job_ids}
        )
        connection.execute(text("CREATE UNIQUE INDEX ON refused (id)"))
        connection.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "IF EXISTS (SELECT 1 FROM refused WHERE id = OLD.id) THEN "
                f"RAISE 'it was refused' USING errcode = '{code}'; END IF; RETURN NEW; END $$"
            )
        )
        connection.execute(text(f"CREATE {trigger} FOR EACH ROW EXECUTE FUNCTION refuse()"))


def relent(engine: Engine) -> None:
    """Refuse nothing any more."""
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE refused"))


@contextmanager
def instead(url: str, signature: str, body: str) -> Generator[Engine]:
    """An engine whose connections meet another function of ours in place of PostgreSQL's *signature*."""
    engine = create_engine(url, connect_args={"options": "-c search_path=public,pg_catalog"})
    with engine.begin() as connection:
        connection.execute(text(f"CREATE FUNCTION public.{signature} LANGUAGE plpgsql AS $$ BEGIN {body} END $$"))
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def full_queue(url: str) -> Generator[Engine]:
    """An engine for which the server's queue of notifications is full."""
    refused = "RAISE 'too many notifications in the NOTIFY queue' USING errcode = '54000';"
    with instead(url, "pg_notify(text, text) RETURNS void", refused) as engine:
        yield engine
