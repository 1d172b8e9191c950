"""What taking a snapshot will do: the plan, and the exact commands that QEMU is sent for it; pure."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import asdict, replace

from qmpsnap.block.graph import NOTHING, Beside
from qmpsnap.block.image import staged
from qmpsnap.errors import StateError, UsageError
from qmpsnap.hint import call
from qmpsnap.machine import statefile
from qmpsnap.model.home import Home
from qmpsnap.model.layers.blockdev import layer_options, node_name
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.layers.vmstate import version_of
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import OperationId, check_description, layer_id
from qmpsnap.model.operations.by import By
from qmpsnap.model.operations.copies import VolumeCopy
from qmpsnap.model.operations.memory import Means, Memory
from qmpsnap.model.operations.operation import Change, CreatePlan, Overlay
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.model.tags import check_tags
from qmpsnap.ops.base import requests, volumes
from qmpsnap.ops.base.overlays import overlay_on
from qmpsnap.ops.memory.strategy import MemoryRequest
from qmpsnap.ops.session import file_nodes
from qmpsnap.ops.session.quiesce import Freezer, QuiesceRequest
from qmpsnap.qmp import migration, transactions
from qmpsnap.volumes.driver import Ability
from qmpsnap.volumes.names import VolumeName


class CreateRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        name: the snapshot's name; None takes the next free ``snap-N`` (``saved-N`` for one after which QEMU ends).
        disks: names of the disks to include; None takes all that the spec does not leave out.
        files: disk to absolute path of its new layer; those not named are put into the machine's folder.
        listed: False makes the new layers only: no snapshot is recorded, the current one stays current.
        memory: save the guest's memory as well, of the same instant; None takes the disks alone.
        pushed: :mod:`qmpsnap.ops.stack` may go back to it and delete it.
        volumes: the storage makes the snapshot of each disk, and the new layers are committed back.
        mixed: with ``volumes``, disks whose storage cannot do that keep an ordinary frozen layer.
        lvm_size: with ``volumes``, how large thick LVM snapshots are to be; empty for a share of the disk.
        hold: pause the guest for the copy of its UEFI variables, because it wrote to them during an attempt without.
        by: the QMP command that QEMU is sent; with ``blockdev-snapshot-sync`` it opens the new layers itself.
    """

    name: str | None = None
    description: str = ""
    tags: Mapping[str, str] = {}
    disks: tuple[str, ...] | None = None
    listed: bool = True
    files: Mapping[str, str] = {}
    memory: MemoryRequest | None = None
    quiesce: QuiesceRequest = QuiesceRequest()
    pushed: bool = False
    volumes: bool = False
    mixed: bool = False
    lvm_size: str = ""
    hold: bool = False
    by: By = "blockdev-snapshot"


def plan(
    at: PlanInputs,
    request: CreateRequest,
    *,
    means: Means | None = None,
    freezer: Freezer | None = None,
    beside: Beside = NOTHING,
    by_volume: Mapping[str, Ability] = MappingProxyType({}),
) -> CreatePlan:
    """What will be done; pure.

    ``freezer``: what has become of the wish to freeze; None plans for what was asked. ``by_volume``: the disks of which
    the storage makes the snapshot, and what that takes.
    """
    machine, chains, serial = at.machine, at.basis.chains, at.serial
    included = requests.disks(machine, request.disks, lacking=beside.unplugged)
    _require_included(machine, included, request.files)
    if request.memory:
        requests.require_all(machine, included, lacking=beside.unplugged)
    _require_by(machine, request, included, mode=at.mode)
    folder, live = at.home.machine_dir(machine.name), at.mode != "stopped"
    taken = [chain for chain in chains if chain.disk in included]
    copies = tuple(
        _copy(machine, chain, serial, request.lvm_size, by_volume[chain.disk])
        for chain in taken
        if chain.disk in by_volume
    )
    overlays = tuple(
        _overlay(machine, chain, serial, str(folder), request.files.get(chain.disk), shield=chain.disk in by_volume)
        for chain in taken
        if live or chain.disk not in by_volume  # nobody writes to the image of a stopped machine
    )
    change = Change(
        layers=(*(overlay.layer for overlay in overlays), *(copy.layer for copy in copies)),
        active={overlay.disk: overlay.layer.id for overlay in overlays},
    )
    if not request.listed:
        return CreatePlan(machine=machine.name, live=live, overlays=overlays, change=change)
    prefix = "saved" if request.memory and request.memory.quit else "snap"
    name = requests.snapshot_name(machine, chains, at.basis.snapshots, request.name, prefix=prefix)
    kept = {copy.disk: copy.layer.id for copy in copies}
    snapshot = Snapshot(
        name=name,
        kind="full" if means else "volume" if copies else "disk",
        state="ok",
        parent=machine.current,
        created=at.now,
        description=check_description(request.description),
        tags=check_tags(request.tags),
        mode=at.mode,
        points=tuple(Point(disk=one.disk, layer=kept.get(one.disk, one.active.id)) for one in taken),
        operation=serial,
        level="ram" if means else "crash",
        unquiesced=freezer.why if freezer else "",
        pushed=request.pushed,
        outside=requests.outside(machine, beside, request.disks),
        max_pause_ms=request.memory.max_pause_ms if request.memory and means and means.resume else None,
    )
    copied = _variables(machine, at.home, serial, request)
    snapshot = replace(snapshot, variables=copied[1] if copied else None)
    change = replace(change, snapshots=(snapshot,), current=name)
    memory = _memory(request.memory, means, serial, folder) if request.memory and means else None
    wish = freezer.wish if freezer else request.quiesce.wish
    return CreatePlan(
        machine=machine.name,
        live=live,
        overlays=overlays,
        change=change,
        memory=memory,
        quiesce=wish,
        variables=copied,
        hold=bool(copied) and memory is None and request.hold and requests.may_run(at.mode),
        volumes=copies,
        by=request.by,
    )


