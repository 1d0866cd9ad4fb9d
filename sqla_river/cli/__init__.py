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
        with kept():
            import click

            from sqla_river.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"click", "rich"}:
            raise
        print(f"sqla-river needs {missing}; run pip install 'sqla-river[cli]'", file=sys.stderr)
        return 1
    try:
        code: int | None = app.main(prog_name="sqla-river", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # click's word for Ctrl-C
        raise KeyboardInterrupt from None
    return code or 0
