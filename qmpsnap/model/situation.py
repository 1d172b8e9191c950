"""What plans for commit, stream, delete and revert are made from."""

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.model.chain import Chain
from qmpsnap.model.forest import Forest
from qmpsnap.model.names import LayerId
from qmpsnap.model.operation import Change
from qmpsnap.model.snapshot import Snapshot


class Situation(Struct, frozen=True):
    """What a plan is made from.

    Attributes:
        machine: the machine's name.
        forest: all layers of the store.
        snapshots: the machine's, oldest first.
        live: the live chain of each disk.
        running: a QEMU runs the machine.
        bytes: what each layer's file occupies.
    """

    machine: str
    forest: Forest
    snapshots: tuple[Snapshot, ...]
    live: Mapping[str, Chain]
    running: bool
    bytes: Mapping[LayerId, int]

    def after(self, change: Change) -> "Situation":
        """The situation once a change has settled."""
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
        forest = self.forest.apply(self.machine, change)
        tops = {w.disk: w.layer for w in forest.writers if w.machine == self.machine}
        return replace(
            self,
            forest=forest,
            snapshots=tuple(replace(s, parent=_surviving(s.parent, parents)) for s in kept),
            live={disk: forest.chain(disk, tops[disk]) for disk in self.live},
        )


def _surviving(name: str | None, removed: Mapping[str, str | None]) -> str | None:
    """The nearest ancestor, the snapshot itself included, that is not removed."""
    while name is not None and name in removed:
        name = removed[name]
    return name
