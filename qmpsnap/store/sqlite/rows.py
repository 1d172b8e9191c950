"""Rows of machines and snapshots: how each is read, added, replaced and removed. SQLite's part of the store only."""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from qmpsnap.errors import NameTaken, NotFoundError
from qmpsnap.hint import call
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.adoption import Adoption
from qmpsnap.model.machines.record import Consent, Machine, Origin, Past, Process, Vmgenid
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.text import nearest
from qmpsnap.store.sqlite import queries
from qmpsnap.store.sqlite.json_values import decoded


def read_machine(row: sqlite3.Row) -> Machine:
    """A row of the machine query as a value."""
    name, uuid, host, spec, created, current, adopted, consent, origin, past, vmgenid, *process = row
    return Machine(
        name=name,
        uuid=uuid,
        host=host,
        spec=decoded(spec, MachineSpec),
        created=created,
        current=current,
        process=_process(*process),
        adopted=decoded(adopted, Adoption) if adopted else None,
        consent=decoded(consent, Consent) if consent else None,
        origin=decoded(origin, Origin) if origin else None,
        past=decoded(past, tuple[Past, ...]) if past else (),
        vmgenid=decoded(vmgenid, Vmgenid) if vmgenid else None,
    )


def _process(pid: int | None, *rest: Any) -> Process | None:
    if pid is None:
        return None
    *fields, nodes = rest
    named = dict(zip(Process.__struct_fields__[1:-1], fields, strict=True))
    return Process(pid=pid, **named, nodes=decoded(nodes, dict[str, str]))


def find_machine(sql: sqlite3.Connection, name: str) -> Machine:
    """A machine, or ``NotFoundError``."""
    row = sql.execute(f"{queries.MACHINE} WHERE machine.name = ?", (name,)).fetchone()
    if row is None:
        raise _unknown(sql, name)
    return read_machine(row)


def read_points(sql: sqlite3.Connection, machine: int) -> dict[int, list[Point]]:
    """The points of a machine's snapshots, by the snapshots' row numbers."""
    points: dict[int, list[Point]] = {}
    for snapshot, disk, layer, tag in sql.execute(queries.POINTS, (machine,)):
        points.setdefault(snapshot, []).append(Point(disk=disk, layer=LayerId(layer), tag=tag))
    return points


def machine_id(sql: sqlite3.Connection, name: str) -> int:
    """The row number of a machine, or ``NotFoundError``."""
    row = sql.execute("SELECT id FROM machine WHERE name = ?", (name,)).fetchone()
    if row:
        return int(row[0])
    raise _unknown(sql, name)


def _unknown(sql: sqlite3.Connection, name: str) -> NotFoundError:
    names = [known for (known,) in sql.execute("SELECT name FROM machine ORDER BY name")]
    known = ", ".join(json.dumps(known)[1:-1] for known in names)
    return NotFoundError(
        f"there is no machine {name!r}{nearest(name, names)}",
        hint=f"known machines: {known}" if known else call("define", "", "SPEC.yaml") + " creates one",
        machine=name,
    )


def version(sql: sqlite3.Connection, name: str) -> tuple[str, int]:
    """A machine's UUID, and how often it was changed since it was defined, or ``NotFoundError``."""
    row: tuple[str, int] | None = sql.execute("SELECT uuid, generation FROM machine WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise _unknown(sql, name)
    return row


def insert_machine(sql: sqlite3.Connection, machine: Machine) -> None:
    """Add a machine, or ``NameTaken``."""
    try:
        sql.execute(
            "INSERT INTO machine (name, uuid, host, spec, created, adopted, consent, origin, past, vmgenid)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                machine.name, machine.uuid, machine.host,
                msgspec.json.encode(machine.spec).decode(), machine.created,
                msgspec.json.encode(machine.adopted).decode() if machine.adopted else None,
                msgspec.json.encode(machine.consent).decode() if machine.consent else None,
                msgspec.json.encode(machine.origin).decode() if machine.origin else None,
                msgspec.json.encode(machine.past).decode() if machine.past else None,
                msgspec.json.encode(machine.vmgenid).decode() if machine.vmgenid else None,
            ),
        )  # fmt: skip
    except sqlite3.IntegrityError as error:
        raise NameTaken(f"machine {machine.name} exists already", machine=machine.name) from error
    if machine.process:  # an adopted one comes with its QEMU
        put_process(sql, machine_id(sql, machine.name), machine.process)


def put_consent(sql: sqlite3.Connection, machine: int, consent: Consent | None) -> None:
    """Record what somebody has agreed to; None leaves what there is."""
    if consent:
        text = msgspec.json.encode(consent).decode()
        sql.execute("UPDATE machine SET consent = ?, version = version + 1 WHERE id = ?", (text, machine))


def put_origin(sql: sqlite3.Connection, machine: int, origin: Origin | None) -> None:
    """Record what is known of a fork's identity; None leaves what there is."""
    if origin:
        text = msgspec.json.encode(origin).decode()
        sql.execute("UPDATE machine SET origin = ?, version = version + 1 WHERE id = ?", (text, machine))


def put_vmgenid(sql: sqlite3.Connection, machine: int, vmgenid: Vmgenid | None) -> None:
    """Record the guest's generation ID; None leaves what there is."""
    if vmgenid:
        text = msgspec.json.encode(vmgenid).decode()
        sql.execute("UPDATE machine SET vmgenid = ?, version = version + 1 WHERE id = ?", (text, machine))


