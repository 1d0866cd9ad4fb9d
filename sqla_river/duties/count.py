"""Count: take up what runners have counted into one row per minute, and into the sum of all time."""

from datetime import timedelta
from typing import Final

from sqla_river.statements import COUNT_OTHERS, DELETE_FOLDED, FOLD_COUNTS, PRUNE_HISTORY
from sqla_river.store import OwnConnection

BATCH: Final = 10_000


class Count:
    """Counts what no runner of ours has ended, folds minutes that are over, and drops those of a week ago."""

    name = "count"
    every = timedelta(minutes=1)

    def entitled(self) -> bool:
        return True

    def do(self, own: OwnConnection) -> bool:
        own.execute(COUNT_OTHERS)
        folded = own.execute(FOLD_COUNTS).scalar_one() >= BATCH
        spent = own.execute(DELETE_FOLDED).rowcount >= BATCH
        pruned = own.execute(PRUNE_HISTORY).rowcount >= BATCH
        return folded or spent or pruned
