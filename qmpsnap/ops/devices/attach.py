"""``disk attach``: a machine gets one more disk, behind those it has; a running QEMU by ``device_add``.

Its images are made or taken over as ``define`` does it; then QEMU has the disk, and the spec has it with its place.
Snapshots from before do not include it, and a revert to one of them leaves it as it is, or with the hardware of that
time takes it away again.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image.qcow2 import Header
from qmpsnap.errors import NameTaken
from qmpsnap.hint import option
from qmpsnap.host import files
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine.open_files import require_opened, require_recorded
from qmpsnap.machine.starting.root_ports import free_port, places
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.devices import AttachPlan
from qmpsnap.model.operations.operation import Change, Operation
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.model.planning.layer_graph import based
from qmpsnap.ops.base import admission, free_space, luks
from qmpsnap.ops.base.context import Context, require_folder, require_spec
from qmpsnap.ops.base.free_space import Need
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import headers_of, identified, make_overlays, remove_new, require_free
from qmpsnap.ops.devices.plugging import Command, close, plug, plug_commands, require_pluggable
from qmpsnap.ops.lifecycle import change, define, disk_sources
from qmpsnap.ops.lifecycle.bases import resolved
from qmpsnap.ops.lifecycle.disk_sources import DiskSource
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.ops.session.session import begin, inputs, looking, working
from qmpsnap.qmp import devices
from qmpsnap.qmp.session import Monitor

Wanted = Callable[[Machine, Sequence[Snapshot]], MachineSpec]
"""Makes the spec with the new disk, as the last one, of the machine's."""

BY_SLOT = ("virtio", "nvme")
"""Buses on which a disk is a PCI device of its own."""


class Attached(Struct, frozen=True, kw_only=True):
    """A disk that a machine was given.

    Attributes:
        plan: what was done.
        disk: the disk, as the machine's spec has it.
        path: of its active layer, which the guest writes to.
        unloadable: names of the snapshots whose memory fits the hardware no more, and why; they can still be reverted
            to with the hardware of their time, which takes the disk away again.
    """

    plan: AttachPlan
    disk: DiskSpec
    path: str
    unloadable: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def commands(self) -> list[Command]:
        """The exact QMP commands to the QEMU that runs, in order; none for a stopped machine."""
        return plug_commands(self.plan) if self.plan.live else []


def wanted(disk: Mapping[str, object] | DiskSpec, *, folder: Path, guest_dir: Path) -> Wanted:
    """How the new spec is made: of a disk as a spec file describes one; where it has no name, the next free one."""
    from qmpsnap.machine.config import specfile  # YAML is slow to load

    given: dict[str, Any] = dict(disk) if isinstance(disk, Mapping) else msgspec.to_builtins(disk)

    def make(machine: Machine, snapshots: Sequence[Snapshot]) -> MachineSpec:
        name = given.get("name") or free_name(machine, snapshots)
        return specfile.extended(machine.spec, given | {"name": name}, of="disks", folder=folder, guest_dir=guest_dir)

    return make


def names_in_use(machine: Machine, snapshots: Sequence[Snapshot]) -> set[str]:
    """The names of disks that the machine has, and of those that its snapshots have."""
    specs = (machine.spec, *(past.spec for past in machine.past))
    points = {point.disk for snapshot in snapshots for point in snapshot.points}
    return {disk.name for spec in specs for disk in spec.disks} | points


def free_name(machine: Machine, snapshots: Sequence[Snapshot]) -> str:
    """The first of ``vda``, ``vdb`` ... that no disk of the machine has or had."""
    used = names_in_use(machine, snapshots)
    letters = string.ascii_lowercase
    names = (f"vd{first}{last}" for first in ("", *letters) for last in letters)
    return next((name for name in names if name not in used), "")


