"""`python -m sqla_river.cli`."""

from sqla_river.cli import main

main()
