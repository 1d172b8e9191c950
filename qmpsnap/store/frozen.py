"""What the files of frozen images were when they were frozen: ``st_mtime_ns`` and ``st_size``."""

import sqlite3
from collections.abc import Iterable, Mapping

from qmpsnap.model.names import LayerId
from qmpsnap.store.database import Database


class FrozenTable:
    """Those rows of a store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def stamps(self) -> dict[LayerId, tuple[int, int]]:
        """All of them."""
        with self._database.reading() as sql:
            return {LayerId(layer): (when, size) for layer, when, size in sql.execute("SELECT * FROM frozen")}

    def record(self, found: Mapping[LayerId, tuple[int, int]]) -> None:
        """Record images that are frozen now; what is recorded of layers that are gone goes.

        Raises:
            HostCannot: no right, no space.
        """
        with self._database.writing() as sql:
            sql.executemany("INSERT OR REPLACE INTO frozen VALUES (?, ?, ?)", [(k, *v) for k, v in found.items()])
            sql.execute("DELETE FROM frozen WHERE layer NOT IN (SELECT id FROM layer)")

    def forget(self, layers: Iterable[LayerId]) -> None:
        """Forget images that are about to be written to without an operation.

        Raises:
            HostCannot: no right, no space.
        """
        with self._database.writing() as sql:
            drop(sql, layers)


def drop(sql: sqlite3.Connection, layers: Iterable[LayerId]) -> None:
    """Forget them in a transaction that is open."""
    sql.executemany("DELETE FROM frozen WHERE layer = ?", [(layer,) for layer in layers])
