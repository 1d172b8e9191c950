"""A machine's content of the store, from which an operation's outcome is derived. Used by the SQLite store only."""

import sqlite3
from typing import Final

from qmpsnap.model.operations.outcome import Recorded

_SNAPSHOTS: Final = (
    "SELECT snapshot.name, snapshot.state FROM snapshot JOIN machine ON machine.id = snapshot.machine"
    " WHERE machine.name = ? ORDER BY snapshot.id"
)
_CURRENT: Final = (
    "SELECT snapshot.name FROM machine JOIN snapshot ON snapshot.id = machine.current WHERE machine.name = ?"
)
_LAYERS: Final = """
    WITH RECURSIVE chain (disk, position, id, depth) AS (
        SELECT disk.name, disk.position, disk.active, 0 FROM disk JOIN machine ON machine.id = disk.machine
        WHERE machine.name = ?
        UNION ALL
        SELECT chain.disk, chain.position, layer.backing, depth + 1 FROM chain JOIN layer ON layer.id = chain.id
        WHERE layer.backing IS NOT NULL
    )
    SELECT chain.disk, layer.id, layer.virtual_size FROM chain JOIN layer ON layer.id = chain.id
    ORDER BY chain.position, chain.disk, chain.depth DESC
"""


def read(sql: sqlite3.Connection, machine: str) -> Recorded:
    """The present content; empty for a machine that does not exist."""
    current = sql.execute(_CURRENT, (machine,)).fetchone()
    disks: dict[str, list[tuple[str, int]]] = {}
    for disk, layer, size in sql.execute(_LAYERS, (machine,)):
        disks.setdefault(disk, []).append((layer, size))
    return Recorded(
        current=current[0] if current else None,
        snapshots=dict(sql.execute(_SNAPSHOTS, (machine,)).fetchall()),
        disks={disk: tuple(layers) for disk, layers in disks.items()},
        name=machine,
    )
