"""What an operation does to files that another machine reads, or that another operation is at work on. Pure.

Plans are made from what the store said a moment ago. This is asked in the transaction that opens the operation, so
that of two operations which meet at one file the second is refused, whichever it is: nothing settles in between.
"""

from collections.abc import Iterable, Sequence
from typing import NoReturn

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import OperationPending, StateError
from qmpsnap.hint import call
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.rbd import PREFIX, shown
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.devices import AttachPlan
from qmpsnap.model.operations.operation import (
    CreatePlan,
    DefinePlan,
    Merge,
    MergePlan,
    MirrorPlan,
    Operation,
    Plan,
    ResizePlan,
    RevertPlan,
)
from qmpsnap.model.operations.rename import RenamePlan
from qmpsnap.model.operations.undefine import UndefinePlan
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest

Name = str | tuple[int, int]
"""What a file is known by: its layer's id, its path, its device and inode or identity; any of them is enough."""


class Uses(Struct, frozen=True):
    """What a plan does to files: what a machine that is to be ``reads``, and what is made, written to or removed."""

    reads: frozenset[Name] = frozenset()
    changes: frozenset[Name] = frozenset()


def require_unshared(machine: str, plan: Plan, forest: Forest, others: Sequence[Operation]) -> None:
    """Make sure that nobody else has to do with what a plan changes, and nobody changes what it reads.

    ``StateError``: another machine has begun to read what changes or to write to what is read, or a layer has gone.
    """
    mine = uses(plan, forest)
    if gone := [name for name in needed(plan) if name not in forest.layers]:
        raise StateError(
            f"layer {gone[0]}, a base of machine {machine}, was removed meanwhile",
            hint="try again",
            machine=machine,
        )
    for layer in forest.layers.values():
        own = names_of([layer])
        agreed = {machine, *(plan.others if isinstance(plan, RenamePlan) else ())}
        if own & mine.changes and (strangers := sorted(forest.machines_above(layer.id) - agreed)):
            raise StateError(
                f"layer {layer.id} ({layer.shown}) would change, but machine {', '.join(strangers)} reads it meanwhile",
                hint="try again: a new plan leaves that layer alone",
                machine=machine,
            )
        if own & mine.reads and (writers := [w.machine for w in forest.writers_of(layer.id) if w.machine != machine]):
            raise StateError(
                f"machine {machine} would read {layer.shown}, but machine {writers[0]} writes to it meanwhile",
                hint="use the layer that this freezes: " + call("snapshot", writers[0]),
                machine=machine,
            )
    for other in others:
        theirs = uses(other.plan, forest)
        if both := mine.changes & (theirs.reads | theirs.changes) or mine.reads & theirs.changes:
            _refuse(machine, other, both, reads=not both & theirs.changes)


def require_unchanged(plan: Plan, basis: Basis, now: Basis) -> None:
    """Make sure that what a plan was made from is still so; what others read or write to, the rules above compare."""
    changed = ""
    if replace(basis, forest=now.forest) != now:
        changed = f"the record of machine {basis.name}"
    before, after, theirs = basis.forest.layers, now.forest.layers, uses(plan, basis.forest)
    for layer in before.keys() & (theirs.reads | theirs.changes):
        if before[layer] != after.get(layer):
            changed = f"layer {layer}"
    if changed:
        raise StateError(f"{changed} changed during planning", hint="try again", machine=basis.name)


def require_unused(machine: str, gone: Sequence[Layer], forest: Forest, others: Sequence[Operation]) -> None:
    """Make sure that no open operation of another machine has to do with layers that are about to go."""
    going = names_of(gone)
    for other in others:
        theirs = uses(other.plan, forest)
        if both := going & (theirs.reads | theirs.changes):
            _refuse(machine, other, both, reads=not both & theirs.changes)


def uses(plan: Plan, forest: Forest) -> Uses:
    """What a plan does to files; of what it removes, also after the store has forgotten it."""
    if isinstance(plan, DefinePlan | AttachPlan):
        return _define(plan, forest)
    return Uses(changes=_changes(plan))


def names(plan: Plan, forest: Forest) -> frozenset[Name]:
    """Every name of a file that a plan has to do with: where two plans have none in common, neither is in the way."""
    of = uses(plan, forest)
    return of.reads | of.changes | {*needed(plan)}


