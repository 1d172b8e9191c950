"""What a verb would do, in one shape for all of them; made by ``plan_*`` methods, carried out by ``apply``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from qmpsnap.errors import StateError
from qmpsnap.model.operations.operation import DefinePlan, InternalPlan, LoadPlan, Merge, RevertPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpsnap.model.layers.chain import Layer
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.machines.record import Machine
    from qmpsnap.model.operations.flatten import FlattenPlan
    from qmpsnap.model.operations.operation import CreatePlan, MergePlan, MirrorPlan, Overlay, Removal, ResizePlan
    from qmpsnap.model.planning.expectation import Expectation
    from qmpsnap.ops.adoption.take import TakePlan
    from qmpsnap.ops.devices.attach import Attached
    from qmpsnap.ops.devices.detach import Detached
    from qmpsnap.ops.devices.nics import Nic
    from qmpsnap.ops.fork.run import Preview as ForkPreview
    from qmpsnap.ops.fork.upkeep import Pruned
    from qmpsnap.ops.lifecycle.change import Changed
    from qmpsnap.ops.lifecycle.dry_run import Forgotten
    from qmpsnap.ops.lifecycle.rename import Renamed
    from qmpsnap.ops.revert.revert import Preview
    from qmpsnap.ops.snapshot.delete import DeletePlan
    from qmpsnap.ops.stack import PopPreview
    from qmpsnap.qmp.jobs import Report

D = TypeVar("D")
R = TypeVar("R")

Command = tuple[str, dict[str, object]]
Action = Literal["create", "overwrite", "remove", "keep", "read"]


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file that a plan has to do with.

    Attributes:
        action: ``create``, ``overwrite``, ``remove``, ``keep`` (left behind, no longer managed) or ``read``.
        path: its absolute path, or the URI of an NBD export.
        backing: path of the backing file that a new image has; None if it has none.
    """

    action: Action
    path: str
    backing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[D, R]):
    """What a verb would do now. :meth:`qmpsnap.MachineHandle.apply` carries it out, while the machine is as it was.

    Attributes:
        verb: name of the method that does it.
        machine: name of the machine.
        summary: one clause.
        qmp: the QMP commands, in order: ``{"execute": ..., "arguments": ...}``; empty for what needs no QEMU.
        bytes: bytes to copy, at most.
        files: the files to create, overwrite, remove, keep or read.
        details: the plan as qmpsnap itself follows it; its form may change from release to release.
    """

    verb: str
    machine: str
    summary: str
    qmp: tuple[dict[str, Any], ...] = ()
    bytes: int = 0
    files: tuple[PlannedFile, ...] = ()
    details: D = field(repr=False)
    _expects: Expectation | None = field(default=None, repr=False, compare=False)
    _act: Callable[[Any, Report], Awaitable[R]] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Shape(Generic[D]):
    """A plan but for how it is carried out."""

    summary: str
    qmp: tuple[dict[str, Any], ...] = ()
    bytes: int = 0
    files: tuple[PlannedFile, ...] = ()
    details: D


def planned(verb: str, machine: str, shape: Shape[D], act: Callable[[Any], Awaitable[R]]) -> Plan[D, R]:
    """A plan of a controller, which ``act`` carries out."""
    return Plan(
        verb=verb,
        machine=machine,
        summary=shape.summary,
        qmp=shape.qmp,
        bytes=shape.bytes,
        files=shape.files,
        details=shape.details,
        _act=lambda q, _: act(q),
    )


def require_same(now: object, then: object, machine: str) -> None:
    """Make sure that another plan of the same has the same in it."""
    if now != then:
        raise StateError(
            f"the plan{f' of machine {machine}' if machine else ''} was made from other facts than there are now",
            hint="plan again",
            machine=machine or None,
        )


def of_fork(machine: str) -> Callable[[ForkPreview], Shape[ForkPreview]]:
    """Forks, and the snapshot that is taken for them."""

    def shape(found: ForkPreview) -> Shape[ForkPreview]:
        taken = of_create(found.taken) if found.taken else None
        files = [file for plan in found.plans for file in _overlays(plan.overlays)]
        names = ", ".join(plan.machine for plan in found.plans)
        first = f"{taken.summary}, then " if taken else ""
        return Shape(
            summary=f"{first}fork {found.plans[0].snapshot} of {machine} as {names}",
            qmp=taken.qmp if taken else (),
            files=(*(taken.files if taken else ()), *files),
            details=found,
        )

    return shape


def of_prune(found: Pruned) -> Shape[Pruned]:
    """The end of templates."""
    files = tuple(PlannedFile(action="remove", path=one.folder) for one in found.removed)
    return Shape(summary=f"remove {len(files)} templates", files=files, details=found)


