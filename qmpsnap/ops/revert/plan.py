"""What a revert will do: pure, but for what it is given."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import StateError
from qmpsnap.hint import call, option
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot, require_snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import layer_id
from qmpsnap.model.operations.by import LoadBy
from qmpsnap.model.operations.copies import Copy, VolumeCopy, VolumeMerge
from qmpsnap.model.operations.operation import Change, Overlay, RevertPlan, Unwritten
from qmpsnap.model.planning import unreferenced
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base import requests, vmgenid, volumes
from qmpsnap.ops.base.context import require_spec
from qmpsnap.ops.base.overlays import overlay_on
from qmpsnap.volumes.names import VolumeName

Run = Literal["running", "paused"]
HardwareOf = Literal["now", "snapshot"]
"""With which virtual hardware the machine is started: what its spec says now, or said when the snapshot was taken."""


class RevertRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        discard: do not keep what was written since.
        run: how the machine is afterwards; None as it was before, and running with memory.
        file: where a full snapshot's state file lies now, if it was moved.
        hardware: ``snapshot`` makes the spec of its time the machine's spec again.
        after: tell the guest the time and the network where the machine is, once it runs on with memory.
        by: the command that loads the snapshot in the running QEMU; refused where that cannot load it.
        resume: it goes on where it was saved: its generation ID stays, unless it has run since.
    """

    name: str
    discard: bool = False
    run: Run | None = None
    file: str | None = None
    hardware: HardwareOf = "now"
    after: bool = True
    by: LoadBy | None = None
    resume: bool = False


class Storage(NamedTuple):
    """What only images and volumes can tell: merges that these do, and the sizes (bytes) that disks had with tags."""

    merges: Sequence[VolumeMerge] = ()
    sizes: Mapping[str, int] = {}


NOTHING_TOLD = Storage()


def plan(inputs: PlanInputs, at: Situation, request: RevertRequest, storage: Storage = NOTHING_TOLD) -> RevertPlan:
    """The plan of a revert; pure. Disks that the snapshot does not include are unchanged.

    The snapshot's points decide which layers become active, the request decides about the layers that were active:

    1. A point without a tag gets a new overlay on its layer; one that the storage has made is cloned by it instead, or
       merged into the active layer where the storage does that.
    2. A point with a tag, inside an image, is copied out of it into a new layer, which has the size of that time.
    3. ``discard``: the old active layers are removed, and layers below them that nothing needs then.
    4. Otherwise they are kept as an automatic snapshot; but
    5. if nothing was written to them, which is known once QEMU has ended, they are removed.
    """
    machine, mode = inputs.machine, inputs.mode
    require_spec(machine, "start it on other layers")
    snapshot = target_of(at, request.name, machine=machine, hardware=request.hardware)
    spec = changed_spec(machine, snapshot, request) or machine.spec
    _require_disks(at, snapshot, spec)
    if request.by:
        raise StateError(
            f"{request.by} cannot load snapshot {snapshot.name} of machine {machine.name}: only a running QEMU can, and"
            " of the snapshots that are inside the layers its guest writes to",
            hint="omit " + option("by", request.by),
            machine=machine.name,
        )
    _require_thawed(machine.name, snapshot, request)
    overlays, copies, clones = _new(inputs, at, snapshot, spec, storage)
    gone = tuple(disk for disk in at.live if not spec.disk(disk))
    new: tuple[Overlay | Copy | VolumeCopy, ...] = (*overlays, *copies, *clones)
    switched = Change(
        layers=(*(one.layer for one in new), *(merge.snapshot for merge in storage.merges)),
        active={one.disk: one.layer.id for one in new},
        current=snapshot.name,
        spec=changed_spec(machine, snapshot, request),
        vmgenid=vmgenid.after_revert(machine, snapshot, resumes=request.resume and mode == "stopped"),
        removed_disks=gone,
    )
    memory = snapshot.inside.layer if snapshot.inside else None
    planned = RevertPlan(
        machine=machine.name,
        snapshot=snapshot.name,
        live=mode != "stopped",
        overlays=overlays,
        removed=(),
        restart=mode != "stopped" or request.run is not None or snapshot.hardware is not None,
        paused=request.run == "paused" or (request.run is None and mode == "paused" and not snapshot.hardware),
        change=switched,
        vmstate=snapshot.vmstate,
        copies=copies,
        clones=clones,
        merges=tuple(storage.merges),
        inside=next((copy.layer.id for copy in copies if memory and copy.source.id == memory), None),
        variables=(str(inputs.home.variables(machine.name)), snapshot.variables) if snapshot.variables else None,
    )
    old = {disk: at.live[disk] for disk in (*(one.disk for one in new), *gone) if disk in at.live}
    if request.discard:
        return _discarding(planned, at.after(switched), old.values())
    return _keeping(planned, inputs, at, snapshot, old)


