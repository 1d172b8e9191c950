"""The state of frozen images' files at their freeze, and each time another program had written to them."""

import sqlite3
from collections.abc import Iterable, Mapping

from qmpsnap.model.layers.stamp import History, Stamp
from qmpsnap.model.names import LayerId
from qmpsnap.store.sqlite.database import Database

_ALL = "SELECT layer, since, mtime_ns, size, ctime_ns, digest FROM stamp ORDER BY layer, since"
_PUT = "INSERT OR REPLACE INTO stamp (layer, since, mtime_ns, size, ctime_ns, digest) VALUES (?, ?, ?, ?, ?, ?)"


class FrozenTable:
    """Those rows of a store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def stamps(self) -> dict[LayerId, History]:
        """All of them."""
        found: dict[LayerId, History] = {}
        with self._database.reading() as sql:
            for row in sql.execute(_ALL):
                stamp = Stamp(since=row[1], mtime_ns=row[2], size=row[3], ctime_ns=row[4], digest=row[5])
                found[LayerId(row[0])] = (*found.get(LayerId(row[0]), ()), stamp)
        return found

    def record(self, found: Mapping[LayerId, Stamp], *, gone: Iterable[tuple[LayerId, int]] = ()) -> None:
        """Record the present state of frozen images, and remove the records of layers that no longer exist."""
        rows = [(layer, of.since, of.mtime_ns, of.size, of.ctime_ns, of.digest) for layer, of in found.items()]
        with self._database.writing() as sql:
            sql.executemany("DELETE FROM stamp WHERE layer = ? AND since = ?", gone)
            sql.executemany(_PUT, rows)
            sql.execute("DELETE FROM stamp WHERE layer NOT IN (SELECT id FROM layer)")

    def forget(self, layers: Iterable[LayerId]) -> None:
        """Forget images that are about to be written to without an operation."""
        with self._database.writing() as sql:
            drop(sql, layers)


def drop(sql: sqlite3.Connection, layers: Iterable[LayerId]) -> None:
    """Forget them in a transaction that is open."""
    sql.executemany("DELETE FROM stamp WHERE layer = ?", [(layer,) for layer in layers])
