"""The store as reading verbs see it: rows of machines and snapshots, without the models that changing verbs need.

Whatever wants explaining, a machine that is not there or records that the store lacks, is for the store itself
(:mod:`qmpsnap.store.sqlite.backend`) to tell.
"""

from __future__ import annotations

import os

from qmpsnap.host import aside
from qmpsnap.host.value import Value, replaced
from qmpsnap.model import places
from qmpsnap.model.timestamps import exceeds
from qmpsnap.store import owner, record_files, runfolder
from qmpsnap.store.sqlite import queries
from qmpsnap.store.sqlite.database import Database
from qmpsnap.store.sqlite.images import ImageTable
from qmpsnap.store.sqlite.queries import absolute

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from typing import Any, Self

    from qmpsnap.model.names import LayerId, OperationId
    from qmpsnap.model.places import Places
    from qmpsnap.store.sqlite.backend import SqliteStore


class ProcessRow(Value):
    """What is recorded of the QEMU that runs a machine."""

    pid: int
    start_ticks: int
    boot_id: str


class MachineRow(Value):
    """A machine: of :class:`qmpsnap.model.machines.record.Machine` what a list shows; ``snapshots`` are counted.

    ``forked``: of a fork what it went on from, as the store has it: JSON.
    """

    name: str
    uuid: str
    host: str
    adopted: bool
    current: str | None
    process: ProcessRow | None
    snapshots: int
    forked: str | None

    @property
    def origin(self) -> dict[str, Any] | None:
        """What a fork went on from, as recorded."""
        return _decoded(self.forked)


class PointRow(Value):
    """Where one disk's content of a snapshot's moment lies."""

    disk: str
    layer: LayerId
    tag: str | None


class SnapshotRow(Value):
    """A snapshot: :class:`qmpsnap.model.layers.snapshot.Snapshot` says what each field means.

    Attributes:
        paths: of its points' layers.
        saved, within: its memory in a file, or inside an image, as the store has it: JSON.
        tagged: its tags, likewise.
    """

    name: str
    kind: str
    state: str
    parent: str | None
    created: float
    description: str
    mode: str
    pause_ms: float | None
    operation: OperationId
    saved: str | None
    within: str | None
    variables: str | None
    level: str
    unquiesced: str
    pushed: bool
    frozen_ms: float | None
    max_pause_ms: float | None
    tagged: str | None
    points: tuple[PointRow, ...]
    paths: dict[LayerId, str]
    machines: str

    @property
    def pause_exceeded(self) -> bool:
        """Whether the guest was held for longer than was agreed to."""
        return exceeds(self.pause_ms, self.max_pause_ms)

    @property
    def tags(self) -> dict[str, str]:
        """Pairs of a key and a value."""
        return _decoded(self.tagged) or {}

    @property
    def vmstate(self) -> dict[str, Any] | None:
        """Its memory in a file."""
        found = _decoded(self.saved)
        return found and {**found, "path": os.path.join(self.machines, found["path"])}  # noqa: PTH118

    @property
    def inside(self) -> dict[str, Any] | None:
        """Its memory inside an image."""
        return _decoded(self.within)


def listing() -> Listing:
    """The store of this user's home, by the environment."""
    found = places.from_environment(os.environ, uid=os.geteuid())
    return Listing(replaced(found, run=runfolder.run_of(found)))


