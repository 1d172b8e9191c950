"""The store in one SQLite file. The meaning of each method stands in :class:`qmpsnap.store.store.Store`."""

import contextlib
import functools
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

import msgspec
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, NotFoundError
from qmpsnap.hint import call
from qmpsnap.host import aside
from qmpsnap.host.outstanding import briefly
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.layers.stamp import Stamp
from qmpsnap.model.layers.vmstate import Inside, Vmstate
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Change, Ended, Operation, OperationState, P, Plan
from qmpsnap.model.planning import sharing
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.model.planning.sharing import Name
from qmpsnap.model.text import is_text
from qmpsnap.store import owner
from qmpsnap.store.records import Record, Records
from qmpsnap.store.sqlite import devices, frozen_files, journal, queries, rows
from qmpsnap.store.sqlite.database import Database
from qmpsnap.store.sqlite.frozen_files import FrozenTable
from qmpsnap.store.sqlite.homes import HomeTable
from qmpsnap.store.sqlite.images import ImageTable
from qmpsnap.store.sqlite.json_values import decoded
from qmpsnap.store.sqlite.layer_table import LayerTable, chain_in
from qmpsnap.store.sqlite.pruning import PrunedTable
from qmpsnap.store.sqlite.queries import absolute, unsigned
from qmpsnap.store.sqlite.record_table import RecordTable
from qmpsnap.store.store import Removal

if TYPE_CHECKING:
    from qmpsnap.store.sqlite.database import Moment


