"""The questions that the store asks SQLite more than once, or that want explaining; no value is ever part of one.

And how the values in its columns are to be taken.
"""


def upsert(table: str, columns: str, *, key: str) -> str:
    """Add a row, or replace the one of that key, of which the version is counted."""
    names = columns.split(", ")
    changed = ", ".join(f"{name} = excluded.{name}" for name in names if name not in key.split(", "))
    insert = f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(names))})"
    return f"{insert} ON CONFLICT ({key}) DO UPDATE SET {changed}, version = version + 1"


LAYER = "id, pool, path, format, backing, virtual_size, device, inode, owned, state, birth, storage, identity"
PUT_LAYER = upsert("layer", LAYER, key="id")
PUT_HOME = upsert("home", "one, id, path, moving", key="one")
PUT_PROCESS = upsert(
    "process", "machine, pid, start_ticks, boot_id, started, accel, qemu_version, nodes", key="machine"
)
PUT_SNAPSHOT = upsert(
    "snapshot",
    "machine, name, kind, state, parent, created, description, mode, pause_ms, operation, vmstate, inside, variables,"
    " level, unquiesced, pushed, frozen_ms, max_pause_ms, tags",
    key="machine, name",
)
SNAPSHOT = (
    "SELECT s.id, s.name, s.kind, s.state, p.name, s.created, s.description, s.mode, s.pause_ms,"
    " s.operation, s.vmstate, s.inside, s.variables, s.level, s.unquiesced, s.pushed, s.frozen_ms, s.max_pause_ms,"
    " s.tags"
    " FROM snapshot s LEFT JOIN snapshot p ON p.id = s.parent"
)
POINTS = (
    "SELECT snapshot, disk, layer, tag FROM point JOIN snapshot ON snapshot.id = point.snapshot"
    " WHERE machine = ? ORDER BY point.position"
)
PLACED_POINTS = (
    "SELECT snapshot, disk, layer, tag, pool, path FROM point JOIN snapshot ON snapshot.id = point.snapshot"
    " JOIN layer ON layer.id = point.layer WHERE machine = ? ORDER BY point.position"
)
LISTED = (
    "SELECT machine.name, uuid, host, adopted IS NOT NULL, snapshot.name, pid, start_ticks, boot_id,"
    " (SELECT count(*) FROM snapshot WHERE snapshot.machine = machine.id), origin FROM machine"
    " LEFT JOIN snapshot ON snapshot.id = machine.current LEFT JOIN process ON process.machine = machine.id"
)
"""What a list shows of each machine."""
EPHEMERAL = "SELECT name FROM machine WHERE json_extract(origin, '$.ephemeral') ORDER BY name"
MACHINE = (
    "SELECT machine.name, uuid, host, spec, machine.created, snapshot.name, adopted, consent,"
    " origin, past, vmgenid, pid, start_ticks, boot_id, started, accel, qemu_version, nodes FROM machine"
    " LEFT JOIN snapshot ON snapshot.id = machine.current LEFT JOIN process ON process.machine = machine.id"
)
OF_OPERATION = (
    "SELECT machine.name, uuid, generation FROM operation JOIN machine ON machine.name = operation.machine"
    " WHERE operation.id = ?"
)
"""The machine that an operation is of; no row where that is not defined yet."""
UNNAMED = (
    "NOT EXISTS (SELECT 1 FROM disk WHERE disk.active = layer.id)"
    " AND NOT EXISTS (SELECT 1 FROM point WHERE point.layer = layer.id)"
)
LISTED_VALUES = "SELECT value FROM json_each(?)"
AMONG = f"id IN ({LISTED_VALUES})"
UNREFERENCED = (
    f"SELECT {LAYER} FROM layer WHERE {AMONG} AND {UNNAMED}"
    " AND NOT EXISTS (SELECT 1 FROM layer above WHERE above.backing = layer.id)"
)
"""Of the layers listed, those that neither a disk, nor a point, nor a layer needs."""
UNREAD = (
    "NOT EXISTS (WITH RECURSIVE above (id) AS (SELECT layer.id UNION SELECT child.id FROM above"
    " JOIN layer child ON child.backing = above.id) SELECT 1 FROM above WHERE"
    " EXISTS (SELECT 1 FROM disk WHERE disk.active = above.id) OR EXISTS (SELECT 1 FROM point WHERE layer = above.id))"
)
"""Whether no machine reads a layer, directly or through others."""
BELOW = (
    "WITH RECURSIVE part (id) AS (SELECT value FROM json_each(?) UNION SELECT layer.backing FROM part"
    " JOIN layer ON layer.id = part.id WHERE layer.backing IS NOT NULL) SELECT id FROM part"
)
"""The layers listed, and what they read."""
AROUND = (
    "WITH RECURSIVE part (id) AS (SELECT value FROM json_each(?) UNION SELECT layer.backing FROM part"
    " JOIN layer ON layer.id = part.id WHERE layer.backing IS NOT NULL UNION SELECT layer.id FROM part"
    " JOIN layer ON layer.backing = part.id) SELECT id FROM part"
)
"""The layers listed, what they read, what reads any of that, and so on."""
OWN = (
    "SELECT active FROM disk JOIN machine ON machine.id = disk.machine WHERE machine.name = ?"
    " UNION SELECT layer FROM machine JOIN snapshot ON snapshot.machine = machine.id"
    " JOIN point ON point.snapshot = snapshot.id WHERE machine.name = ?"
    " UNION SELECT id FROM layer WHERE pool = 'machines' AND path >= ? AND path < ?"
)
"""Every layer that a machine's disks and snapshots name, and those in its folder, from its name to what sorts next."""
LACKING = (
    "SELECT 1 FROM json_each(?) new JOIN layer ON layer.id = new.value WHERE layer.backing IS NOT NULL"
    " AND NOT EXISTS (SELECT 1 FROM layer below WHERE below.id = layer.backing)"
    " UNION ALL SELECT 1 FROM json_each(?) named WHERE NOT EXISTS (SELECT 1 FROM layer WHERE layer.id = named.value)"
    " UNION ALL SELECT 1 FROM json_each(?) gone WHERE EXISTS (SELECT 1 FROM layer WHERE layer.backing = gone.value)"
    " OR EXISTS (SELECT 1 FROM disk WHERE disk.active = gone.value)"
    " OR EXISTS (SELECT 1 FROM point WHERE point.layer = gone.value)"
)
"""A row where a new layer reads one that is not there, one that is named is not there, or one that went is needed."""
HIDE = f"UPDATE layer SET state = 'hidden', version = version + 1 WHERE id = ? AND state = 'ok' AND {UNNAMED}"
"""What a deleted snapshot leaves to others is hidden; so is what a forgotten machine leaves."""
NAMED = (
    "SELECT active FROM disk WHERE machine = ? UNION SELECT layer FROM point"
    " JOIN snapshot ON snapshot.id = point.snapshot WHERE snapshot.machine = ?"
)
"""Every layer that one machine's disks and snapshots name."""
_READ = (
    f"WITH RECURSIVE read (id) AS ({NAMED} UNION SELECT layer.backing FROM read JOIN layer ON layer.id = read.id"
    " WHERE layer.backing IS NOT NULL)"
)
_IMAGE = "layer.id, pool, path, format, backing, device, inode, birth, storage, identity"
READ_IMAGES = f"{_READ} SELECT {_IMAGE} FROM read JOIN layer ON layer.id = read.id"
"""The images that one machine reads; a layer that is recorded to read itself is there once."""
UNRECORDED = (
    f"{_READ} SELECT {', '.join(f'layer.{name}' for name in LAYER.split(', '))} FROM read"
    " JOIN layer ON layer.id = read.id WHERE NOT EXISTS (SELECT 1 FROM stamp WHERE stamp.layer = read.id)"
    " AND NOT EXISTS (SELECT 1 FROM disk WHERE disk.active = read.id)"
)
"""The layers that one machine reads, and nobody writes to, of which nothing is recorded as frozen."""
OVERWRITTEN = (
    "SELECT 1 FROM snapshot JOIN machine ON machine.id = snapshot.machine"
    " WHERE machine.name = ? AND snapshot.state = 'overwritten' LIMIT 1"
)
ACTIVE_IMAGES = (
    f"SELECT machine.name, {_IMAGE} FROM machine JOIN disk ON disk.machine = machine.id"
    " JOIN layer ON layer.id = disk.active"
)
READ_STAMPS = (
    f"{_READ} SELECT layer, mtime_ns, size, ctime_ns, digest, since FROM read JOIN stamp ON stamp.layer = read.id"
    " ORDER BY layer, since"
)
"""What they were when they were frozen, in the order of the fields of a stamp."""
ELSEWHERE = "SELECT 1 FROM machine WHERE host <> ? LIMIT 1"
"""Whether another host has machines here."""