def put_adopted(sql: sqlite3.Connection, machine: int, adopted: Adoption | UnsetType | None) -> None:
    """Record how somebody else's QEMU is spoken to, None for one of our own; unset leaves what there is."""
    if adopted is UNSET:
        return
    text = msgspec.json.encode(adopted).decode() if adopted else None
    sql.execute("UPDATE machine SET adopted = ?, version = version + 1 WHERE id = ?", (text, machine))


def put_spec(sql: sqlite3.Connection, machine: int, spec: MachineSpec | None, *, until: OperationId) -> None:
    """Record another spec; the one before is kept where a snapshot was taken with it. None leaves what there is."""
    if spec is None:
        return
    before = read_machine(sql.execute(f"{queries.MACHINE} WHERE machine.id = ?", (machine,)).fetchone())
    taken = [number for (number,) in sql.execute("SELECT operation FROM snapshot WHERE machine = ?", (machine,))]
    past: list[Past] = []
    for each in (*before.past, Past(until=until, spec=before.spec)):
        since = past[-1].until if past else 0
        if any(since <= number < each.until for number in taken):
            past.append(each)
    sql.execute(
        "UPDATE machine SET spec = ?, past = ?, version = version + 1 WHERE id = ?",
        (msgspec.json.encode(spec).decode(), msgspec.json.encode(past).decode() if past else None, machine),
    )
    if [disk.name for disk in spec.disks] == [disk.name for disk in before.spec.disks]:
        return
    sql.executemany(
        "UPDATE disk SET position = ?, version = version + 1 WHERE machine = ? AND name = ? AND position <> ?",
        [(position, machine, disk.name, position) for position, disk in enumerate(spec.disks)],
    )


def put_active(sql: sqlite3.Connection, machine: int, active: Mapping[str, LayerId]) -> None:
    """Add disks, or let them have other active layers."""
    for position, (disk, layer) in enumerate(active.items()):
        sql.execute(
            "INSERT INTO disk (machine, name, position, active) VALUES (?, ?, ?, ?) ON CONFLICT (machine, name)"
            " DO UPDATE SET active = excluded.active, version = version + 1",
            (machine, disk, position, layer),
        )


def remove_disks(sql: sqlite3.Connection, machine: int, disks: Iterable[str]) -> None:
    """Forget disks that the machine has no more; their layers stay."""
    sql.executemany("DELETE FROM disk WHERE machine = ? AND name = ?", [(machine, disk) for disk in disks])


def put_process(sql: sqlite3.Connection, machine: int, process: Process | None) -> None:
    """Record the QEMU that runs a machine, or that none does."""
    if process is None:
        sql.execute("DELETE FROM process WHERE machine = ?", (machine,))
        return
    *fields, nodes = msgspec.structs.astuple(process)
    sql.execute(queries.PUT_PROCESS, (machine, *fields, msgspec.json.encode(nodes).decode()))


def snapshot_id(sql: sqlite3.Connection, machine: int, name: str | None) -> int | None:
    """The row number of a snapshot, or ``NotFoundError``; None for no name."""
    if name is None:
        return None
    row = sql.execute("SELECT id FROM snapshot WHERE machine = ? AND name = ?", (machine, name)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no snapshot {name!r}")
    return int(row[0])


def rename_snapshot(sql: sqlite3.Connection, machine: int, old: str, new: str) -> None:
    """Give a snapshot another name, or ``NameTaken``."""
    number = snapshot_id(sql, machine, old)
    try:
        sql.execute("UPDATE snapshot SET name = ?, version = version + 1 WHERE id = ?", (new, number))
    except sqlite3.IntegrityError as error:
        raise NameTaken(f"there is a snapshot {new} already") from error


def remove_snapshot(sql: sqlite3.Connection, machine: int, name: str) -> None:
    """Remove a snapshot; what grew from it grows from its parent then."""
    number = snapshot_id(sql, machine, name)
    parent = sql.execute("SELECT parent FROM snapshot WHERE id = ?", (number,)).fetchone()[0]
    sql.execute("UPDATE snapshot SET parent = ?, version = version + 1 WHERE parent = ?", (parent, number))
    sql.execute("UPDATE machine SET current = ?, version = version + 1 WHERE current = ?", (parent, number))
    sql.execute("DELETE FROM snapshot WHERE id = ?", (number,))


def put_snapshot(sql: sqlite3.Connection, machine: int, snapshot: Snapshot) -> None:
    """Add a snapshot, or replace the one of that name, with its points."""
    parent = snapshot_id(sql, machine, snapshot.parent)
    sql.execute(queries.PUT_SNAPSHOT, (
        machine, snapshot.name, snapshot.kind, snapshot.state, parent, snapshot.created, snapshot.description,
        snapshot.mode, snapshot.pause_ms, snapshot.operation,
        msgspec.json.encode(snapshot.vmstate).decode() if snapshot.vmstate else None,
        msgspec.json.encode(snapshot.inside).decode() if snapshot.inside else None,
        snapshot.variables, snapshot.level, snapshot.unquiesced, snapshot.pushed, snapshot.frozen_ms,
        snapshot.max_pause_ms, msgspec.json.encode(snapshot.tags).decode() if snapshot.tags else None,
    ))  # fmt: skip
    number = snapshot_id(sql, machine, snapshot.name)
    sql.execute("DELETE FROM point WHERE snapshot = ?", (number,))
    sql.executemany(
        "INSERT INTO point (snapshot, disk, position, layer, tag) VALUES (?, ?, ?, ?, ?)",
        [(number, point.disk, position, point.layer, point.tag) for position, point in enumerate(snapshot.points)],
    )
