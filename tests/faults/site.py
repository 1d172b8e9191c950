"""The smallest machine there is for a fault, what is known of it beforehand, and the verdict afterwards."""

import hashlib
import os
import subprocess
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from msgspec import Struct
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import OperationPending
from qmpsnap.model.home import ACTIVE, RECORD
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.faults import claims
from tests.live.machine import MIB, Hashes, context_of, fill, flush, hold_invariants

KIB = 1 << 10
SIZE = 2 * MIB
ONE = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=SIZE),), agent=False)
TWO = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=(DiskSpec(name="vda", size=SIZE), DiskSpec(name="vdb", size=SIZE, format="raw")),
    agent=False,
)
WITH_TPM = replace(ONE, firmware="uefi", tpm=True)
NAME = "still"
WAIT = 200.0
"""Seconds for the whole verdict, which takes one on an idle host."""


class Before(Struct, frozen=True):
    """What a machine was: its snapshots' and disks' content, what it did, and what a recovery must not lose."""

    hashes: Hashes
    disks: Mapping[str, str]
    state: str
    claimed: claims.Before


class Expected(Struct, frozen=True, kw_only=True):
    """What may be otherwise after a verb than before it.

    Attributes:
        loses: snapshots that it deletes or consumes.
        goes_to: the snapshot that the disks may stand at afterwards.
        ends: the machine may have been ended, or started again.
        place: names of files in the user's folder that may be there afterwards.
    """

    loses: frozenset[str] = frozenset()
    goes_to: str | None = None
    ends: bool = False
    place: frozenset[str] = frozenset()


