"""All layers of a store as the forest they form, and who needs which: counted over all machines."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import LayersCircular, NotFoundError
from qmpsnap.hint import call
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Writer(Struct, frozen=True):
    """A disk of a machine, and the layer its guest writes to."""

    machine: str
    disk: str
    layer: LayerId


class Reference(Struct, frozen=True):
    """A snapshot's point."""

    machine: str
    snapshot: str
    disk: str
    layer: LayerId
    tag: str | None = None


class Forest(Struct, frozen=True, dict=True):
    """Every layer, every disk, every point of a store.

    What is asked of each layer in turn is looked up in indexes, which are made when they are first needed.
    """

    layers: Mapping[LayerId, Layer]
    writers: tuple[Writer, ...]
    references: tuple[Reference, ...]

    def layer(self, layer: LayerId) -> Layer:
        """One layer."""
        if found := self.layers.get(layer):
            return found
        raise NotFoundError(f"there is no layer {layer}", hint=call("chains", "VM") + " lists the layers")

    def chain(self, disk: str, top: LayerId) -> Chain:
        """The layers from ``top`` down to its base, as a chain."""
        layers: list[Layer] = []
        at: LayerId | None = top
        while at is not None:
            layers.append(self.layer(at))
            at = layers[-1].backing
            if len(layers) > len(self.layers):
                break
        return Chain(disk, based(reversed(layers)))

    def below(self, tops: Iterable[LayerId]) -> dict[LayerId, Layer]:
        """The layers that these read, and they themselves, each after the one below it; each is looked at once."""
        found: dict[LayerId, Layer] = {}
        for top in tops:
            new: dict[LayerId, Layer] = {}
            at: LayerId | None = top
            while at is not None and at not in found and at not in new:  # in new: recorded to read itself
                new[at] = self.layer(at)
                at = new[at].backing
            found.update(reversed(new.items()))
        return found

    def in_use(self) -> AbstractSet[LayerId]:
        """The layers that a disk or a snapshot of any machine reads."""
        return self.below([*(w.layer for w in self.writers), *(r.layer for r in self.references)]).keys()

    def children(self, layer: LayerId) -> tuple[Layer, ...]:
        """The layers that read ``layer`` directly."""
        return tuple(self._children.get(layer, ()))

    def writers_of(self, layer: LayerId) -> tuple[Writer, ...]:
        """The disks whose active layer it is: one at most, when all is well."""
        return tuple(self._writers.get(layer, ()))

    def references_to(self, layer: LayerId) -> tuple[Reference, ...]:
        """The points that lie in it."""
        return tuple(self._references.get(layer, ()))

    def readers(
        self, layer: LayerId, *, but_layer: LayerId | None = None, but_snapshots_of: str | None = None
    ) -> tuple[str, ...]:
        """Who would notice if the layer changed, one short phrase each: snapshots, active disks and layers above."""
        return (
            *(
                f"snapshot {r.snapshot} of machine {r.machine}"
                for r in self.references_to(layer)
                if r.machine != but_snapshots_of
            ),
            *(f"disk {w.disk} of machine {w.machine}" for w in self.writers_of(layer)),
            *(f"layer {c.id}{self._users(c.id)}" for c in self.children(layer) if c.id != but_layer),
        )

    def sharers(self, writer: Writer, *, consumed: Collection[str]) -> tuple[str, ...]:
        """Who else reads the layer that a disk's guest writes to, one short phrase each; nobody, when all is well.

        Snapshots of that machine which are ``consumed`` do not count: a commit of the active layer leaves the points it
        has overwritten where they were, and nobody reads there any more.
        """
        gone = {(writer.machine, name) for name in consumed}
        points = [r for r in self.references_to(writer.layer) if not r.tag and (r.machine, r.snapshot) not in gone]
        return (
            *(f"layer {above.id}{self._users(above.id)}" for above in self.children(writer.layer)),
            *(f"snapshot {r.snapshot} of {r.machine}" for r in points),
            *(f"disk {w.disk} of {w.machine}" for w in self.writers_of(writer.layer) if w != writer),
        )

    def machines_above(self, layer: LayerId) -> frozenset[str]:
        """The machines whose disks or snapshots read the layer, directly or through layers above."""
        return frozenset(self._machines.get(layer, ()))

    def apply(self, machine: str, change: Change) -> "Forest":
        """The forest after a machine's change has settled."""
        layers = {**self.layers, **{layer.id: layer for layer in change.layers}}
        for gone in change.removed_layers:
            del layers[gone]
        disks = {*change.active, *change.removed_disks}
        writers = [w for w in self.writers if not (w.machine == machine and w.disk in disks)]
        writers += [Writer(machine, disk, layer) for disk, layer in change.active.items()]
        replaced = {snapshot.name for snapshot in change.snapshots}
        kept = [r for r in self.references if not (r.machine == machine and r.snapshot in replaced)]
        kept += [
            Reference(machine, snapshot.name, point.disk, point.layer, point.tag)
            for snapshot in change.snapshots
            for point in snapshot.points
        ]
        # As the store does it: new and changed ones first, then new names, then what goes.
        references = [
            replace(r, snapshot=change.renamed.get(r.snapshot, r.snapshot)) if r.machine == machine else r for r in kept
        ]
        removed = {(machine, name) for name in change.removed_snapshots}
        return Forest(layers, tuple(writers), tuple(r for r in references if (r.machine, r.snapshot) not in removed))

    @cached_property
    def _children(self) -> Mapping[LayerId | None, Sequence[Layer]]:
        return _grouped(self.layers.values(), lambda layer: layer.backing)

    @cached_property
    def _writers(self) -> Mapping[LayerId, Sequence[Writer]]:
        return _grouped(self.writers, lambda writer: writer.layer)

    @cached_property
    def _references(self) -> Mapping[LayerId, Sequence[Reference]]:
        return _grouped(self.references, lambda reference: reference.layer)

    @cached_property
    def _machines(self) -> Mapping[LayerId, set[str]]:
        found: dict[LayerId, set[str]] = {}
        readers = [(w.machine, w.layer) for w in self.writers] + [(r.machine, r.layer) for r in self.references]
        for machine, top in readers:
            at: LayerId | None = top
            while at is not None and machine not in (known := found.setdefault(at, set())):
                known.add(machine)  # once, also where a layer is recorded to read itself: `check` says so
                at = self.layers[at].backing if at in self.layers else None
        return found

    def _users(self, layer: LayerId) -> str:
        machines = sorted(self.machines_above(layer))
        return f" (of {', '.join(machines)})" if machines else ""


def _grouped(values: Iterable[V], by: Callable[[V], K]) -> dict[K, list[V]]:
    """The values by what each of them is asked for, in their order."""
    found: dict[K, list[V]] = {}
    for value in values:
        found.setdefault(by(value), []).append(value)
    return found


def based(found: Iterable[Layer]) -> tuple[Layer, ...]:
    """The layers of a chain, base first."""
    layers = tuple(found)
    if len(layers) > len({layer.id for layer in layers}):
        raise LayersCircular(
            f"the store records layer {layers[-1].id} as its own backing file, directly or through others",
            hint="put a copy of the store back, or rebuild it: " + call("rebuild"),
        )
    return layers