def _variables(machine: Machine, home: Home, serial: OperationId, request: CreateRequest) -> tuple[str, str] | None:
    """The UEFI variable store and the path of its copy; memory contains it, but ``degrade`` may keep only the disks."""
    if machine.spec.firmware != "uefi" or machine.adopted or (request.memory and not request.memory.degrade):
        return None
    return str(home.variables(machine.name)), str(home.variables_taken(machine.name, serial, tpm=machine.spec.tpm))


def _memory(request: MemoryRequest, means: Means, serial: OperationId, folder: Path) -> Memory:
    path = request.file or str(folder / f"memory-{serial}.vmstate")
    return Memory(
        **asdict(means),
        path=path,
        part=statefile.part(path, serial),
        compression=request.compression,
        quit=request.quit,
        degrade=request.degrade,
        max_pause_ms=request.max_pause_ms if means.resume else None,
    )


def qmp_commands(plan: CreatePlan, machine: Machine) -> list[tuple[str, dict[str, object]]]:
    """The exact QMP commands of a live plan, in order; none for a stopped machine."""
    if not plan.live:
        return []
    opened = () if plan.by == "blockdev-snapshot-sync" else plan.overlays
    adds = [("blockdev-add", node_options(overlay, machine)) for overlay in opened]
    transaction = ("transaction", transaction_of(plan))
    if plan.memory is None:
        return [*adds, ("stop", {}), transaction, ("cont", {})] if plan.hold else [*adds, transaction]
    give, migrate = migration.handing_over(version_of(plan.memory.hardware.qemu_version))
    held = [("stop", {}), transaction, migrate] if plan.memory.resume else [transaction, migrate]
    after = ["quit"] if plan.memory.quit else ["cont"] if plan.memory.resume else []
    return [*adds, give, *held, *((command, {}) for command in after)]


def expected(chains: Sequence[Chain], plan: CreatePlan) -> tuple[Chain, ...]:
    """The live chains once the plan's overlays are active."""
    new = {overlay.disk: overlay.layer for overlay in plan.overlays}
    return tuple(chain.with_overlay(new[chain.disk]) if chain.disk in new else chain for chain in chains)


def transaction_of(plan: CreatePlan) -> dict[str, object]:
    """The arguments of the transaction that puts every overlay on top."""
    if plan.by == "blockdev-snapshot-sync":
        return transactions.sync_transaction(
            [(node_name(one.backing), node_name(one.layer), one.layer.path) for one in plan.overlays]
        )
    pairs = [(node_name(overlay.backing), node_name(overlay.layer)) for overlay in plan.overlays]
    return transactions.snapshot_transaction(pairs)


def _require_by(machine: Machine, request: CreateRequest, included: Collection[str], *, mode: str) -> None:
    if request.by == "blockdev-snapshot":
        return
    if mode == "stopped":
        raise StateError(
            f"machine {machine.name} is stopped: there is no QEMU to send {request.by} to",
            hint="start it: " + call("start", machine.name),
            machine=machine.name,
        )
    file_nodes.require_inherited(machine, sorted(included), command=request.by, default="blockdev-snapshot")


def _copy(machine: Machine, chain: Chain, serial: OperationId, thick: str, ability: Ability) -> VolumeCopy:
    name = VolumeName.of(machine.uuid, serial, chain.disk)
    layer = layer_id(chain.disk, serial + 1)
    return volumes.copied(chain.active, layer, name, thick=thick, reserve=ability.reserve)


def _overlay(
    machine: Machine, chain: Chain, serial: OperationId, folder: str, path: str | None, *, shield: bool
) -> Overlay:
    layer = overlay_on(chain, serial, folder)
    if shield:
        layer = replace(layer, state="shield")
    if path is None:
        return Overlay(disk=chain.disk, layer=layer, backing=chain.active)
    part = staged.part_of(path, f"{machine.uuid[:8]}-{serial}")
    return Overlay(disk=chain.disk, layer=replace(layer, path=path), backing=chain.active, part=part)


def _require_included(machine: Machine, included: frozenset[str], files: Mapping[str, str]) -> None:
    for disk in files:
        machine.require_disk(disk)
        if disk not in included:
            raise UsageError(
                f"a file is given for disk {disk} of machine {machine.name}, which the snapshot does not include",
                hint="include the disk, or omit its file",
                machine=machine.name,
            )


def node_options(overlay: Overlay, machine: Machine) -> dict[str, object]:
    """The arguments of ``blockdev-add`` for an overlay."""
    return layer_options(overlay.layer, machine.require_disk(overlay.disk), backing=None, read_only=False)
