"""What of the journal goes: operations that have ended long ago, a few whenever another one ends.

The tidying runs inside the transaction that ends an operation; only :mod:`qmpsnap.store.sqlite.journal` calls it.
"""

import sqlite3

from msgspec import Struct

from qmpsnap.store.sqlite import queries
from qmpsnap.store.sqlite.database import Database

AGE = 90 * 24 * 3600.0
"""Seconds that an ended operation is kept."""
KEPT = 10_000
"""Ended operations of all machines that are kept, whatever their age."""
AT_ONCE = 100
"""How many go at the end of one operation: it must not take long, and goes faster than new ones come."""
LOOKED = 400
"""How many are looked at for that."""

_ENDED = "state IN ('settled', 'failed')"
# One whose effect is not known is what somebody may still have to find out about, and a snapshot tells which made it.
_DONE_WITH = (
    "(state = 'settled' OR effect IS NOT NULL) AND effect IS NOT 'unknown'"
    " AND NOT EXISTS (SELECT 1 FROM snapshot WHERE snapshot.operation = operation.id)"
)


class Pruned(Struct, frozen=True):
    """How many operations of a machine were removed from the journal, and when the last of them had ended."""

    count: int
    until: float


def prune(connection: sqlite3.Connection, *, now: float) -> None:
    """Remove some of the operations that are too old or too many, and note how many of each machine.

    A few of the oldest are looked at, from where the last look ended: most of a large store made a snapshot, and stay.
    """
    (recorded,) = connection.execute("SELECT count(*) FROM operation").fetchone()
    surplus = recorded - KEPT
    if surplus > 0:
        surplus -= connection.execute(f"SELECT count(*) FROM {queries.OPEN}").fetchone()[0]
    (since,) = connection.execute("SELECT pruned FROM serial").fetchone()
    oldest = f"SELECT id, machine, updated, {_DONE_WITH} FROM operation WHERE {_ENDED} AND updated > ? ORDER BY updated"
    found: list[tuple[int, str, float]] = []
    for looked, (number, machine, updated, done_with) in enumerate(connection.execute(oldest, (since,))):
        if looked == LOOKED:
            since = updated
            break
        if len(found) == AT_ONCE:
            break
        if updated >= now - AGE and len(found) >= surplus:
            since = 0
            break
        if done_with:
            found.append((number, machine, updated))
    else:
        since = 0
    connection.execute("UPDATE serial SET pruned = ? WHERE pruned <> ?", (since, since))
    connection.executemany("DELETE FROM operation WHERE id = ?", [(number,) for number, _, _ in found])
    connection.executemany(
        "INSERT INTO pruned (machine, count, until) VALUES (?, 1, ?) ON CONFLICT (machine) DO UPDATE"
        " SET count = count + 1, until = max(until, excluded.until)",
        [(machine, updated) for _, machine, updated in found],
    )


class PrunedTable:
    """What was removed, by machine."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, machine: str) -> Pruned | None:
        """What was removed of a machine's operations; None where all of them are there."""
        with self._database.reading() as sql:
            row = sql.execute("SELECT count, until FROM pruned WHERE machine = ?", (machine,)).fetchone()
        return Pruned(*row) if row else None
