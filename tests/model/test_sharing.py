"""Two operations that meet at one file: by which names it is told, and who may go on."""

import pytest
from msgspec.structs import replace

from qmpsnap.errors import OperationPending, StateError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import (
    Change,
    DefinePlan,
    MergePlan,
    MirrorPlan,
    Operation,
    Plan,
    Removal,
    verb_of,
)
from qmpsnap.model.planning.layer_graph import Forest, Reference, Writer
from qmpsnap.model.planning.sharing import require_unshared

BASE = Layer(id=LayerId("vda-1"), path="/q/1", format="qcow2", backing=None, virtual_size=1, device=3, inode=1)
TOP = Layer(id=LayerId("vda-2"), path="/q/2", format="qcow2", backing=BASE.id, virtual_size=1, device=3, inode=2)
FOREST = Forest(
    {BASE.id: BASE, TOP.id: TOP}, (Writer("web", "vda", TOP.id),), (Reference("web", "s1", "vda", BASE.id),)
)
FOREIGN = Layer(
    id=LayerId("vda-7"), path="/i/x", format="qcow2", backing=None, virtual_size=1, device=3, inode=7, owned=False
)


def removal(*layers: Layer) -> MergePlan:
    gone = Removal(disk="vda", removed=layers, change=Change(removed_layers=tuple(layer.id for layer in layers)))
    return MergePlan(verb="delete", machine="web", opening=Change(), undo=Change(), steps=(gone,))


def mirror(onto: Layer) -> MirrorPlan:
    return MirrorPlan(
        machine="web", disk="vda", mode="finish", target=onto, made=False, shallow=False, write_blocking=False,
        live=True, chain=(BASE, TOP), moves=0,
    )  # fmt: skip


def taking_over(*layers: Layer, read_only: bool = False) -> DefinePlan:
    """Define ``new`` with the last of these as its image."""
    image = layers[-1]
    disk = DiskSpec(name="vda", image=image.path, read_only=read_only)
    machine = Machine(name="new", uuid="u", host="here", spec=MachineSpec(name="new", disks=(disk,)), created=1)
    fresh = tuple(layer for layer in layers if layer.id not in FOREST.layers)
    return DefinePlan(
        machine="new", images=(), overlays=(), change=Change(define=machine, layers=fresh, active={"vda": image.id})
    )


def is_open(plan: Plan) -> Operation:
    return Operation(
        id=OperationId(5), machine=plan.machine, verb=verb_of(plan), state="running", step="planned", plan=plan,
        started=1, updated=1, pid=1,
    )  # fmt: skip


@pytest.mark.parametrize("name", [{"id": LayerId("vda-9")}, {"id": LayerId("vda-9"), "path": "/i/second"}])
def test_a_file_is_told_by_path_or_inode_also_when_the_store_has_forgotten_it(name: dict[str, str]) -> None:
    """The id is new as the store no longer knows the layer; the second one is a hard link to it."""
    again = replace(BASE, owned=False, **name)
    without = replace(FOREST, layers={TOP.id: replace(TOP, backing=None)}, references=())
    with pytest.raises(OperationPending, match=r"operation 5 \(delete\) on machine web"):
        require_unshared("new", taking_over(again, read_only=True), without, [is_open(removal(BASE))])
    require_unshared("new", taking_over(again, read_only=True), without, [is_open(removal(TOP))])


def test_only_what_changes_keeps_others_away() -> None:
    """Two read one image; neither may while the other writes to it."""
    reads, writes = taking_over(FOREIGN, read_only=True), taking_over(FOREIGN)
    require_unshared("other", replace(reads, machine="other"), FOREST, [is_open(reads)])
    for mine, theirs in ((reads, writes), (writes, reads), (writes, writes), (mirror(FOREIGN), reads)):
        with pytest.raises(OperationPending):
            require_unshared("other", replace(mine, machine="other"), FOREST, [is_open(theirs)])


def test_what_has_settled_since_the_plan_counts() -> None:
    with pytest.raises(StateError, match="machine web reads it meanwhile"):
        require_unshared("new", taking_over(replace(BASE, id=LayerId("vda-9"), path="/i/second")), FOREST, [])
    with pytest.raises(StateError, match="but machine web writes to it meanwhile"):
        require_unshared("new", taking_over(TOP, read_only=True), FOREST, [])
    with pytest.raises(StateError, match="layer vda-5, a base of machine new, was removed meanwhile"):
        require_unshared("new", taking_over(replace(FOREIGN, backing=LayerId("vda-5"))), FOREST, [])
    require_unshared("web", removal(BASE), FOREST, [])  # its own snapshots are its own affair
