"""``set`` and ``define --update``: a stopped machine gets another spec, and keeps its disks and snapshots.

A snapshot with memory loads only into the hardware that it was taken with. The store keeps the spec of that time, and a
revert can bring it back.
"""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import StateError, UsageError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_read
from qmpsnap.machine.starting.root_ports import without_lost
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import differences
from qmpsnap.model.machines import spec_differences
from qmpsnap.model.machines.record import Consent, Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base.context import Context, require_spec
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.lifecycle import boot_files, define
from qmpsnap.ops.memory.load import hardware_to_start
from qmpsnap.ops.session.session import looking, working

CONTENT = ("size", "image", "device", "rbd", "base", "format", "own", "encryption")
"""What a disk is made of: other verbs change that."""

_ONCE = frozenset({"profile", "uefi-variables"})
"""Keys that only ``define`` goes by; so is ``uuid``, of which it is known what it was."""

Make = Callable[[MachineSpec], MachineSpec]
"""Makes the new spec of the present one."""


def made(settings: Mapping[str, str] | MachineSpec, *, guest_dir: Path) -> Make:
    """How the new spec is made: of values by key, or it is that one."""
    from qmpsnap.machine.config import specfile  # YAML is slow to load

    if isinstance(settings, MachineSpec):
        whole = specfile.checked(settings, folder=Path.cwd(), guest_dir=guest_dir)
        return lambda old: replace(whole, tcg_cpu=old.tcg_cpu).plugged_as(old)
    if found := sorted(settings.keys() & _ONCE):
        raise UsageError(f"{found[0]!r} is for new machines", hint="set other keys, or define another machine")
    return lambda old: specfile.changed(old, settings, folder=Path.cwd(), guest_dir=guest_dir)


class Changed(Struct, frozen=True, kw_only=True):
    """How a machine's spec is changed.

    Attributes:
        machine: with its new spec.
        changes: what is otherwise: key, value before, value now; None where a key has its default.
        unloadable: names of the snapshots whose memory fits the new hardware no more, and why.
    """

    machine: Machine
    changes: tuple[tuple[str, object, object], ...]
    unloadable: tuple[tuple[str, tuple[str, ...]], ...]


async def preview(context: Context, name: str, make: Make, *, allow_extra: bool = False) -> Changed:
    """What :func:`run` would do now; locks and changes nothing."""
    async with looking(context, name) as session:
        return await _plan(session, make, allow_extra=allow_extra, keep=False)


async def run(context: Context, name: str, make: Make, *, allow_extra: bool = False) -> Changed:
    """Record another spec; the next start goes by it.

    Raises:
        StateError: the machine runs, or is adopted, or its disks would be others.
        ImageRefused: a new kernel, initrd, CD image or file for cloud-init is not there, or is none.
        UsageError: the spec has ``extra`` arguments that nobody has agreed to.
    """
    async with working(context, name, "set") as session:
        found = await _plan(session, make, allow_extra=allow_extra, keep=True)
        if found.changes:
            machine = found.machine
            await context.astore.apply(name, Change(spec=machine.spec, consent=machine.consent))
        return replace(found, machine=await context.astore.machine(name))


async def _plan(session: MachineSession, make: Make, *, allow_extra: bool, keep: bool) -> Changed:
    context, machine = session.context, session.machine
    require_spec(machine, "change its hardware")
    spec = without_lost(make(machine.spec))
    if spec.uuid not in ("", machine.uuid):
        raise UsageError(
            f"the UUID of machine {machine.name} is {machine.uuid} and cannot be changed",
            hint="set 'uuid' to that, or leave it out",
            machine=machine.name,
        )
    spec = spec.recorded
    require_changeable(machine.spec, spec)
    if session.qemu:
        raise StateError(
            f"machine {machine.name} runs, and its QEMU has the hardware that it was started with",
            hint="stop it first: " + call("stop", machine.name),
            machine=machine.name,
        )
    await to_read(lambda: boot_files.require(_news(machine.spec, spec), context.home))
    agreed = machine.consent
    if spec.extra != machine.spec.extra:
        agreed = Consent(extra=spec.extra, user=os.geteuid())
    elif spec.extra and not allow_extra:
        allow_extra = agreed is not None and agreed.covers(spec.extra, user=os.geteuid())
    whole, _ = await define.complete(context, spec, allow_extra=allow_extra, keep=keep)
    if (spec.cpu, spec.accel) == (machine.spec.cpu, machine.spec.accel):
        whole = replace(whole, tcg_cpu=machine.spec.tcg_cpu)  # a newer QEMU's is another
    after = replace(machine, spec=whole, consent=agreed)
    snapshots = await context.astore.snapshots(machine.name)
    return Changed(
        machine=after,
        changes=tuple(spec_differences.changes(machine.spec, whole)),
        unloadable=tuple([each async for each in unloadable(context, machine, after, snapshots)]),
    )


def _news(old: MachineSpec, new: MachineSpec) -> MachineSpec:
    """The spec without those boot files that stay: one of them that has gone is the next start's to tell."""
    return replace(
        new,
        kernel=new.kernel if new.kernel != old.kernel else None,
        initrd=new.initrd if new.initrd != old.initrd else None,
        cdrom=new.cdrom if new.cdrom != old.cdrom else None,
        cloud_init=new.cloud_init if new.cloud_init != old.cloud_init else None,
    )


def require_changeable(old: MachineSpec, new: MachineSpec) -> None:
    """Refuse what is not a matter of the spec alone; pure.

    Raises:
        UsageError: another name, firmware or disk, or a disk of another content.
    """
    if new.name != old.name:
        raise UsageError(f"the spec is of machine {new.name}, not of {old.name}", hint="set 'name' to the machine's")
    if new.firmware != old.firmware:
        raise UsageError(
            f"the firmware of machine {old.name} cannot be changed from {old.firmware} to {new.firmware}: its guest was"
            " installed for it",
            hint="define another machine with the same disks",
        )
    if [disk.name for disk in new.disks] != [disk.name for disk in old.disks]:
        raise UsageError(
            f"machine {old.name} has the disks {', '.join(disk.name for disk in old.disks) or 'none'}, the new spec"
            f" {', '.join(disk.name for disk in new.disks) or 'none'}",
            hint="keep the disks and their order",
        )
    for before, after in zip(old.disks, new.disks, strict=True):
        _require_same_content(old.name, before, after)


def _require_same_content(machine: str, before: DiskSpec, after: DiskSpec) -> None:
    for key in CONTENT:
        if getattr(before, key) != getattr(after, key):
            hint = call("resize", machine, before.name, "SIZE") + " changes the size" if key == "size" else ""
            raise UsageError(f"{key} of disk {before.name} of machine {machine} cannot be changed", hint=hint)


async def unloadable(
    context: Context, machine: Machine, after: Machine, snapshots: tuple[Snapshot, ...]
) -> AsyncIterator[tuple[str, tuple[str, ...]]]:
    """The snapshots whose memory fits a machine as it is, and no more as it is to be; and why not."""
    with_memory = [snapshot for snapshot in snapshots if snapshot.hardware]
    if not with_memory:
        return
    before, now = await hardware_to_start(context, machine), await hardware_to_start(context, after)
    for snapshot in with_memory:
        assert snapshot.hardware
        if (why := differences(snapshot.hardware, now)) and not differences(snapshot.hardware, before):
            yield snapshot.name, why
