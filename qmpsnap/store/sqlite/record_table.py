"""The machines' records beside their images: written as the store changes, and compared with it."""

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, NotFoundError
from qmpsnap.host import aside
from qmpsnap.host.outstanding import briefly
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.store.records import Record, Records
from qmpsnap.store.sqlite import journal, queries, rows
from qmpsnap.store.sqlite.database import Database
from qmpsnap.store.sqlite.json_values import decoded
from qmpsnap.store.sqlite.layer_table import LayerTable

if TYPE_CHECKING:  # which has one of these
    from qmpsnap.store.store import Store


class RecordTable:
    """The records of one store's machines. What blocks is the storage of a machine's images, and no transaction."""

    def __init__(self, database: Database, files: Records, store: "Store", layers: LayerTable) -> None:
        self._database = database
        self._files = files
        self._store = store
        self._layers = layers

    def of(
        self,
        machine: str,
        operation: OperationId | None = None,
        *,
        earlier: Record | None,
        made: Iterable[Layer] = (),
    ) -> Record:
        """What the store has of a machine."""
        # Of layers that nobody reads, what lies in the machine's folder, and what was this machine's before.
        at, found = self._store.basis(machine, sharers=False), self._store.machine(machine)
        before = {layer.id for layer in (*made, *(earlier.layers if earlier else ()))} - at.forest.layers.keys()
        with self._database.reading() as sql:
            unread = self._layers.unread(sql, before) if before else []
            forest = self._layers.below(sql, (*at.forest.layers, *unread)) if unread else at.forest
            (_, generation), serial = rows.version(sql, machine), journal.next_serial(sql) - 1
        active = {chain.disk: chain.active.id for chain in at.chains}
        points = (point.layer for snapshot in at.snapshots for point in snapshot.points)
        home = self._store.home.record()
        return Record(
            # A store that is made again has no consent to further QEMU arguments.
            machine=replace(found, process=None, consent=None),
            generation=generation,
            operation=operation or 0,
            serial=serial,
            home=replace(home, moving=None) if home else None,
            active=active,
            layers=tuple(forest.below([*active.values(), *points, *forest.layers]).values()),
            snapshots=at.snapshots,
        )

    def noted(self, machine: str) -> frozenset[LayerId]:
        """The layers in the record, among them those that an operation has left to nobody."""
        found = self._files.read(machine)
        return frozenset(layer.id for layer in found.layers) if found else frozenset()

    def is_current(self, machine: str) -> bool:
        """Whether the record is there, and what the store has of the machine."""
        with self._database.reading() as sql:
            uuid, generation = rows.version(sql, machine)
        found = self.readable(machine)
        return found is not None and found.describes(uuid, generation)

    def write(self, machine: str) -> None:
        """Write the record as the store has the machine."""
        self._files.write(self.of(machine, earlier=self.readable(machine)))

    def keep(self, machine: str) -> None:
        """The same, unless it is current; nothing for a machine that is not defined yet."""
        with contextlib.suppress(NotFoundError):
            if self.is_current(machine):
                self._files.tidy(machine)
            else:
                self.write(machine)

    def keep_for(self, operation: OperationId) -> None:
        """The same of the machine of an operation."""
        with self._database.reading() as sql:
            found = sql.execute(queries.OF_OPERATION, (operation,)).fetchone()
        if found:
            machine, uuid, generation = found
            record = self.readable(machine)
            if record is None or not record.describes(uuid, generation):
                self.write(machine)

    def take_back(self, machine: Machine) -> None:
        """Remove the record of this very machine, whose definition did not settle."""
        found = self._files.read(machine.name)
        if found is None or found.machine.uuid == machine.uuid:  # else it is another's
            self._files.forget(machine.name)

    def remembered(self, name: str) -> Machine | None:
        """The machine of that name by its record; the store need not know it."""
        found = self._files.read(name)
        return found.machine if found else None

    def lost(self, *, wait: bool = True) -> tuple[str, ...]:
        """The machines that have a record and that this store does not know, by name; none that is being defined.

        They may read any layer of another machine. Without ``wait``, as for a list, none is reported while the images'
        storage hangs.
        """
        ask = _called if wait or not self._files.elsewhere else _called_aside
        described = ask(self._files.names)
        with self._database.reading() as sql:  # afterwards: a definition writes its record while it is open
            known = {name for (name,) in sql.execute("SELECT name FROM machine")}
            known |= {name for name in described if journal.select(sql, name, only_open=True)}
        # What is read now is there still: undefine removes the record first.
        unknown = tuple(name for name in described if name not in known)
        return ask(lambda: tuple(name for name in unknown if self._files.read(name))) if unknown else ()

    def behind(self, machine: str) -> bool:
        """Whether the record tells that this store is an old copy.

        A record is ahead of its store by the operation that was about to settle when we died, and by no other: that is
        open here, or was undone since.
        """
        found = self._files.read(machine)
        if found is None:
            return False
        with self._database.reading() as sql:
            ahead = found.generation > rows.version(sql, machine)[1] and not journal.is_unsettled(sql, found.operation)
            return ahead or found.serial >= journal.next_serial(sql)

    def readable(self, machine: str) -> Record | None:
        """The record, where one that cannot be read is replaced."""
        with contextlib.suppress(HostCannot):
            return self._files.read(machine)
        return None

    def take_over(self) -> None:
        """Write the records of this host's machines that only an earlier release has written down, if that can be."""
        if self._files.earlier.is_dir():
            briefly(self._take_over, None, seconds=aside.PATIENCE)

    def _take_over(self) -> None:
        with contextlib.suppress(HostCannot, OSError):
            names = self._files.names()
            for found in self._store.machines():
                if found.name in names and found.host == os.uname().nodename:
                    self.keep(found.name)
                    self._files.forget_earlier(found.name)


def _called(call: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    return call()


def _called_aside(call: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    said = aside.asked(lambda tell: os.write(tell, msgspec.json.encode(call())), seconds=aside.PATIENCE)
    return decoded(said, tuple[str, ...]) if said else ()
