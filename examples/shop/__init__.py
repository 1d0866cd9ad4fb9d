"""A shop whose background work is done by sqla_river: an example, and what `sqla-river demo` runs."""
