"""What a plan is made from: one frozen value, read before the store is locked and compared again when it is."""

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import NotFoundError
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.planning.layer_graph import Forest


class Basis(Struct, frozen=True, kw_only=True):
    """What the store says of a machine at one moment: chains in the order of the spec's disks, snapshots oldest first.

    ``record`` is None where none of that name is recorded.
    """

    name: str
    record: Machine | None = None
    chains: tuple[Chain, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    forest: Forest = Forest({}, (), ())

    def after(self, change: Change) -> "Basis":
        """The same once a change has settled."""
        changed = {snapshot.name: snapshot for snapshot in change.snapshots}
        known = {snapshot.name for snapshot in self.snapshots}
        snapshots = [changed.get(s.name, s) for s in self.snapshots]
        snapshots += [s for s in change.snapshots if s.name not in known]
        names = change.renamed
        snapshots = [
            replace(s, name=names.get(s.name, s.name), parent=names.get(s.parent, s.parent) if s.parent else None)
            for s in snapshots
        ]
        parents = {s.name: s.parent for s in snapshots if s.name in change.removed_snapshots}
        kept = (s for s in snapshots if s.name not in parents)
        forest = self.forest.apply(self.name, change)
        tops = {w.disk: w.layer for w in forest.writers if w.machine == self.name}
        disks = [disk.name for disk in change.spec.disks] if change.spec else [chain.disk for chain in self.chains]
        return replace(
            self,
            forest=forest,
            snapshots=tuple(replace(s, parent=_surviving(s.parent, parents)) for s in kept),
            chains=tuple(forest.chain(disk, tops[disk]) for disk in disks if disk in tops),
        )


class PlanInputs(Struct, frozen=True, kw_only=True):
    """What a plan is made from besides the request.

    ``basis``: what the store said; the operation is opened only if it still says so. ``serial``: number of the
    operation and of its new layers. ``home``: where new images go. ``mode``: ``live``, ``suspended``, ``paused`` or
    ``stopped``.
    """

    basis: Basis
    serial: OperationId
    home: Home
    mode: str = "stopped"
    now: float = 0.0

    @property
    def machine(self) -> Machine:
        """The machine as recorded."""
        if self.basis.record is None:
            raise NotFoundError(f"there is no machine {self.basis.name!r}", machine=self.basis.name)
        return self.basis.record


def _surviving(name: str | None, removed: Mapping[str, str | None]) -> str | None:
    """The nearest ancestor, the snapshot itself included, that is not removed; None where they go round in a circle."""
    for _ in range(len(removed) + 1):
        if name is None or name not in removed:
            return name
        name = removed[name]
    return None
