"""Maintenance that some runner does when it is due. Nobody is elected: whoever wins the row of a duty does it."""
