"""The command ``priver``: works the jobs of a Pyramid application. Everything else is imported inside, where a missing
Pyramid is told in a line.
"""

import argparse
import configparser
import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``priver``."""
    parser = argparse.ArgumentParser(
        prog="priver",
        description="Work the jobs of a Pyramid application, until SIGTERM or Ctrl-C.",
        epilog="Exit code 0 after such a stop, 1 for an error, 2 for a command line, or settings, that cannot be.",
    )
    parser.add_argument("config_uri", metavar="config.ini[#app]", help="the application's file of settings")
    parser.add_argument(
        "config_vars",
        metavar="name=value",
        nargs="*",
        default=[],  # else argparse says of none that they are required
        help="variables of that file, for its %%(name)s",
    )
    parser.add_argument(
        "--queues", metavar="default=10,emails=50", help="slots by queue; sqla_river.queues of the file unless said"
    )
    given = parser.parse_args(argv)
    variables = dict(each.partition("=")[::2] for each in given.config_vars)
    if not all("=" in each for each in given.config_vars):
        parser.error(f"variables are name=value, got {' '.join(given.config_vars)}")
    sys.exit(_work(given.config_uri, variables, given.queues))


def _work(config_uri: str, variables: dict[str, str], queues: str | None) -> int:
    try:
        from sqla_river.ext import pyramid as ext
    except ImportError as error:
        if error.name != "pyramid":
            raise
        return _told(error)
    from plaster import PlasterError
    from pyramid import paster
    from sqlalchemy.exc import DBAPIError

    from sqla_river.errors import ConfigError, RiverError

    paste: Any = paster
    try:
        options = {} if queues is None else {"queues": ext.parse_queues(queues)}
        paste.setup_logging(config_uri, global_conf=variables)
    except (ConfigError, FileNotFoundError, PlasterError, configparser.Error) as error:
        return _told(error, 2)
    except KeyError as error:  # of logging.config, which says no more than the name
        return _told(f"{config_uri} sets up logging, and says nothing of {error}", 2)
    try:
        try:
            paste.get_appsettings(config_uri, options=variables)
        except (configparser.Error, LookupError) as error:
            if isinstance(error, KeyError | IndexError):  # of the application, which is imported here; PasteDeploy's
                raise  # own are plain
            return _told(error, 2)
        # The request of bootstrap is closed again before the work begins: it would hold its session all the time.
        with paste.bootstrap(config_uri, options=variables) as environment:
            runner = ext.runner(environment["registry"], **options)
        runner.run()
    except RiverError as error:
        return _told(error)
    except DBAPIError as error:
        return _told(f"the database says: {str(error.orig).strip()}")
    return 0


def _told(error: object, code: int = 1) -> int:
    print("priver:", " ".join(str(error).split()), file=sys.stderr)
    return code
