"""``define``: a machine's folder and images are made, then its row."""

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.block.image.header import FoundLayer
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.errors import HostCannot, NameTaken, NotFoundError, StateError, StoreMismatch, UsageError
from qmpsnap.hint import call, option
from qmpsnap.host import files
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine.config import firmware as uefi
from qmpsnap.machine.starting import probe
from qmpsnap.machine.starting.argv import Firmware
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Consent, Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, has_pcie
from qmpsnap.model.names import LayerId, OperationId, layer_id
from qmpsnap.model.operations.operation import Change, DefinePlan, Operation, Overlay
from qmpsnap.model.planning.inputs import Basis, PlanInputs
from qmpsnap.model.timestamps import moment
from qmpsnap.ops.base import luks, vmgenid
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, forget_places, locked, require_folder
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import identified, make_overlays, require_free
from qmpsnap.ops.lifecycle import bases, boot_files, disk_sources
from qmpsnap.ops.lifecycle.disk_sources import DiskSource
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.session import begin

ROOT_PORTS = 4
"""Of a new machine whose spec does not say how many."""

Amend = Callable[[DefinePlan, Mapping[str, DiskSource], OperationId], DefinePlan]
"""What else a plan does, once it is known what lies under the disks; may look at files."""


def as_it_is(planned: DefinePlan, _sources: Mapping[str, DiskSource], _serial: OperationId) -> DefinePlan:
    """The plan that does nothing else."""
    return planned


def plan(
    machine: Machine, sources: Mapping[str, DiskSource], *, serial: OperationId, home: Home, variables: bool
) -> DefinePlan:
    """What will be done; pure. Serial numbers from ``serial`` on are used, one per new layer."""
    numbers = iter(range(serial, serial + serials_needed(machine.spec, sources)))
    folder = home.machine_dir(machine.name)
    images: list[Layer] = []
    overlays: list[Overlay] = []
    foreign: dict[str, Layer] = {}  # by path: two disks of one machine may have a base in common
    active: dict[str, LayerId] = {}
    for disk in machine.spec.disks:
        below: Layer | None = None
        for found, known in zip(sources[disk.name].found, sources[disk.name].known, strict=True):
            if known is None and found.path not in foreign:
                owned = disk.own and found.path == sources[disk.name].found[-1].path
                foreign[found.path] = _found(found, layer_id(disk.name, next(numbers)), below, owned=owned)
            below = known or foreign[found.path]
        if disk.existing is None:
            below = _new(disk, layer_id(disk.name, next(numbers)), below, folder=folder, onto=overlays, images=images)
        assert below is not None
        active[disk.name] = below.id
    return DefinePlan(
        machine=machine.name,
        images=tuple(images),
        overlays=tuple(overlays),
        variables=str(home.variables(machine.name)) if variables else None,
        change=Change(
            define=machine, layers=(*foreign.values(), *images, *(overlay.layer for overlay in overlays)), active=active
        ),
    )


def serials_needed(spec: MachineSpec, sources: Mapping[str, DiskSource]) -> int:
    """How many serial numbers a plan takes: one per layer that is new to the store, at least one."""
    foreign = {
        found.path
        for source in sources.values()
        for found, known in zip(source.found, source.known, strict=True)
        if known is None
    }
    return max(1, len(foreign) + sum(disk.existing is None for disk in spec.disks))


def _found(found: FoundLayer, identity: LayerId, below: Layer | None, *, owned: bool) -> Layer:
    return Layer(
        id=identity,
        path=found.path,
        format=found.format,
        backing=below.id if below else None,
        virtual_size=found.header.virtual_size,
        **found.header.file_id,
        owned=owned,
        storage=found.storage,
    )


def _new(
    disk: DiskSpec, identity: LayerId, below: Layer | None, *, folder: Path, onto: list[Overlay], images: list[Layer]
) -> Layer:
    image_format = "qcow2" if below else disk.format
    layer = Layer(
        id=identity,
        path=str(folder / f"{identity}.{image_format}"),
        format=image_format,
        backing=below.id if below else None,
        virtual_size=max(disk.size or 0, below.virtual_size if below else 0),
    )
    if below:
        onto.append(Overlay(disk=disk.name, layer=layer, backing=below))
    else:
        images.append(layer)
    return layer