def qemu_io() -> str:
    """The qemu-io that belongs to the qemu-img under test."""
    image = Path(os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img")
    return str(image.with_name("qemu-io")) if image.parent != Path() else "qemu-io"


async def write(vm: qmpsnap.MachineHandle, disk: str, pattern: int, *, offset: int = 0, length: int = 64 * KIB) -> None:
    """Write to a stopped machine's disk, durably, as its guest would have."""
    chains = context_of(vm).store.chains(vm.name)
    layer = next(chain.active for chain in chains if chain.disk == disk)
    line = f"write -q -P {pattern} {offset} {length}"
    argv = [qemu_io(), "-f", layer.format, "-t", "writeback", "-c", line, layer.path]
    done = await to_thread.run_sync(lambda: subprocess.run(argv, check=True, capture_output=True))
    assert not done.stdout, done.stdout


async def write_live(vm: qmpsnap.MachineHandle, disk: str, pattern: int, *, offset: int) -> None:
    """Write to a running machine's disk and flush, as its guest would have."""
    await fill(vm, disk, pattern, offset=offset, length=64 * KIB)
    await flush(vm, disk)


async def grow(vm: qmpsnap.MachineHandle, *names: str, first: int = 64 * KIB) -> None:
    """Snapshots of a stopped machine with something of its own before each, and more after the last.

    ``first`` bytes lie in the lowest layer.
    """
    disks = [disk.name for disk in (await vm.record()).spec.disks]
    for number, name in enumerate((*names, None), start=1):
        for disk in disks:
            await write(vm, disk, number, offset=number * 64 * KIB, length=first if number == 1 else 64 * KIB)
        if name:
            await vm.snapshot(name)


async def look(vm: qmpsnap.MachineHandle) -> Before:
    """Before the fault; a machine that runs has written nothing that is not on its disks."""
    return Before(await _snapshot_hashes(vm), await disk_hashes(vm), await vm.state(), claims.look(vm))


async def _snapshot_hashes(vm: qmpsnap.MachineHandle, *, but: Collection[str] = ()) -> Hashes:
    return {
        (snapshot.name, point.disk): await _hash(vm, context_of(vm).store.layer(point.layer), tag=point.tag)
        for snapshot in await vm.snapshots()
        if snapshot.state == "ok" and snapshot.name not in but
        for point in snapshot.points
    }


async def disk_hashes(vm: qmpsnap.MachineHandle) -> dict[str, str]:
    """What every disk reads as on its file system; only what is flushed counts."""
    return {chain.disk: await _hash(vm, chain.active) for chain in context_of(vm).store.chains(vm.name)}


async def _hash(vm: qmpsnap.MachineHandle, layer: Layer, *, tag: str | None = None) -> str:
    """Of what it reads as up to its last byte that is not zero: a disk that has grown reads as it did."""
    context = context_of(vm)
    copy = context.home.data / "copy"
    inside = ["-l", f"snapshot.name={tag}"] if tag else []
    argv = [context.image.binary, "convert", "-U", "-f", layer.format, *inside, "-O", "raw", layer.path, str(copy)]
    try:
        await to_thread.run_sync(lambda: subprocess.run(argv, check=True, capture_output=True))
        return hashlib.sha256(copy.read_bytes().rstrip(b"\0")).hexdigest()
    finally:
        copy.unlink(missing_ok=True)


def _inode(file: Path) -> int:
    """Which file it is; the machine's record is written anew when it says the same."""
    return 0 if file.name in (RECORD, *ACTIVE) else file.stat().st_ino


async def picture(vm: qmpsnap.MachineHandle, place: Path) -> dict[str, Any]:
    """All that a second recovery must leave as it is."""
    context = context_of(vm)
    folders = (context.home.machine_dir(vm.name), place)
    return {
        "record": await vm.record(),
        "snapshots": await vm.snapshots(),
        "chains": context.store.chains(vm.name),
        "journal": context.store.operations(vm.name),
        "files": sorted((str(file), _inode(file)) for folder in folders for file in folder.iterdir()),
        "state": await vm.state(),
    }


async def recover(vm: qmpsnap.MachineHandle) -> None:
    """End what is open; a job that still works is waited for, as the error says."""
    try:
        await vm.recover()
    except OperationPending as error:
        if f"qmpsnap job wait {vm.name}" not in as_typed(error.hint):
            raise
        await vm.wait()


async def judge(
    vm: qmpsnap.MachineHandle,
    place: Path,
    before: Before,
    expected: Expected,
    *,
    also: Callable[[], Awaitable[None]] | None = None,
    then: bool = True,
) -> None:
    """Recover, twice; then every invariant, and ``also``; ``then`` the machine works on. Raises what is violated."""
    claims.hold_error(vm, before.claimed)
    with anyio.fail_after(WAIT):  # I10
        await recover(vm)
        claims.hold_log(vm, before.claimed)
        once = await picture(vm, place)
        await vm.recover()
        assert await picture(vm, place) == once, "I8: a second recovery changed something"
        await _hold(vm, place, before, expected)
        if also:
            await also()
        if then:
            await works_on(vm, before, expected)


async def _hold(vm: qmpsnap.MachineHandle, place: Path, before: Before, expected: Expected) -> None:
    ok = {snapshot.name for snapshot in await vm.snapshots() if snapshot.state == "ok"}
    lost = {name for name, _ in before.hashes} - ok - expected.loses
    assert not lost, f"I1: {lost} are gone, which nobody asked for"
    now = await _snapshot_hashes(vm)
    changed = {key for key, found in before.hashes.items() if key[0] in ok and now[key] != found}
    assert not changed, f"I1: {changed} do not read as they did"
    await hold_invariants(vm)
    layers = {len(chain.layers) for chain in context_of(vm).store.chains(vm.name)}
    assert len(layers) == 1, "I7: the disks are not all at the same point"
    _no_tag_is_left(vm)
    made = {file.name for file in place.iterdir()}
    assert made <= expected.place, f"I3: {made - expected.place} was left in the user's folder"
    state = await vm.state()
    if state != "stopped" and not expected.ends:
        assert state == before.state, f"I10: the guest is left {state}"


def _no_tag_is_left(vm: qmpsnap.MachineHandle) -> None:
    forest = context_of(vm).store.forest()
    for layer in forest.layers.values():
        inside = header.read(layer.path, format=layer.format).internal_snapshots if layer.format == "qcow2" else 0
        named = sum(reference.tag is not None for reference in forest.references_to(layer.id))
        assert inside == named, f"I6: layer {layer.id} has {inside} tags inside, and {named} are snapshots"


async def works_on(vm: qmpsnap.MachineHandle, before: Before, expected: Expected) -> None:
    """A snapshot can be taken, and the disks read as they did. Raises what is violated."""
    if before.state != "stopped" and not await vm.is_running():
        await vm.start(paused=True)
    await vm.snapshot("afterwards")
    if await vm.is_running():
        await vm.stop(force=True)
    now = await disk_hashes(vm)
    allowed = [dict(before.disks)]
    if expected.goes_to:
        allowed.append({disk: found for (name, disk), found in before.hashes.items() if name == expected.goes_to})
    assert now in allowed, "I2: a disk does not read as it did"
    await hold_invariants(vm)