def placed(spec: MachineSpec, disk: DiskSpec) -> DiskSpec:
    """The new disk where no other one is, and where its coming moves none; pure."""
    disks = spec.disks
    if disk.bus in BY_SLOT:
        return replace(disk, address=free_port(spec) or "")
    found = places(disks)
    used = {found[other.name] for other in disks if other.bus == disk.bus}
    free = next(number for number in range(len(used) + 1) if number not in used)
    return replace(disk, address=f"+{free}")


def plan(inputs: PlanInputs, spec: MachineSpec, source: DiskSource) -> AttachPlan:
    """What will be done: ``spec`` is the machine's with the disk as its last one; pure."""
    disk = spec.disks[-1]
    alone = replace(inputs.machine, spec=replace(spec, disks=(disk,)))
    made = define.plan(alone, {disk.name: source}, serial=inputs.serial, home=inputs.home, variables=False)
    return AttachPlan(
        machine=inputs.machine.name,
        disk=disk,
        images=made.images,
        overlays=made.overlays,
        layers=_chain(made.change, made.change.active[disk.name], source),
        live=inputs.mode != "stopped",
        change=Change(layers=made.change.layers, active=made.change.active, spec=spec),
    )


def _chain(made: Change, active: LayerId, source: DiskSource) -> tuple[Layer, ...]:
    known = {layer.id: layer for layer in (*filter(None, source.known), *made.layers)}
    found = [known[active]]
    while found[-1].backing:
        found.append(known[found[-1].backing])
    return based(reversed(found))


class _Found(Struct, frozen=True):
    """The spec with the new disk, what lies under that, and the snapshots that will not load."""

    spec: MachineSpec
    source: DiskSource
    unloadable: tuple[tuple[str, tuple[str, ...]], ...]


async def preview(context: Context, name: str, make: Wanted, *, folders: Sequence[Path] = ()) -> Attached:
    """What :func:`run` would do now; locks and changes nothing."""
    async with looking(context, name) as session:
        found = await _look(session, make, folders)
        planned = plan(await inputs(session, session.basis), found.spec, found.source)
        await to_read(_require_possible, session, planned)
        return _answer(planned, found)


async def run(context: Context, name: str, make: Wanted, *, folders: Sequence[Path] = ()) -> Attached:
    """Give a machine one more disk; returns it once its images and the record are durable.

    Raises:
        StateError: the machine is adopted, or runs and its QEMU cannot take the disk; or somebody else writes to the
            image.
        QmpError: QEMU refuses it; nothing is changed.
        NameTaken: it has, or a snapshot of it has, another disk of that name.
        ImageRefused: an image is not what the request says, or not in an allowed folder.
    """
    async with working(context, name, "disk attach") as session:
        found = await _look(session, make, folders)

        def planned(at: PlanInputs) -> AttachPlan:
            made = plan(at, found.spec, found.source)
            _require_possible(session, made)
            return made

        serials = define.serials_needed(_alone(found.spec), {found.spec.disks[-1].name: found.source})
        operation = await begin(session, session.basis, planned, serials=serials)
        async with recovery.attempting(session, operation):
            await _carry_out(session, operation)
        return _answer(operation.plan, found)


def _alone(spec: MachineSpec) -> MachineSpec:
    return replace(spec, disks=spec.disks[-1:])


async def _look(session: MachineSession, make: Wanted, folders: Sequence[Path]) -> _Found:
    context, machine, snapshots = session.context, session.machine, session.basis.snapshots
    require_spec(machine, "attach a disk")
    spec = make(machine, snapshots)
    whole = await resolved(context, _alone(spec))
    disk = placed(machine.spec, whole.disks[-1])
    if session.qemu:
        require_pluggable(session, disk, doing="attach")
    known = {Path(layer.path).parent for layer in session.basis.forest.layers.values() if layer.storage == "file"}
    allowed = (context.home.data, *context.home.images, *known, *folders)
    source = (await disk_sources.read(context, replace(spec, disks=(disk,)), allowed))[disk.name]
    _require_name(session, disk.name, source)
    spec = replace(spec, disks=(*machine.spec.disks, disk))
    after = replace(machine, spec=spec)
    lost = tuple([each async for each in change.unloadable(context, machine, after, snapshots)])
    return _Found(spec, source, lost)