def of_create(found: tuple[Machine, CreatePlan]) -> Shape[CreatePlan]:
    """New layers, with a snapshot or without one."""
    from qmpsnap.ops.snapshot.plan import qmp_commands

    machine, plan = found
    what = f"take snapshot {plan.change.snapshots[0].name}" if plan.change.snapshots else "add layers"
    files = [*_overlays(plan.overlays), *(_created(copy.layer.path) for copy in plan.volumes)]
    files += [_created(plan.memory.path)] if plan.memory else []
    files += [_created(plan.variables[1])] if plan.variables else []
    return Shape(summary=what, qmp=_sent(qmp_commands(plan, machine), machine), files=tuple(files), details=plan)


def of_internal(found: tuple[Machine, InternalPlan]) -> Shape[InternalPlan]:
    """A snapshot inside the images."""
    from qmpsnap.ops.internal.create import qmp_commands

    machine, plan = found
    files = [PlannedFile(action="overwrite", path=layer.path) for layer in plan.layers.values()]
    files += [_created(plan.variables[1])] if plan.variables else []
    return Shape(
        summary=f"take internal snapshot {plan.change.snapshots[0].name}",
        qmp=_sent(qmp_commands(plan), machine),
        files=tuple(files),
        details=plan,
    )


def of_snapshot(
    found: tuple[Machine, CreatePlan] | tuple[Machine, InternalPlan],
) -> Shape[CreatePlan] | Shape[InternalPlan]:
    """A snapshot of any kind."""
    machine, plan = found
    return of_internal((machine, plan)) if isinstance(plan, InternalPlan) else of_create((machine, plan))


def of_merge(found: tuple[MergePlan, Command]) -> Shape[MergePlan]:
    """A commit or stream."""
    plan, command = found
    step = next(one for one in plan.steps if isinstance(one, Merge))
    lost = [snapshot.name for snapshot in plan.opening.snapshots]
    return Shape(
        summary=f"{plan.verb} {step.top.id if step.kind == 'commit' else 'layers'} into {step.into.id} of disk"
        f" {step.disk}" + (f", which invalidates {', '.join(lost)}" if lost else ""),
        qmp=_sent([command]),
        bytes=step.moves,
        files=_merged(plan.steps),
        details=plan,
    )


def of_mirror(found: tuple[MirrorPlan, Sequence[Command]]) -> Shape[MirrorPlan]:
    """A copy of a disk."""
    plan, commands = found
    end = "switch to it" if plan.mode == "pivot" else "keep the disk as it is"
    target = PlannedFile(action="create" if plan.made else "overwrite", path=plan.target.path)
    return Shape(
        summary=f"copy disk {plan.disk} and {end}",
        qmp=_sent(commands),
        bytes=plan.moves,
        files=(target, *_removed(plan.removed)),
        details=plan,
    )


def of_set(found: Changed) -> Shape[Changed]:
    """Another spec."""
    return Shape(summary=f"set {', '.join(key for key, *_ in found.changes) or 'nothing'}", details=found)


def of_take(found: TakePlan) -> Shape[TakePlan]:
    """A machine taken from its owner."""
    copied = [PlannedFile(action="read", path=found.variables)] if found.variables else []
    after = f" once process {found.waits_for} has ended" if found.waits_for else ""
    return Shape(summary=f"take machine {found.machine}{after}", files=tuple(copied), details=found)


def of_rename_machine(found: Renamed) -> Shape[Renamed]:
    """Another name of a machine."""
    return Shape(
        summary=f"rename machine {found.plan.machine} to {found.plan.new}",
        files=tuple(PlannedFile(action="overwrite", path=path) for path in found.rewritten),
        details=found,
    )


def of_resize(found: tuple[ResizePlan, Command]) -> Shape[ResizePlan]:
    """More bytes of a disk."""
    plan, command = found
    return Shape(
        summary=f"resize disk {plan.disk} to {plan.size} bytes",
        qmp=_sent([command]),
        files=(PlannedFile(action="overwrite", path=plan.layer.path),),
        details=plan,
    )


def of_flatten(found: FlattenPlan) -> Shape[FlattenPlan]:
    """Data of their own for clones."""
    what = ", ".join(f"{clone.layer.shown} of {clone.parent}" for clone in found.clones)
    files = tuple(PlannedFile(action="overwrite", path=clone.layer.path) for clone in found.clones)
    return Shape(summary=f"flatten {what or 'nothing'}", bytes=found.bytes, files=files, details=found)


def of_attach(found: Attached) -> Shape[Attached]:
    """One more disk."""
    plan = found.plan
    made = {layer.path for layer in plan.created}
    there = [layer for layer in plan.change.layers if layer.path not in made]
    files = [_created(layer.path) for layer in plan.images]
    files += [*_overlays(plan.overlays), *(PlannedFile(action="read", path=layer.path) for layer in there)]
    qmp = _sent(found.commands)
    return Shape(summary=f"attach disk {plan.disk.name}", qmp=qmp, files=tuple(files), details=found)


