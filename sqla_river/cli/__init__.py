"""The command line. `main` is the console script; the rest is imported inside it, where Ctrl-C is met with a word."""

import sys

from sqla_river.cli.interrupts import kept

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended: 128 + SIGINT."""


def main() -> None:
    """Run `sqla-river`."""
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _run() -> int:
    try:
        return _told()
    except ImportError as error:
        cure = _cure(error)
        if cure is None:
            raise
        print(cure, file=sys.stderr)
        return 1


def _cure(error: ImportError) -> str | None:
    """What to say of an import that failed, where it is for want of an extra."""
    missing = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError):
        extra = {"click": "cli", "rich": "cli", "psycopg": "binary"}.get(missing)
        return f"sqla-river needs {missing}; run pip install 'sqla-river[{extra}]'" if extra is not None else None
    if "no pq wrapper available" in str(error):  # psycopg's words, with the three reasons below them
        return "psycopg finds no libpq; run pip install 'sqla-river[binary]'"
    return None


def _told() -> int:
    with kept():
        import click

        from sqla_river.cli.app import app
    try:
        code: int | None = app.main(prog_name="sqla-river", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # click's word for Ctrl-C
        raise KeyboardInterrupt from None
    return code or 0
