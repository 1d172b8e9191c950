"""What of the journal goes: operations that have ended long ago, a few whenever another one ends.

The tidying runs inside the transaction that ends an operation; only :mod:`qmpsnap.store.sqlite.journal` calls it.
"""

import sqlite3

from msgspec import Struct

from qmpsnap.store.sqlite.database import Database

AGE = 90 * 24 * 3600.0
"""Seconds that an ended operation is kept."""
KEPT = 10_000
"""Ended operations of all machines that are kept, whatever their age."""
AT_ONCE = 100
"""How many go at the end of one operation: it must not take long, and goes faster than new ones come."""

_ENDED = "state IN ('settled', 'failed')"
# One whose effect is not known is what somebody may still have to find out about, and a snapshot tells which made it.
_DONE_WITH = (
    f"{_ENDED} AND (state = 'settled' OR effect IS NOT NULL) AND effect IS NOT 'unknown'"
    " AND id NOT IN (SELECT operation FROM snapshot)"
)


class Pruned(Struct, frozen=True):
    """How many operations of a machine were removed from the journal, and when the last of them had ended."""

    count: int
    until: float


def prune(connection: sqlite3.Connection, *, now: float) -> None:
    """Remove some of the operations that are too old or too many, and note how many of each machine."""
    (ended,) = connection.execute(f"SELECT count(*) FROM operation WHERE {_ENDED}").fetchone()
    old = f"SELECT id, machine, updated FROM operation WHERE {_DONE_WITH} AND updated < ? ORDER BY updated LIMIT ?"
    found = connection.execute(old, (now - AGE, AT_ONCE)).fetchall()
    if len(found) < AT_ONCE and ended - len(found) > KEPT:
        excess = f"SELECT id, machine, updated FROM operation WHERE {_DONE_WITH} ORDER BY updated LIMIT ?"
        found = connection.execute(excess, (min(AT_ONCE, ended - KEPT),)).fetchall()
    connection.executemany("DELETE FROM operation WHERE id = ?", [(row[0],) for row in found])
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