def _changes(plan: Plan) -> frozenset[Name]:  # noqa: PLR0911 - one for each kind of plan
    match plan:
        case CreatePlan():
            return names_of(one.layer for one in plan.new)
        case MergePlan():
            changes: set[Name] = set()
            for step in plan.steps:
                changes |= names_of(step.removed) | {*step.change.removed_layers}
                changes |= names_of([step.into]) if isinstance(step, Merge) else {layer for _, layer, _ in step.tags}
            return frozenset(changes)
        case RevertPlan():
            files = [
                *(new.layer for new in plan.new),
                *(layer for merge in plan.merges for layer in (merge.layer, merge.snapshot)),
                *plan.removed,
                *(plan.unwritten.layers if plan.unwritten else ()),
            ]
            return names_of(files) | {*plan.change.removed_layers}
        case MirrorPlan():
            return names_of([plan.target, *plan.removed]) | {*plan.change.removed_layers}
        case UndefinePlan():
            return names_of(plan.layers)
        case ResizePlan():
            return names_of([plan.layer])
        case RenamePlan():
            return names_of(plan.moved)
        case _:
            return frozenset()  # tags inside active layers, which only their own machine reads


def opened(plan: Plan) -> frozenset[LayerId]:
    """The layers that a plan opens for writing before its first job starts, and those inside which it removes tags."""
    if not isinstance(plan, MergePlan):
        return frozenset()
    found: set[LayerId] = set()
    for step in plan.steps:
        found |= {step.root} if isinstance(step, Merge) else {layer for _, layer, _ in step.tags}
    return frozenset(found)


def rewritten(step: Merge) -> tuple[Layer, ...]:
    """The layers whose files a job and its end write to, even if it is only their header.

    Layers below the merged ones are only read: if they change meanwhile, another program has written to them.
    """
    above = [layer for layer in step.chain if layer.backing == step.top.id]  # its backing is replaced
    return (step.into, *above, *step.rebased, *step.removed)


def _define(plan: DefinePlan | AttachPlan, forest: Forest) -> Uses:
    """A new machine or disk makes its images, writes to those it has taken over, and reads all that is below."""
    new_machine = plan.change.define if isinstance(plan, DefinePlan) else None
    disks = (plan.disk,) if isinstance(plan, AttachPlan) else new_machine.spec.disks if new_machine else ()
    taken = {plan.change.active[disk.name] for disk in disks if not disk.read_only and disk.name in plan.change.active}
    made = {layer.id for layer in plan.created}
    new = plan.change.layers
    below = [layer for top in needed(plan) if top in forest.layers for layer in forest.chain("", top).layers]
    return Uses(
        reads=names_of([*(layer for layer in new if layer.id not in made | taken), *below]),
        changes=names_of(layer for layer in new if layer.id in made | taken),
    )


def needed(plan: Plan) -> list[LayerId]:
    """The layers that the store has to have for a new machine, or a new disk, to be built on them."""
    if not isinstance(plan, DefinePlan | AttachPlan):
        return []
    new = {layer.id for layer in plan.change.layers}
    wanted = [*(layer.backing for layer in plan.change.layers), *plan.change.active.values()]
    return [layer for layer in dict.fromkeys(wanted) if layer is not None and layer not in new]


def names_of(layers: Iterable[Layer]) -> frozenset[Name]:
    """What the files of layers are known by."""
    found: set[Name] = set()
    for layer in layers:
        found |= {layer.id, layer.path, *([layer.identity] if layer.identity else [])}
        if layer.inode:  # else its file is not made yet
            found.add((layer.device, layer.inode))
    return frozenset(found)


def is_path(name: str) -> bool:
    """Whether that is a layer's path, and neither its id nor the identity of what is no file."""
    return name.startswith(("/", PREFIX))


def _refuse(machine: str, other: Operation, both: frozenset[Name], *, reads: bool) -> NoReturn:
    texts = sorted((name for name in both if isinstance(name, str)), key=lambda name: (is_path(name), len(name)))
    what = shown(texts[-1]) if texts else "a file of it"
    does = "is about to read" if reads else "changes"
    end: str = call("recover", other.machine)
    if not isinstance(other.plan, DefinePlan | UndefinePlan):
        end = call("wait", other.machine) + " if it is still at work, else " + end
    raise OperationPending(
        f"operation {other.id} ({other.verb}) on machine {other.machine} is still open and {does} {what};"
        f" nothing of machine {machine} was changed",
        hint=end,
        machine=machine,
    )