async def run(
    context: Context,
    spec: MachineSpec,
    *,
    folders: Sequence[Path] = (),
    allow_extra: bool = False,
    amend: Amend = as_it_is,
) -> Machine:
    """Define a machine; returns it as recorded.

    Raises:
        NameTaken: there is a machine of that name.
        ImageRefused: an image is not what the spec says, or not in an allowed folder.
        StateError: an image is written to by another machine.
    """
    spec, firmware = await complete(context, with_ports(spec), allow_extra=allow_extra)
    was_there = context.home.run_dir(spec.name).exists()  # a QEMU that this store does not know may live in it
    async with locked(context, spec.name, "define"):
        await end_earlier(context, spec.name)
        try:
            allowed = (context.home.data, *context.home.images, *folders)
            return await _record(context, spec, firmware, allowed, amend)
        except BaseException:
            # Refused or failed, there is no machine: what was made to work on it goes as well.
            forget_places(context.home, spec.name, run=not was_there)
            raise


def with_ports(spec: MachineSpec) -> MachineSpec:
    """The spec of a new machine, with root ports for what is attached to it later."""
    number = ROOT_PORTS if has_pcie(spec.machine) else 0
    return replace(spec, root_ports=number) if spec.root_ports is None else spec


async def complete(
    context: Context, spec: MachineSpec, *, allow_extra: bool, keep: bool = True
) -> tuple[MachineSpec, Firmware | None]:
    """The spec with its versioned machine type and CPU, and its firmware; ``keep`` caches QEMU's answers."""
    if spec.extra and not allow_extra:
        raise UsageError(
            f"the spec of {spec.name} has 'extra' QEMU arguments, which can override every protection",
            hint="accept them with " + option("allow_extra"),
        )
    spec = await bases.resolved(context, spec)
    abilities = await probe.ask(context.qemu, context.home.cache if keep else None, user=context.run_as)
    spec = replace(spec, machine=abilities.versioned(spec.machine), tcg_cpu=_tcg_cpu(spec, abilities))
    if spec.firmware != "uefi":
        return spec, None
    firmware = await to_read(uefi.chosen, spec)
    named = spec.uefi_code or spec.uefi_variables  # a store of variables is bound to its code
    return replace(spec, uefi_code=firmware.code if named else None), firmware


def _tcg_cpu(spec: MachineSpec, abilities: probe.Abilities) -> str:
    """What the default CPU is now: memory that is saved with ``max`` could not be loaded by the next QEMU."""
    return "" if spec.cpu or spec.accel == "kvm" else abilities.tcg_cpu


async def survey(context: Context, spec: MachineSpec, allowed: Sequence[Path]) -> tuple[Machine, dict[str, DiskSource]]:
    """The machine to be, and what lies under its disks already; images may lie in the folders ``allowed``."""
    await require_free_uuid(context, spec.name, spec.uuid)
    await to_read(lambda: boot_files.require(spec, context.home, allowed=allowed))
    sources = await disk_sources.read(context, spec, allowed)
    machine = Machine(
        name=spec.name,
        uuid=spec.uuid or str(uuid.uuid4()),
        host=context.host,
        spec=spec.recorded,
        created=time.time(),
        consent=agreed(spec),
    )
    return machine, sources


def agreed(spec: MachineSpec) -> Consent | None:
    """That this user has agreed to the spec's further arguments; None where it has none."""
    return Consent(extra=spec.extra, user=os.geteuid()) if spec.extra else None


async def require_free_uuid(context: Context, name: str, uuid: str) -> None:
    """Refuse the UUID of another machine; an empty one is none."""
    for other in await context.astore.machines() if uuid else ():
        if other.uuid == uuid:
            raise StateError(
                f"the UUID {uuid} of {name} is that of machine {other.name}",
                hint="undefine that machine: " + call("undefine", other.name) + "; or remove 'uuid' from a spec",
                machine=name,
            )


async def _record(
    context: Context, spec: MachineSpec, firmware: Firmware | None, allowed: Sequence[Path], amend: Amend
) -> Machine:
    basis = await context.astore.basis(spec.name)
    machine, sources = await survey(context, spec, allowed)
    abilities = await probe.ask(context.qemu, context.home.cache, user=context.run_as)
    machine = replace(machine, vmgenid=vmgenid.new() if abilities.vmgenid else None)

    def make(at: PlanInputs) -> DefinePlan:
        planned = plan(machine, sources, serial=at.serial, home=at.home, variables=firmware is not None)
        return amend(planned, sources, at.serial)

    variables = firmware.vars if firmware else None
    needed = serials_needed(spec, sources)
    return await record(context, machine, basis, make, serials=needed, firmware_variables=variables)


