"""``adopt --take``: an adopted machine gets a spec, and qmpsnap launches its QEMU once the owner's has ended.

The owner's command line is only a proposal, in a spec that people read: a guest that has broken out of its QEMU can
have rewritten it. What is recorded is the spec that was agreed to, and the command line is not read again.
"""

import os
from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import StateError, UsageError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_read
from qmpsnap.imports import argv
from qmpsnap.imports.argv_words import Places
from qmpsnap.imports.found import Imported
from qmpsnap.machine import originals
from qmpsnap.machine.starting import probe
from qmpsnap.model.machines.adoption import Taken
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, require_own
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.lifecycle import boot_files, define
from qmpsnap.ops.lifecycle.change import CONTENT
from qmpsnap.ops.session import taken
from qmpsnap.ops.session.session import looking, working


class TakePlan(Struct, frozen=True, kw_only=True):
    """How a machine is taken from its owner.

    Attributes:
        machine: its name.
        spec: what qmpsnap launches it by.
        variables: the owner's store of UEFI variables, which is copied; None with a BIOS.
        waits_for: the process that has to end first; None where none runs.
    """

    machine: str
    spec: MachineSpec
    variables: str | None = None
    waits_for: int | None = None


async def proposed(context: Context, name: str) -> Imported:
    """What the command line of an adopted machine's QEMU says, as a spec of the machine; locks and changes nothing.

    Raises:
        StateError: the machine is not adopted, or its QEMU has ended.
        UsageError: the command line is none of a QEMU of x86, or names files that carry further options.
    """
    machine = await context.astore.machine(name)
    require_own(context, machine)
    _require_adopted(machine)
    process = await blocking(context.process, machine)
    if process is None:
        raise StateError(
            f"the QEMU of machine {name} has ended, and its command line with it",
            hint="write a spec with the disks that " + call("chains", name) + " shows",
            machine=name,
        )
    words, folder, opened = await to_read(originals.launched, process.pid)
    found = argv.read(words, places=Places(folder, opened), name=name, runs=f"it is process {process.pid}")
    return await to_read(fitted, machine, found)


def fitted(machine: Machine, found: Imported) -> Imported:
    """The spec of a command line with the disks that the machine has, and the hardware that QEMU told of."""
    pairs = _paired(machine.spec.disks, found.spec.disks)
    order = {disk.name: number for number, disk in enumerate(found.spec.disks)}
    last = len(order)
    disks = sorted(machine.spec.disks, key=lambda disk: order[pairs[disk.name].name] if disk.name in pairs else last)
    told = {disk.name for disk in pairs.values()}
    return replace(
        found,
        spec=replace(
            found.spec,
            uuid=machine.uuid,
            machine=machine.spec.machine,
            accel=machine.spec.accel,
            cpus=machine.spec.cpus,
            memory=machine.spec.memory,
            disks=tuple(_merged(disk, pairs.get(disk.name)) for disk in disks),
        ),
        changed=(
            *found.changed,
            *(
                f"disk {disk.name}: the command line does not say how it is attached; virtio is assumed"
                for disk in disks
                if disk.name not in pairs
            ),
        ),
        left_out=(
            *found.left_out,
            *(f"disk {disk.name}: it was not adopted" for disk in found.spec.disks if disk.name not in told),
        ),
    )


def _merged(disk: DiskSpec, told: DiskSpec | None) -> DiskSpec:
    """A disk with its images as they were adopted, attached and opened as the command line says."""
    own = replace(disk, opened=None)
    return replace(own, bus=told.bus, cache=told.cache, discard=told.discard) if told else own


def _paired(ours: Sequence[DiskSpec], theirs: Sequence[DiskSpec]) -> Mapping[str, DiskSpec]:
    """The disk of the command line for each of the machine's: that of the same image, or else of the same name."""
    left, found = list(theirs), dict[str, DiskSpec]()
    for same in (_same_image, lambda one, other: one.name == other.name):
        for disk in ours:
            match = None if disk.name in found else next((other for other in left if same(disk, other)), None)
            if match:
                found[disk.name] = match
                left.remove(match)
    return found


def _same_image(one: DiskSpec, other: DiskSpec) -> bool:
    path, told = one.image or one.device, other.image or other.device
    return bool(path and told) and os.path.realpath(path or "") == os.path.realpath(told or "")


async def preview(context: Context, name: str, spec: MachineSpec, *, allow_extra: bool = False) -> TakePlan:
    """What :func:`run` would record now; locks and changes nothing."""
    async with looking(context, name) as session:
        return await _plan(session, spec, allow_extra=allow_extra, keep=False)


async def run(context: Context, name: str, spec: MachineSpec, *, allow_extra: bool = False) -> TakePlan:
    """Record by which spec qmpsnap launches the machine; it is our own as soon as the owner's QEMU has ended.

    Raises:
        StateError: the machine is not adopted.
        UsageError: the spec is another machine's, has other disks, or ``extra`` arguments that nobody has agreed to.
        ImageRefused: a kernel, initrd, CD image or file for cloud-init is not there, or is none.
    """
    async with working(context, name, "adopt") as session:
        plan = await _plan(session, spec, allow_extra=allow_extra, keep=True)
        adopted = session.machine.adopted
        assert adopted
        abilities = await probe.ask(context.qemu, context.home.cache, user=context.run_as)
        then = Taken(spec=plan.spec, variables=plan.variables, vmgenid=abilities.vmgenid)
        change = Change(adopted=replace(adopted, taken=then), consent=define.agreed(plan.spec))
        await context.astore.apply(name, change)
        await blocking(lambda: taken.settle(context, context.store.machine(name)))
        return plan


async def _plan(session: MachineSession, spec: MachineSpec, *, allow_extra: bool, keep: bool) -> TakePlan:
    context, machine = session.context, session.machine
    _require_adopted(machine)
    _require_same(machine, spec)
    await to_read(boot_files.require, spec, context.home)
    whole, firmware = await define.complete(context, spec, allow_extra=allow_extra, keep=keep)
    return TakePlan(
        machine=machine.name,
        spec=whole.recorded,
        variables=firmware.vars if firmware else None,
        waits_for=machine.process.pid if session.qemu and machine.process else None,
    )


def _require_adopted(machine: Machine) -> None:
    if machine.adopted is None:
        raise StateError(
            f"machine {machine.name} was not adopted: qmpsnap launches its QEMU already",
            hint="to change its hardware: " + call("set", machine.name, "KEY=VALUE"),
            machine=machine.name,
        )


def _require_same(machine: Machine, spec: MachineSpec) -> None:
    """Refuse the spec of another machine, or of other disks; pure."""
    if (spec.name, spec.uuid or machine.uuid) != (machine.name, machine.uuid):
        raise UsageError(
            f"the spec is of machine {spec.name}{f' with UUID {spec.uuid}' if spec.uuid else ''}, not of {machine.name}"
            f" ({machine.uuid})",
            machine=machine.name,
        )
    ours, theirs = ({disk.name: disk for disk in disks} for disks in (machine.spec.disks, spec.disks))
    if ours.keys() != theirs.keys():
        raise UsageError(
            f"machine {machine.name} has the disks {', '.join(ours)}, the spec {', '.join(theirs) or 'none'}",
            hint="keep the disks; their order may be another one",
            machine=machine.name,
        )
    for name, disk in ours.items():
        for key in CONTENT:
            if getattr(disk, key) != getattr(theirs[name], key):
                raise UsageError(
                    f"{key} of disk {name} of machine {machine.name} cannot be changed",
                    hint="keep what it was adopted with: " + call("launched_as", machine.name),
                    machine=machine.name,
                )
