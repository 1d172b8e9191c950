"""The state of frozen images' files at their freeze, and each time another program had written to them."""

import sqlite3
from collections.abc import Iterable, Mapping

import msgspec

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.stamp import History, Stamp
from qmpsnap.model.names import LayerId
from qmpsnap.store.sqlite import queries, rows
from qmpsnap.store.sqlite.database import Database
from qmpsnap.store.sqlite.layer_table import LayerTable

_OF = (
    "SELECT layer, since, mtime_ns, size, ctime_ns, digest FROM stamp"
    " WHERE layer IN (SELECT value FROM json_each(?)) ORDER BY layer, since"
)
_ADD = "INSERT OR REPLACE INTO stamp (layer, since, mtime_ns, size, ctime_ns, digest)"
_NONE = "NOT EXISTS (SELECT 1 FROM stamp WHERE layer = ?1)"


class FrozenTable:
    """Those rows of a store."""

    def __init__(self, database: Database, layers: LayerTable) -> None:
        self._database = database
        self._layers = layers

    def stamps(self, layers: Iterable[LayerId]) -> dict[LayerId, History]:
        """Those of these layers."""
        found: dict[LayerId, History] = {}
        with self._database.reading() as sql:
            for row in sql.execute(_OF, (msgspec.json.encode([*layers]).decode(),)):
                stamp = Stamp(since=row[1], mtime_ns=row[2], size=row[3], ctime_ns=row[4], digest=row[5])
                found[LayerId(row[0])] = (*found.get(LayerId(row[0]), ()), stamp)
        return found

    def unrecorded(self, machine: str) -> list[Layer]:
        """The layers that a machine reads of which there is none; without those that guests write to."""
        with self._database.reading() as sql:
            number = rows.machine_id(sql, machine)
            return [self._layers.read(row) for row in sql.execute(queries.UNRECORDED, (number, number))]

    def record(self, found: Mapping[LayerId, Stamp], *, gone: Iterable[tuple[LayerId, int]] = ()) -> None:
        """Record the present state of frozen images, and remove those records of them that no snapshot uses."""
        with self._database.writing() as sql:
            sql.executemany("DELETE FROM stamp WHERE layer = ? AND since = ?", gone)
            sql.executemany(f"{_ADD} VALUES (?, ?, ?, ?, ?, ?)", _values(found))

    def forget(self, layers: Iterable[LayerId]) -> None:
        """Forget images that are about to be written to without an operation."""
        with self._database.writing() as sql:
            drop(sql, layers)


def add(sql: sqlite3.Connection, machine: str, found: Mapping[LayerId, Stamp]) -> None:
    """Record layers that a machine has just frozen, of which nothing is recorded, in a transaction that is open.

    Not of a machine with a snapshot that was overwritten: from when on they count is to be found out then.
    """
    if found and not sql.execute(queries.OVERWRITTEN, (machine,)).fetchone():
        sql.executemany(f"{_ADD} SELECT ?1, ?2, ?3, ?4, ?5, ?6 WHERE {_NONE}", _values(found))


def _values(found: Mapping[LayerId, Stamp]) -> list[tuple[LayerId, int, int, int, int, str]]:
    return [(layer, of.since, of.mtime_ns, of.size, of.ctime_ns, of.digest) for layer, of in found.items()]


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
