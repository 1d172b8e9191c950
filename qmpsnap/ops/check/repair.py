"""What can be put right without losing anything; each finding by itself, and what cannot stays a finding."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image import verify
from qmpsnap.errors import HostCannot, QmpsnapError, StoreMismatch
from qmpsnap.host.files import inode_of, opened
from qmpsnap.host.threads import to_end
from qmpsnap.machine import agent
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.machine.templates import Shelf
from qmpsnap.model.finding import Finding
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base import luks, volumes
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.check import quarantine
from qmpsnap.ops.check.entries import Entry
from qmpsnap.ops.check.facts import AGENT_DEADLINE, Facts
from qmpsnap.ops.check.quarantine import Moved
from qmpsnap.ops.session import recovery
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.session import Monitor
from qmpsnap.store import owner


class Repairs(Struct, frozen=True):
    """Files that were moved, and what could not be done, one sentence each."""

    moved: tuple[Moved, ...]
    failed: tuple[str, ...]


async def repair(context: Context, at: Facts, qemu: Monitor | None, found: Sequence[Finding]) -> Repairs:
    """Do for each finding what its kind says, if it is one that we may; the machine's lock is held."""
    moved: list[Moved] = []
    failed: list[str] = []
    for finding in found:
        if not finding.repairable:
            continue
        try:
            if done := await _one(context, at, qemu, finding):
                moved.append(done)
        except QmpsnapError as error:
            failed.append(f"{finding.code}: {error.message}")
    return Repairs(tuple(moved), tuple(failed))


async def _one(context: Context, at: Facts, qemu: Monitor | None, finding: Finding) -> Moved | None:
    machine = at.record.machine
    match finding.code:
        case "record-missing":
            await blocking(context.store.records.write, machine.name)
        case "unreferenced-file" | "part-left" | "volume-left":
            return await _left(context, at, finding)
        case "mode-open":
            entry = next(entry for entry in at.private if entry.path == finding.file)
            await to_end(close_to_others, entry)
        case "home-open" | "template-damaged" if finding.file:
            await to_end(_elsewhere, finding, finding.file)
        case "image-leaks":
            layer = next(layer for layer in at.record.forest.layers.values() if layer.id == finding.layer)
            await blocking(context.store.frozen.forget, [layer.id])
            async with luks.for_layer(context, machine, layer) as key:
                await verify.give_back(layer, qemu_img=context.image.binary, key=key)
        case "size-differs":
            await _record_size(context, at, finding)
        case "worker-left":
            await recovery.end_helpers(context, machine)
        case "guest-frozen":
            await _thaw(context, machine)
        case _ if qemu:
            await _in_qemu(qemu, finding)
    return None


def _elsewhere(finding: Finding, path: str) -> None:
    """Put something right that is no machine's."""
    if finding.code == "template-damaged":
        Shelf(Path(path).parent).remove(Path(path).name)
    else:
        owner.close_to_others(path)


async def _record_size(context: Context, at: Facts, finding: Finding) -> None:
    """Record the header's size as the size of the disk for all later layers."""
    layer = next(layer for layer in at.record.forest.layers.values() if layer.id == finding.layer)
    found = at.headers[layer.id]
    assert not isinstance(found, str)
    change = Change(layers=(replace(layer, virtual_size=found.virtual_size),))
    await context.astore.apply(at.record.machine.name, change)


async def _in_qemu(qemu: Monitor, finding: Finding) -> None:
    if finding.job:
        await jobs.dismiss(qemu, finding.job)
    if finding.node:
        await commands.blockdev_del(qemu, finding.node)


async def _thaw(context: Context, machine: Machine) -> None:
    socket = context.home.run_dir(machine.name) / AGENT_SOCKET
    async with agent.connect(socket, machine=machine.name, deadline=AGENT_DEADLINE) as guest:
        await guest.execute("guest-fsfreeze-thaw", deadline=10)


async def _left(context: Context, at: Facts, finding: Finding) -> Moved | None:
    """Put what nobody knows aside; no storage can do that with a volume, so an unfinished one is removed."""
    if finding.code == "volume-left":
        volume = next(volume for volume in at.volumes if volume.path == finding.file)
        near = next(chain.base for chain in at.record.chains if volumes.is_near(volume, chain.base))
        await volumes.driver_of(near).remove(volume)
        return None
    entry = next(entry for entry in at.folder if entry.path == finding.file)
    return await to_end(quarantine.move, context.home, finding, entry)


def close_to_others(entry: Entry) -> None:
    """Take the rights of other users away from the very file that was looked at."""
    try:
        with opened(entry.path) as descriptor:
            status = os.fstat(descriptor)
            if inode_of(status) != entry.identity:
                raise StoreMismatch(f"{entry.path} was replaced by another file; it was not touched")
            os.fchmod(descriptor, 0o700 if stat.S_ISDIR(status.st_mode) else 0o600)
    except OSError as error:
        raise HostCannot(f"the mode of {entry.path} cannot be changed: {error.strerror}") from error