def changed_spec(machine: Machine, snapshot: Snapshot, request: RevertRequest) -> MachineSpec | None:
    """The spec that the machine has again after the revert, if it is another than now."""
    spec = machine.spec_at(snapshot.operation) if request.hardware == "snapshot" else machine.spec
    return None if spec == machine.spec else spec


def _require_thawed(machine: str, snapshot: Snapshot, request: RevertRequest) -> None:
    if snapshot.vmstate and snapshot.vmstate.frozen and request.run == "paused":
        raise StateError(
            f"the guest's file systems are frozen in the memory of snapshot {snapshot.name} and can only be thawed in"
            " a running guest",
            hint="omit " + option("state", "paused"),
            machine=machine,
        )


def _new(
    inputs: PlanInputs, at: Situation, snapshot: Snapshot, spec: MachineSpec, storage: Storage
) -> tuple[tuple[Overlay, ...], tuple[Copy, ...], tuple[VolumeCopy, ...]]:
    """Cases 1 and 2: the new active layers."""
    folder = str(inputs.home.machine_dir(inputs.machine.name))
    tags = {point.disk: point.tag for point in snapshot.points}
    merged = {merge.disk for merge in storage.merges}
    overlays: list[Overlay] = []
    copies: list[Copy] = []
    clones: list[VolumeCopy] = []
    for chain in points(at, snapshot, spec):
        if chain.disk in merged:
            continue
        if volumes.is_snapshot(chain.active):
            name = VolumeName.of(inputs.machine.uuid, inputs.serial, chain.disk, "clone")
            clones.append(volumes.copied(chain.active, layer_id(chain.disk, inputs.serial), name))
            continue
        layer = overlay_on(chain, inputs.serial, folder)
        if tag := tags[chain.disk]:
            size = storage.sizes.get(chain.disk, layer.virtual_size)
            layer = replace(layer, backing=chain.active.backing, virtual_size=size)
            copies.append(Copy(disk=chain.disk, layer=layer, source=chain.active, tag=tag))
        else:
            overlays.append(Overlay(disk=chain.disk, layer=layer, backing=chain.active))
    return tuple(overlays), tuple(copies), tuple(clones)


def _discarding(planned: RevertPlan, after: Situation, old: Iterable[Chain]) -> RevertPlan:
    """Case 3."""
    gone = unreferenced.nobodys(after, old)
    return replace(
        planned,
        removed=tuple(layer for layer in gone if layer.owned),
        change=replace(planned.change, removed_layers=tuple(layer.id for layer in gone)),
    )


def _keeping(
    planned: RevertPlan, inputs: PlanInputs, at: Situation, snapshot: Snapshot, old: Mapping[str, Chain]
) -> RevertPlan:
    """Cases 4 and 5."""
    machine, serial, switched = inputs.machine, inputs.serial, planned.change
    replaces = _replaces_variables(machine, snapshot)
    kept = Snapshot(
        name=requests.automatic_name(
            {found.name for found in at.snapshots}, serial, layered=requests.layered(machine, at.live.values())
        ),
        kind="disk",
        state="ok",
        parent=machine.current,
        created=inputs.now,
        description=f"{', '.join(old)} before the revert to {snapshot.name}",
        mode=inputs.mode,
        points=tuple(Point(disk=disk, layer=chain.active.id) for disk, chain in old.items()),
        operation=serial,
        variables=str(inputs.home.variables_copy(machine.name, serial, tpm=machine.spec.tpm)) if replaces else None,
    )
    active, after = tuple(chain.active for chain in old.values()), at.after(switched)
    unwritten = None
    if not switched.removed_disks and all(unreferenced.may_go(after, layer) for layer in active):
        change = replace(switched, removed_layers=tuple(layer.id for layer in active))
        unwritten = Unwritten(layers=active, change=change, variables=_variables_below(at, active))
    return replace(planned, change=replace(switched, snapshots=(kept,)), unwritten=unwritten)


