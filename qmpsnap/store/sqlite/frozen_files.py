"""The state of frozen images' files at their freeze, and each time another program had written to them."""

import sqlite3
from collections.abc import Iterable, Mapping

import msgspec

from qmpsnap.model.layers.stamp import History, Stamp
from qmpsnap.model.names import LayerId
from qmpsnap.store.sqlite.database import Database

_OF = (
    "SELECT layer, since, mtime_ns, size, ctime_ns, digest FROM stamp"
    " WHERE layer IN (SELECT value FROM json_each(?)) ORDER BY layer, since"
)
_PUT = "INSERT OR REPLACE INTO stamp (layer, since, mtime_ns, size, ctime_ns, digest) VALUES (?, ?, ?, ?, ?, ?)"


class FrozenTable:
    """Those rows of a store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def stamps(self, layers: Iterable[LayerId]) -> dict[LayerId, History]:
        """Those of these layers."""
        found: dict[LayerId, History] = {}
        with self._database.reading() as sql:
            for row in sql.execute(_OF, (msgspec.json.encode([*layers]).decode(),)):
                stamp = Stamp(since=row[1], mtime_ns=row[2], size=row[3], ctime_ns=row[4], digest=row[5])
                found[LayerId(row[0])] = (*found.get(LayerId(row[0]), ()), stamp)
        return found

    def record(self, found: Mapping[LayerId, Stamp], *, gone: Iterable[tuple[LayerId, int]] = ()) -> None:
        """Record the present state of frozen images, and remove those records of them that no snapshot uses."""
        rows = [(layer, of.since, of.mtime_ns, of.size, of.ctime_ns, of.digest) for layer, of in found.items()]
        with self._database.writing() as sql:
            sql.executemany("DELETE FROM stamp WHERE layer = ? AND since = ?", gone)
            sql.executemany(_PUT, rows)

    def forget(self, layers: Iterable[LayerId]) -> None:
        """Forget images that are about to be written to without an operation."""
        with self._database.writing() as sql:
            drop(sql, layers)


def drop(sql: sqlite3.Connection, layers: Iterable[LayerId]) -> None:
    """Forget them in a transaction that is open."""
    sql.executemany("DELETE FROM stamp WHERE layer = ?", [(layer,) for layer in layers])


def drop_claimed(sql: sqlite3.Connection, operation: int) -> None:
    """Forget the images that an operation has removed, of which the size was needed until their files had gone."""
    sql.execute(
        "DELETE FROM stamp WHERE layer IN (SELECT name FROM claim WHERE operation = ?)"
        " AND NOT EXISTS (SELECT 1 FROM layer WHERE layer.id = stamp.layer)",
        (operation,),
    )