class SqliteStore:
    """The store in one SQLite file. Safe to share between threads; close it or use it as a context manager."""

    def __init__(self, path: Path, *, machines: Path, make: bool = True) -> None:
        """Open or make the file; without ``make`` one that is not there is empty, and nothing is written.

        Paths of layers in the pool ``machines`` are relative to that folder. A file that can only be read refuses
        changes.
        """
        # A process that waits for storage that hangs cannot end: a command that only reads follows no link to it.
        owner.require(path.parent, None if machines.is_symlink() and not make else machines)
        self._database = Database(path, make=make)
        self._machines = machines
        self._layers = LayerTable(machines)
        self._last: tuple[Moment, bool, Basis] | None = None
        """The basis that was read last, when that was, and whether it is one with sharers."""
        self._records = Records(machines)
        self.images = ImageTable(self._database, machines=machines)
        self.frozen = FrozenTable(self._database, self._layers)
        self.pruned = PrunedTable(self._database)
        self.home = HomeTable(self._database, self._records, machines=machines)
        self.records = RecordTable(self._database, self._records, self, self._layers)
        if make or not self._records.elsewhere:
            self.records.take_over()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def machines(self) -> tuple[Machine, ...]:
        with self._database.reading() as sql:
            return tuple(rows.read_machine(row) for row in sql.execute(f"{queries.MACHINE} ORDER BY machine.name"))

    def machine(self, name: str) -> Machine:
        try:
            with self._database.reading() as sql:
                return rows.find_machine(sql, name)
        except NotFoundError as error:
            with contextlib.suppress(HostCannot):
                if name in self.unborn():
                    error.hint = "its definition or removal was interrupted: " + call("recover", name)
                elif name in self.records.lost(wait=False):
                    error.hint = "it was defined, but this store lacks it: " + call("rebuild")
            raise

    def ephemeral(self) -> tuple[str, ...]:
        with self._database.reading() as sql:
            return tuple(name for (name,) in sql.execute(queries.EPHEMERAL))

    def chains(self, machine: str) -> tuple[Chain, ...]:
        with self._database.reading() as sql:
            return self._chains(sql, rows.machine_id(sql, machine))

    def snapshots(self, machine: str) -> tuple[Snapshot, ...]:
        with self._database.reading() as sql:
            return self._snapshots(sql, rows.machine_id(sql, machine))

    def at_once(self) -> AbstractContextManager[None]:
        return self._database.at_once()

    def basis(self, machine: str, *, sharers: bool = True) -> Basis:
        with self._database.reading() as sql:
            return self._basis(sql, machine, sharers=sharers)

    def _basis(self, sql: sqlite3.Connection, name: str, *, sharers: bool | None) -> Basis:
        """The basis as it was read last, unless something has changed since; None for ``sharers`` takes either."""
        moment = self._database.moment()
        if self._last:
            then, of, found = self._last
            if (then, found.name) == (moment, name) and sharers in (of, None):
                return found
        own = self._layers.of_machine(sql, name)
        around = self._layers.around(sql, (*own, *self._layers.nobodys(sql))) if sharers else None
        found = Basis(name=name, forest=around or self._layers.below(sql, own))
        with contextlib.suppress(NotFoundError):  # it is not defined yet
            number, record = rows.machine_id(sql, name), rows.find_machine(sql, name)
            chains = tuple(Chain(disk, chain_in(found.forest.layers, top)) for disk, top in self._disks(sql, number))
            found = replace(found, record=record, chains=chains, snapshots=self._snapshots(sql, number))
        self._last = (moment, bool(sharers), found)
        return found

    def _disks(self, sql: sqlite3.Connection, machine: int) -> list[tuple[str, LayerId]]:
        found = "SELECT name, active FROM disk WHERE machine = ? ORDER BY position"
        return sql.execute(found, (machine,)).fetchall()

    def _chains(self, sql: sqlite3.Connection, machine: int) -> tuple[Chain, ...]:
        return tuple(Chain(name, self._layers.chain(sql, active)) for name, active in self._disks(sql, machine))

    def _snapshots(self, sql: sqlite3.Connection, machine: int) -> tuple[Snapshot, ...]:
        found = sql.execute(f"{queries.SNAPSHOT} WHERE s.machine = ? ORDER BY s.id", (machine,)).fetchall()
        points = rows.read_points(sql, machine)
        return tuple(self._snapshot(row, points.get(row[0], ())) for row in found)

    def layer(self, layer: LayerId) -> Layer:
        if found := self.layers((layer,)):
            return found[layer]
        raise NotFoundError(f"there is no layer {layer}", hint=call("chains", "VM") + " lists the layers")

    def layers(self, wanted: Iterable[LayerId]) -> dict[LayerId, Layer]:
        with self._database.reading() as sql:
            return self._layers.known(sql, wanted)

    def layer_at(self, path: str) -> Layer | None:
        if not is_text(path):
            return None
        with self._database.reading() as sql:
            return self._layers.at(sql, path)

    def layers_of_file(self, device: int, inode: int) -> tuple[Layer, ...]:
        with self._database.reading() as sql:
            return tuple(self._layers.of_file(sql, device, inode))

    def forest(self) -> Forest:
        with self._database.reading() as sql:
            return self._layers.whole(sql)

    def forest_around(self, machine: str, *layers: LayerId) -> Forest:
        with self._database.reading() as sql:
            return self._layers.around(sql, (*self._layers.of_machine(sql, machine), *layers))

    def forest_below(self, machine: str) -> Forest:
        with self._database.reading() as sql:
            return self._layers.below(sql, self._layers.of_machine(sql, machine))

    def set_process(self, machine: str, process: Process | None) -> None:
        with self._database.writing() as sql:
            rows.put_process(sql, rows.machine_id(sql, machine), process)

    def next_serial(self) -> int:
        with self._database.reading() as sql:
            return journal.next_serial(sql)

    def open_operation(self, plan: P, basis: Basis, *, serial: OperationId, serials: int = 1) -> Operation[P]:
        self.home.look()
        with self._database.writing() as sql:
            journal.require_next(sql, plan.machine, serial)
            names, forest, elsewhere = self._concerned(sql, plan, basis)
            now = replace(self._basis(sql, plan.machine, sharers=None), forest=forest)
            sharing.require_unshared(plan.machine, plan, forest, elsewhere)
            sharing.require_unchanged(plan, basis, now)
            operation = journal.insert(sql, plan, names, serial=serial, serials=serials)
            if isinstance(opening := getattr(plan, "opening", None), Change):
                self._apply(sql, plan.machine, opening)
            return operation

    def _concerned(
        self, sql: sqlite3.Connection, plan: Plan, basis: Basis
    ) -> tuple[frozenset[Name], Forest, tuple[Operation, ...]]:
        """The files that a plan has to do with, the layers around them, and the operations elsewhere that meet it."""
        names = sharing.names(plan, basis.forest)
        while True:
            elsewhere = journal.elsewhere(sql, plan.machine, names)
            needed = (layer for other in elsewhere for layer in sharing.needed(other.plan))
            forest = self._layers.around(sql, self._layers.named(sql, names.union(needed)))
            if (more := sharing.names(plan, forest)) <= names:
                return names, forest, elsewhere
            names |= more

    def mark(
        self,
        operation: OperationId,
        state: OperationState,
        *,
        step: str | None = None,
        error: str | None = None,
        writes: Iterable[LayerId] = (),
    ) -> None:
        self.records.keep_for(operation)  # before what comes next: a job that overwrites a snapshot's layers, for one
        with self._database.writing() as sql:
            journal.mark(sql, operation, state, step=step, error=error, writes=writes)

    def settle(
        self,
        operation: OperationId,
        machine: str,
        change: Change,
        *,
        step: str | None = None,
        state: Ended = "settled",
        error: str | None = None,
        frozen: Mapping[LayerId, Stamp] = MappingProxyType({}),
    ) -> None:
        self.home.look()
        earlier = self.records.readable(machine)
        with self._database.foreseeing() as sql:
            self._apply(sql, machine, change)
            if can_be := self._layers.is_whole(sql, change):  # else COMMIT will say so
                record = self.records.of(machine, operation, earlier=earlier, made=change.layers)
        if can_be:
            self._records.write(record, make=change.define is not None)
        with self._database.writing() as sql:
            self._apply(sql, machine, change)
            journal.mark(sql, operation, "running" if step else state, step=step or steps.SETTLED, error=error)
            frozen_files.add(sql, machine, frozen)

    def apply(self, machine: str, change: Change) -> None:
        self.home.look()
        with self._database.writing() as sql:
            self._apply(sql, machine, change)
            frozen_files.drop(sql, change.removed_layers)
            if change.layers:  # that no operation keeps others away from
                journal.unclaim(sql)
        with contextlib.suppress(HostCannot):  # it is made; `check` and the next operation find the record behind
            self.records.keep(machine)

    def forget(self, machine: str, *, removal: Removal | None = None) -> tuple[Layer, ...]:
        self.machine(machine)
        record = self._records.read(machine)
        # Before the rows: a crash between leaves a machine without a record, and none that seems lost.
        self._records.forget(machine)
        with self._database.writing() as sql:
            number = rows.machine_id(sql, machine)
            noted = [layer.id for layer in record.layers] if record else []
            layers = self._layers.below(sql, (*self._layers.of_machine(sql, machine), *noted)).layers
            elsewhere = journal.elsewhere(sql, machine, sharing.names_of(layers.values()))
            needed = (layer for other in elsewhere for layer in sharing.needed(other.plan))
            forest = self._layers.around(sql, (*layers, *needed))
            named = sql.execute(queries.NAMED, (number, number)).fetchall()
            sql.execute("UPDATE machine SET current = NULL WHERE id = ?", (number,))
            for operation in journal.select(sql, machine, only_open=True):
                journal.mark(sql, operation.id, "failed", error="given up: its machine was undefined")
            sql.execute("DELETE FROM machine WHERE id = ?", (number,))
            gone = self._layers.remove_unreferenced(sql, layers)
            sql.executemany(queries.HIDE, named)
            sharing.require_unused(machine, gone, forest, elsewhere)
            if removal:
                plan, serial = removal(gone), OperationId(journal.next_serial(sql))
                journal.insert(sql, plan, sharing.names(plan, forest), serial=serial, serials=1)
            frozen_files.drop(sql, (layer.id for layer in gone))
        return tuple(gone)

    def operations(self, machine: str, *, only_open: bool = False) -> tuple[Operation, ...]:
        with self._database.reading() as sql:
            return journal.select(sql, machine, only_open=only_open)

    def unborn(self) -> tuple[str, ...]:
        with self._database.reading() as sql:
            return journal.unborn(sql)

    def restore(self, record: Record, process: Process | None) -> None:
        """Add a machine as its record has it, with the QEMU that runs it; its journal is empty then."""
        name = record.machine.name
        change = Change(
            define=replace(record.machine, process=process),
            layers=record.layers,
            active=record.active,
            snapshots=record.snapshots,
            current=record.machine.current,
        )
        self.home.look()
        with self._database.writing() as sql:
            self._apply(sql, name, change)
            sql.execute("UPDATE machine SET generation = ? WHERE name = ?", (record.generation, name))
            journal.skip_to(sql, OperationId(record.serial + 1))

    def follow_devices(self) -> None:
        while True:
            with self._database.reading() as sql:
                away = sql.execute(queries.ELSEWHERE, (os.uname().nodename,)).fetchone()
                files = () if away else (*self._files(sql),)
            # Also what needs no image comes by here; and no file is waited for while the store is locked.
            if not (moved := briefly(functools.partial(devices.moved, files), None, seconds=aside.PATIENCE)):
                return
            with self._database.writing() as sql:
                if files == (*self._files(sql),):  # else another process may have done so by now
                    devices.follow(sql, moved)
                    journal.unclaim(sql)
                    return

    def _files(self, sql: sqlite3.Connection) -> Iterator[devices.File]:
        for pool, path, device, inode in sql.execute("SELECT pool, path, device, inode FROM layer").fetchall():
            yield absolute(pool, path, machines=self._machines), unsigned(device), unsigned(inode)
        for (text,) in sql.execute("SELECT vmstate FROM snapshot WHERE vmstate IS NOT NULL").fetchall():
            if state := self._vmstate(text):
                yield state.path, state.device, state.inode

    @property
    def is_there(self) -> bool:
        """Whether it has a file."""
        return self._database.is_there

    def is_sound(self) -> bool:
        """Whether SQLite finds nothing wrong; it looks through the whole file."""
        return self._database.is_sound()

    @property
    def barred(self) -> HostCannot | None:
        """Why it cannot be written now; None when it can."""
        return self._database.barred

    def require_writable(self) -> None:
        self._database.require_writable()

    def _apply(self, sql: sqlite3.Connection, machine: str, change: Change) -> None:
        self.home.born(sql)
        if change.define:
            rows.insert_machine(sql, change.define)
        number = rows.machine_id(sql, machine)
        sql.execute("UPDATE machine SET generation = generation + 1 WHERE id = ?", (number,))
        for layer in change.layers:
            self._layers.put(sql, layer)
        rows.put_active(sql, number, change.active)
        rows.put_consent(sql, number, change.consent)
        rows.put_origin(sql, number, change.origin)
        rows.put_vmgenid(sql, number, change.vmgenid)
        rows.put_adopted(sql, number, change.adopted)
        for snapshot in change.snapshots:
            rows.put_snapshot(sql, number, self._portable(snapshot))
        for old, new in change.renamed.items():
            rows.rename_snapshot(sql, number, old, new)
        if change.current is not msgspec.UNSET:
            current = rows.snapshot_id(sql, number, change.current)
            sql.execute("UPDATE machine SET current = ?, version = version + 1 WHERE id = ?", (current, number))
        for name in change.removed_snapshots:
            rows.remove_snapshot(sql, number, name)
        rows.put_spec(sql, number, change.spec, until=OperationId(journal.next_serial(sql)))  # kept for these snapshots
        rows.remove_disks(sql, number, change.removed_disks)
        self._layers.remove(sql, change.removed_layers)

    def _portable(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the paths of its files relative where they lie in the machines' folder."""
        inside = f"{self._machines}/"
        state, variables = snapshot.vmstate, snapshot.variables
        return replace(
            snapshot,
            vmstate=replace(state, path=state.path.removeprefix(inside)) if state else None,
            variables=variables.removeprefix(inside) if variables else None,
        )

    def _vmstate(self, text: str | None) -> Vmstate | None:
        if text is None:
            return None
        state = decoded(text, Vmstate)
        return replace(state, path=str(self._machines / state.path))  # an absolute path stays as it is

    def _snapshot(self, row: sqlite3.Row, points: Iterable[Point]) -> Snapshot:
        return Snapshot(
            name=row[1], kind=row[2], state=row[3], parent=row[4], created=row[5], description=row[6], mode=row[7],
            pause_ms=row[8], operation=OperationId(row[9]), points=tuple(points), vmstate=self._vmstate(row[10]),
            inside=decoded(row[11], Inside) if row[11] else None,
            variables=str(self._machines / row[12]) if row[12] else None, level=row[13], unquiesced=row[14],
            pushed=bool(row[15]), frozen_ms=row[16], max_pause_ms=row[17],
            tags=decoded(row[18], dict[str, str]) if row[18] else {},
        )  # fmt: skip