def _replaces_variables(machine: Machine, snapshot: Snapshot) -> bool:
    """Whether the UEFI variable store is another one afterwards; a guest's memory has one, too, and QEMU writes it."""
    return machine.spec.firmware == "uefi" and bool(snapshot.variables or snapshot.hardware)


def _variables_below(at: Situation, active: tuple[Layer, ...]) -> tuple[str, ...]:
    """Copies of the UEFI variable store: where it reads like one of them, nothing was written to it.

    They are those of the snapshots that these layers lie on. What a memory brought along cannot be compared: there any
    copy that the machine has will do, so that at least no content is lost.
    """
    below = {layer.backing for layer in active}
    usable = [found for found in at.snapshots if found.state == "ok"]
    there = [found for found in usable if below <= {point.layer for point in found.points if not point.tag}]
    if any(found.hardware for found in there):
        there = usable
    return tuple(found.variables for found in there if found.variables)


def points(at: Situation, snapshot: Snapshot, spec: MachineSpec) -> tuple[Chain, ...]:
    """The chains that a snapshot's points are the tops of, in the order of the spec's disks."""
    disks = (disk.name for disk in spec.disks)
    return tuple(at.forest.chain(disk, point.layer) for disk in disks if (point := snapshot.point(disk)))


def merge_pairs(at: Situation, snapshot: Snapshot, spec: MachineSpec) -> tuple[tuple[Layer, Layer], ...]:
    """Active layers with the volume snapshots of theirs that a merge may give them back: nobody else reads these."""
    pairs = [
        (at.live[chain.disk].active, chain.active) for chain in points(at, snapshot, spec) if chain.disk in at.live
    ]
    return tuple(
        (active, wanted)
        for active, wanted in pairs
        if volumes.is_snapshot(wanted) and active.backing == wanted.backing and not at.forest.children(wanted.id)
    )


def left_out(snapshot: Snapshot, spec: MachineSpec) -> tuple[str, ...]:
    """The disks of a snapshot that a machine of that spec does not have: their layers stay as they are."""
    return tuple(point.disk for point in snapshot.points if not spec.disk(point.disk))


def _require_disks(at: Situation, snapshot: Snapshot, spec: MachineSpec) -> None:
    """Make sure that each disk of the machine to be is there: it stays, or the snapshot has it."""
    for disk in spec.disks:
        if disk.name not in at.live and snapshot.point(disk.name) is None:
            raise StateError(
                f"machine {at.machine} had a disk {disk.name} when snapshot {snapshot.name} was taken, which the"
                " snapshot does not include and the machine has no more",
                hint="attach a disk of that name first",
                machine=at.machine,
            )


def target_of(at: Situation, name: str, *, machine: Machine, hardware: HardwareOf = "now") -> Snapshot:
    """The snapshot of that name, once it is one that can be reverted to."""
    snapshot = require_snapshot(at.snapshots, name, machine=at.machine)
    spec = machine.spec_at(snapshot.operation) if hardware == "snapshot" else machine.spec
    if snapshot.state == "consumed":
        raise StateError(
            f"snapshot {name} of machine {at.machine} was invalidated by a commit",
            hint="choose another one that " + call("snapshots", at.machine) + " lists",
            machine=at.machine,
        )
    if snapshot.state == "overwritten":
        raise StateError(
            f"snapshot {name} of machine {at.machine} is overwritten: another program wrote to an image that it reads",
            hint=call("check", at.machine) + " names the image; if only its time changed, restore that (touch -d)",
            machine=at.machine,
        )
    for chain in points(at, snapshot, spec):
        point, live = snapshot.point(chain.disk), at.live.get(chain.disk)
        if point and point.tag and live and live.active.id == chain.active.id:
            continue  # its own layer, which is frozen or idle before it is read
        if writers := at.forest.writers_of(chain.active.id):
            raise StateError(
                f"machine {writers[0].machine} writes to layer {chain.active.id}, which holds snapshot {name}",
                hint=call("chains", writers[0].machine, writers[0].disk) + " shows its layers",
                machine=at.machine,
            )
    return snapshot