def _require_name(session: MachineSession, name: str, source: DiskSource) -> None:
    """A name that snapshots have for a disk is that disk's, which may come back under it."""
    machine, basis = session.machine, session.basis
    if name not in names_in_use(machine, basis.snapshots):
        return
    points = [point.layer for snapshot in basis.snapshots if (point := snapshot.point(name))]
    theirs = basis.forest.below([layer for layer in points if layer in basis.forest.layers]).keys()
    if theirs and any(layer and layer.id in theirs for layer in source.known):
        return
    kept = [snapshot.name for snapshot in basis.snapshots if snapshot.point(name)]
    raise NameTaken(
        f"machine {machine.name} had another disk {name}"
        + (f", which its snapshot {kept[-1]} includes" if kept else ", when a snapshot of it was taken"),
        hint="choose another name: " + option("name", free_name(machine, basis.snapshots)),
        machine=machine.name,
    )


def _require_possible(session: MachineSession, planned: AttachPlan) -> None:
    context, machine = session.context, session.machine
    require_free([layer.path for layer in planned.created])
    folder = context.home.machine_dir(machine.name)
    needs = [Need(str(context.home.data), free_space.STORE, "the store")]
    needs += [Need(str(folder), free_space.of_image(layer.virtual_size), layer.id) for layer in planned.created]
    free_space.require([need for need in needs if Path(need.folder).is_dir()], machine=machine.name)


def _answer(planned: AttachPlan, found: _Found) -> Attached:
    return Attached(plan=planned, disk=planned.disk, path=planned.layers[-1].path, unloadable=found.unloadable)


async def _carry_out(session: MachineSession, operation: Operation[AttachPlan]) -> None:
    context, planned = session.context, operation.plan
    machine = replace(session.machine, spec=planned.change.spec or session.machine.spec)
    folder = context.home.machine_dir(machine.name)
    await to_read(require_folder, context.home, machine.name)
    await to_end(files.make_folder, folder)
    headers: dict[LayerId, Header] = {}
    for layer in planned.images:
        async with luks.for_images(context, machine.name, planned.disk) as key:
            headers[layer.id] = await context.image.create_base(
                layer.path, format=layer.format, virtual_size=layer.virtual_size, key=key
            )
    headers |= await make_overlays(context, machine, planned.overlays)
    change = identified(planned.change, headers)
    if session.qemu:
        made = {layer.id: layer for layer in change.layers}
        chain = Chain(planned.disk.name, tuple(made.get(layer.id, layer) for layer in planned.layers))
        await admission.all_files(context, machine, [chain], None)
        await to_read(lambda: require_recorded(chain.layers, machine=machine.name))
        await context.astore.mark(operation.id, "running", step=steps.PLUGGING)
        await plug(session.qemu, planned)
        await to_read(lambda: require_opened(context.process(machine), chain.layers, machine=machine.name))
    await context.astore.settle(operation.id, machine.name, change)


async def end(broken: Broken[AttachPlan], qemu: Monitor | None) -> Direction:
    """Undo an attachment that did not settle, unless QEMU has the disk, or had it: then a guest may have used it."""
    context, planned = broken.context, broken.operation.plan
    if broken.operation.step == steps.PLUGGING:
        if qemu is None or planned.disk.name in await devices.plugged(qemu):
            headers = await to_end(headers_of, planned.created)
            change = identified(planned.change, headers)
            await context.astore.settle(broken.operation.id, planned.machine, change)
            return "forward"
        await close(qemu, planned.layers)
    await remove_new([*planned.images, *planned.overlays])
    await broken.mark_failed()
    return "back"