def of_detach(found: Detached) -> Shape[Detached]:
    """A disk less."""
    kept = f", keeping it as {found.kept}" if found.kept else ""
    files = tuple(PlannedFile(action="keep", path=layer.path) for layer in found.plan.layers)
    return Shape(summary=f"detach disk {found.disk}{kept}", qmp=_sent(found.commands), files=files, details=found)


def of_nic(doing: Literal["attach", "detach"]) -> Callable[[Nic], Shape[Nic]]:
    """A network card more, or less."""
    return lambda found: Shape(
        summary=f"{doing} network card {found.number} ({found.mac})", qmp=_sent(found.commands), details=found
    )


def of_delete(found: tuple[DeletePlan, Sequence[Command]]) -> Shape[DeletePlan]:
    """The deletion of snapshots."""
    plan, commands = found
    return Shape(
        summary=f"delete {', '.join(plan.names)}",
        qmp=_sent(commands),
        bytes=plan.bytes,
        files=_merged(plan.plan.steps),
        details=plan,
    )


def of_revert(found: Preview) -> Shape[Preview]:
    """A revert, or a restore."""
    plan = found.plan
    files: list[PlannedFile] = []
    if isinstance(plan, RevertPlan):
        files += [*_overlays(plan.overlays), *(_created(copy.layer.path) for copy in plan.copies)]
        files += [_created(clone.layer.path) for clone in plan.clones]
        files += [PlannedFile(action="overwrite", path=merge.layer.path) for merge in plan.merges]
    kept = f", keeping the present state as {found.kept}" if found.kept else ""
    inside = " in the running QEMU" if isinstance(plan, LoadPlan) else ""
    return Shape(
        summary=f"revert to {plan.snapshot}{inside}{kept}",
        qmp=_sent(found.commands),
        bytes=found.moves,
        files=(*files, *_removed(found.removed)),
        details=found,
    )


def of_pop(found: PopPreview) -> Shape[PopPreview]:
    """A revert, then a deletion."""
    back, gone = of_revert(found.revert), of_delete((found.delete, ()))
    made = {file.path for file in back.files if file.action == "create"}
    passing = made & {file.path for file in gone.files if file.action == "remove"}
    return Shape(
        summary=f"{back.summary}, then {gone.summary}",
        qmp=back.qmp,
        bytes=back.bytes + gone.bytes,
        files=tuple(file for file in (*back.files, *gone.files) if file.path not in passing),
        details=found,
    )


def of_undefine(machine: str) -> Callable[[Forgotten], Shape[Forgotten]]:
    """The end of a machine."""

    def shape(found: Forgotten) -> Shape[Forgotten]:
        files = [PlannedFile(action="keep", path=path) for path in found.kept]
        files += [PlannedFile(action="remove", path=path) for path in found.removed]
        return Shape(summary=f"undefine machine {machine}", files=tuple(files), details=found)

    return shape


def of_rename(old: str, new: str) -> Callable[[None], Shape[None]]:
    """Another name."""
    return lambda _: Shape(summary=f"rename snapshot {old} to {new}", details=None)


def of_describe(found: Snapshot) -> Shape[Snapshot]:
    """Another description and other tags."""
    return Shape(summary=f"describe snapshot {found.name}", details=found)


def of_define(verb: str, plan: DefinePlan, details: D) -> Shape[D]:
    """A new machine."""
    files = [_created(layer.path) for layer in plan.images]
    files += [*_overlays(plan.overlays), *([_created(plan.variables)] if plan.variables else [])]
    read = (PlannedFile(action="read", path=layer.path) for layer in plan.change.layers if not layer.owned)
    return Shape(summary=f"{verb} machine {plan.machine}", files=(*files, *read), details=details)


def _sent(commands: Iterable[Command], machine: Machine | None = None) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"execute": command, "arguments": machine.sent(arguments) if machine else arguments}
        for command, arguments in commands
    )


def _created(path: str) -> PlannedFile:
    return PlannedFile(action="create", path=path)


def _overlays(overlays: Iterable[Overlay]) -> list[PlannedFile]:
    return [PlannedFile(action="create", path=one.layer.path, backing=one.backing.path) for one in overlays]


def _removed(layers: Iterable[Layer]) -> tuple[PlannedFile, ...]:
    return tuple(PlannedFile(action="remove", path=layer.path) for layer in layers if layer.owned)


def _merged(steps: Iterable[Merge | Removal]) -> tuple[PlannedFile, ...]:
    files: list[PlannedFile] = []
    for step in steps:
        if isinstance(step, Merge):
            files.append(PlannedFile(action="overwrite", path=step.into.path))
        else:
            files += [PlannedFile(action="remove", path=state.path) for state in step.states]
            files += [PlannedFile(action="remove", path=path) for path in step.variables]
        files += _removed(step.removed)
    return tuple(files)