class Listing:
    """One store to be read; a context manager.

    Raises:
        HostCannot: it can neither be written nor read.
        HomeUntrusted: another user can write to it, or to the folder of sockets.
    """

    def __init__(self, at: Places) -> None:
        self.places = at
        owner.require(at.run)
        if os.path.isdir(record_files.earlier(at.machines)):  # noqa: PTH112
            self.store().close()  # takes over what an earlier release has kept
        self._linked = os.path.islink(at.machines)  # noqa: PTH114
        # Whoever waits for storage that hangs cannot end: a link to it is not followed.
        owner.require(at.data, None if self._linked else at.machines)
        self._database = Database(at.store, make=False)
        self.images = ImageTable(self._database, machines=at.machines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def store(self) -> SqliteStore:
        """The same with its models, to be closed by the caller."""
        from pathlib import Path

        from qmpsnap.store.sqlite.backend import SqliteStore

        return SqliteStore(Path(self.places.store), machines=Path(self.places.machines), make=False)

    def machines(self) -> list[MachineRow]:
        """All machines by name, those of other hosts included."""
        with self._database.reading() as sql:
            return [_machine(row) for row in sql.execute(f"{queries.LISTED} ORDER BY machine.name")]

    def machine(self, name: str) -> MachineRow:
        """One machine.

        Raises:
            NotFoundError: there is none of that name.
        """
        while True:
            with self._database.reading() as sql:
                row = sql.execute(f"{queries.LISTED} WHERE machine.name = ?", (name,)).fetchone()
            if row:
                return _machine(row)
            with self.store() as store:
                store.machine(name)  # says why; else it was defined this very moment

    def snapshots(self, machine: str) -> list[SnapshotRow]:
        """A machine's snapshots, oldest first."""
        named = "SELECT id FROM machine WHERE name = ?"
        with self._database.reading() as sql:
            (number,) = sql.execute(named, (machine,)).fetchone() or (-1,)
            found = sql.execute(f"{queries.SNAPSHOT} WHERE s.machine = ? ORDER BY s.id", (number,)).fetchall()
            points = sql.execute(queries.PLACED_POINTS, (number,)).fetchall()
        of: dict[int, list[PointRow]] = {}
        paths: dict[int, dict[LayerId, str]] = {}
        folder = self.places.machines
        for snapshot, disk, layer, tag, pool, path in points:
            of.setdefault(snapshot, []).append(PointRow(disk, layer, tag))
            paths.setdefault(snapshot, {})[layer] = absolute(pool, path, machines=folder)
        listed = []
        for key, *row in found:
            # An absolute path stays as it is.
            row[_VARIABLES] = row[_VARIABLES] and os.path.join(folder, row[_VARIABLES])  # noqa: PTH118
            own: dict[str, Any] = {"points": tuple(of.get(key, ())), "paths": paths.get(key, {}), "machines": folder}
            listed.append(SnapshotRow(**dict(zip(_COLUMNS, row, strict=True)), **own))
        return listed

    @property
    def copied_from(self) -> str | None:
        """The path of another home, of which this one is or was a copy."""
        with self._database.reading() as sql:
            row = sql.execute("SELECT path FROM home").fetchone()
        return row[0] if row and row[0] != self.places.data else None

    @property
    def is_complete(self) -> bool:
        """Whether there is a store, and it has every machine that has a record beside its images."""
        described = self._described()
        with self._database.reading() as sql:  # afterwards: a definition writes its record while it is open
            known = {name for (name,) in sql.execute("SELECT name FROM machine")}
        return self._database.is_there and known.issuperset(described)

    def _described(self) -> tuple[str, ...]:
        if not self._linked:
            return record_files.names(self.places.machines)

        def tell(answer: int) -> None:
            os.write(answer, "\0".join(record_files.names(self.places.machines)).encode(errors="surrogateescape"))

        said = aside.asked(tell, seconds=aside.PATIENCE).decode(errors="surrogateescape")
        return tuple(said.split("\0")) if said else ()


_COLUMNS = SnapshotRow._fields[:-3]
_VARIABLES = _COLUMNS.index("variables")


def _machine(row: tuple[Any, ...]) -> MachineRow:
    name, uuid, host, adopted, current, pid, ticks, boot, count, forked = row
    process = ProcessRow(pid, ticks, boot) if pid else None
    return MachineRow(name, uuid, host, bool(adopted), current, process, count, forked)


def _decoded(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    import json

    found: dict[str, Any] = json.loads(text)
    return found