async def record(
    context: Context,
    machine: Machine,
    basis: Basis,
    make: Callable[[PlanInputs], DefinePlan],
    *,
    serials: int,
    firmware_variables: str | None = None,
) -> Machine:
    """Journal the plan of a new machine, make its files, record it; undone when that fails."""

    def make_free(at: PlanInputs) -> DefinePlan:
        planned = make(at)
        require_free([*(layer.path for layer in planned.created), *([planned.variables] if planned.variables else [])])
        return planned

    session = MachineSession(context, machine)
    operation = await begin(session, basis, make_free, serials=serials)
    async with recovery.attempting(session, operation):
        await _carry_out(context, operation, firmware_variables=firmware_variables)
    return await context.astore.machine(machine.name)


async def end_earlier(context: Context, name: str, *, adopts: bool = False) -> list[Operation]:
    """Refuse a taken name; end a definition or a removal that died and left no machine, and return it.

    With ``adopts`` an adopted machine that the store has lost is taken over again.
    """
    await _refuse_taken(context, name)
    placeholder = Machine(name=name, uuid="", host=context.host, spec=MachineSpec(name=name), created=0)
    ended = await recovery.end_open(MachineSession(context, placeholder))
    await blocking(lambda: _refuse_lost(context, name, adopts=adopts))
    return ended


async def require_new(context: Context, name: str, *, adopts: bool = False) -> None:
    """The same where no definition of it is open: nothing is ended."""
    await _refuse_taken(context, name)
    await blocking(lambda: _refuse_lost(context, name, adopts=adopts))


async def _refuse_taken(context: Context, name: str) -> None:
    try:
        taken = await context.astore.machine(name)
    except NotFoundError:
        return
    raise NameTaken(
        f"machine {name} has existed since {moment(taken.created)}",
        hint="choose another name, or undefine that machine: " + call("undefine", name),
        machine=name,
    )


async def undo(context: Context, name: str) -> list[Operation]:
    """End a definition or a removal that died and left no machine; returns its operation as it was.

    Raises:
        NotFoundError: there is neither such a machine nor an operation of that name that has not ended.
        LockHeld: it is at work.
    """
    if not await context.astore.operations(name, only_open=True):
        await context.astore.machine(name)
    async with locked(context, name, "recover"):
        ended = await end_earlier(context, name)
        await to_end(forget_places, context.home, name)
    return ended


def _refuse_lost(context: Context, name: str, *, adopts: bool) -> None:
    """A machine that the store has lost is not overwritten by another of its name."""
    folder, lost = context.home.machine_dir(name), context.store.records.remembered(name)
    images = folder.is_dir() and {*folder.iterdir()} - {context.home.record(name), *context.home.active(name)}
    if lost and images and not (adopts and lost.adopted):
        raise StoreMismatch(
            f"machine {name} was defined before and has images in {folder}, but this store lacks it",
            hint="rebuild the store: " + call("rebuild") + "; or choose another name",
            machine=name,
        )


async def _carry_out(context: Context, operation: Operation[DefinePlan], *, firmware_variables: str | None) -> None:
    plan = operation.plan
    folder = context.home.machine_dir(plan.machine)
    await to_read(require_folder, context.home, plan.machine)
    await to_end(files.make_folder, folder)
    headers: dict[LayerId, Header] = {}
    assert plan.change.define
    disks = {active: plan.change.define.require_disk(name) for name, active in plan.change.active.items()}
    for layer in plan.images:
        async with luks.for_images(context, plan.machine, disks[layer.id]) as key:
            headers[layer.id] = await context.image.create_base(
                layer.path, format=layer.format, virtual_size=layer.virtual_size, key=key
            )
    headers |= await make_overlays(context, plan.change.define, plan.overlays)
    if plan.variables and firmware_variables:
        await to_end(_copy_variables, firmware_variables, plan.variables)
    await context.astore.settle(operation.id, plan.machine, identified(plan.change, headers))


def _copy_variables(source: str, target: str) -> None:
    """Copy the firmware's variable store; whatever has appeared at ``target`` since the plan is not written to."""
    try:
        files.write_new(target, Path(source).read_bytes())
    except OSError as error:
        raise HostCannot(f"the variable store {target} cannot be created: {error.strerror}") from error