WRITERS = (
    "SELECT machine.name, disk.name, disk.active FROM disk JOIN machine ON machine.id = disk.machine WHERE {}"
    " ORDER BY machine.id, disk.position"
)
ACTIVE_AMONG = "disk.active IN (SELECT value FROM json_each(?))"

REFERENCES = """
SELECT machine.name, snapshot.name, point.disk, point.layer, point.tag FROM point
JOIN snapshot ON snapshot.id = point.snapshot JOIN machine ON machine.id = snapshot.machine WHERE {}
ORDER BY snapshot.id, point.position"""
POINT_AMONG = "point.layer IN (SELECT value FROM json_each(?))"

PENDING = "state IN ('planned', 'running', 'unknown')"
OPEN = f"operation INDEXED BY operation_pending WHERE {PENDING}"
"""Operations that are open, by the index of them."""

_UNSIGNED = (1 << 64) - 1


def unsigned(number: int) -> int:
    """A device or inode number as Linux has it, from SQLite's signed integer of the same 64 bits."""
    return number & _UNSIGNED


def signed(number: int) -> int:
    """The other way round."""
    return number - (1 << 64) if number >> 63 else number


def absolute(pool: str, path: str, *, machines: object) -> str:
    """A layer's path: those in the machines' folder move with it; what is in a cluster has no path but its name."""
    return path if pool == "rbd" else (f"{machines}/" if pool == "machines" else "/") + path
