"""Snapshots of the disks alone, and the merges that undo them, of a layer that has next to nothing in it."""

import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import qmpsnap
from tests.bench import bare, guests
from tests.bench.measure import Way, clock
from tests.bench.program import QEMU_IMG, Sample
from tests.bench.setting import Setting, command

DEPTHS = (1, 5, 10, 100, 200)
DEEP = {f"create-depth-{depth}": depth for depth in DEPTHS}
BOOTED = ("create", "commit", "stream")
MEASURES = (*BOOTED, *DEEP)


async def measure(at: Setting) -> None:
    """Time them."""
    async with qmpsnap.open() as q:
        if at.results.wants(*BOOTED):
            await _booted(at, q)
        if at.results.wants(*DEEP):
            async with guests.started(q, guests.still("deep")) as vm:
                for number, (measure, depth) in enumerate(DEEP.items()):
                    if at.results.wants(*list(DEEP)[number:]):
                        await _grow(vm, depth)
                        await at.results.compare(measure, {"library": _create(vm), "bare": _bare(at, vm)})


async def _booted(at: Setting, q: qmpsnap.Controller) -> None:
    """The guest of either, booted and idle."""
    domain(at, "guest")
    async with guests.booted(q, "guest") as vm:
        at.virt.virsh("start", "guest")
        guests.answers(at.virt.agent_of("guest"))
        await at.results.compare("create", {"qmpsnap": _command(vm), "virsh": _virsh_create(at)})
        commits = {"qmpsnap": _merge(vm, command("commit", "guest", "vda")), "virsh": _virsh_commit(at)}
        commits["library"] = _merge(vm, _library(lambda: vm.commit("vda")))
        await at.results.compare("commit", commits)
        streams = {"qmpsnap": _merge(vm, command("stream", "guest", "vda")), "virsh": _virsh_stream(at)}
        streams["library"] = _merge(vm, _library(lambda: vm.stream("vda")))
        await at.results.compare("stream", streams)
        at.virt.virsh("destroy", "guest")


def domain(at: Setting, name: str) -> Path:
    """A domain of libvirt's that boots the small guest from a new disk."""
    disk = at.folder_for(f"domain-{name}") / "disk.qcow2"
    subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    at.virt.define(name, disk, memory=256, accel=at.accel, boots=True)
    return disk


# --- a snapshot of a guest that runs ----------------------------------------------------------------------------------


def _command(vm: qmpsnap.MachineHandle) -> Way:
    async def way() -> Sample:
        sample = await command("snapshot", "create", "guest", "s")()
        await vm.delete_snapshots("s")
        return sample

    return way


def _virsh_create(at: Setting) -> Way:
    async def way() -> Sample:
        sample = at.virt.timed("snapshot-create-as", "guest", "s", "--disk-only", "--atomic")
        undo_virsh(at, "guest", "s")
        return sample

    return way


def undo_virsh(at: Setting, name: str, snapshot: str) -> None:
    """Merge the overlay of a snapshot of libvirt's back, and forget the snapshot."""
    overlay = at.virt.disk_of(name)
    at.virt.virsh("blockcommit", name, "vda", "--active", "--pivot", "--shallow", "--wait")
    at.virt.virsh("snapshot-delete", name, snapshot, "--metadata")
    overlay.unlink()


# --- merges -----------------------------------------------------------------------------------------------------------


def _merge(vm: qmpsnap.MachineHandle, merge: Way) -> Way:
    """A merge of two layers, the upper with 64 KiB; what adds it is not timed."""

    async def way() -> Sample:
        await vm.add_layers()
        await guests.write_little(guests.monitor_of("guest"))
        sample = await merge()
        assert len((await vm.chains())[0].layers) == 1
        return sample

    return way


def _library(call: Callable[[], Awaitable[object]]) -> Way:
    async def way() -> Sample:
        with clock() as sample:
            await call()
        return sample

    return way


def _virsh_commit(at: Setting) -> Way:
    async def way() -> Sample:
        overlay = await _virsh_overlay(at)
        sample = at.virt.timed("blockcommit", "guest", "vda", "--active", "--pivot", "--wait")
        overlay.unlink()
        return sample

    return way


def _virsh_stream(at: Setting) -> Way:
    async def way() -> Sample:
        below = at.virt.disk_of("guest")
        await _virsh_overlay(at)
        sample = at.virt.timed("blockpull", "guest", "vda", "--wait")
        below.unlink()
        return sample

    return way


async def _virsh_overlay(at: Setting) -> Path:
    at.virt.virsh("snapshot-create-as", "guest", "s", "--disk-only", "--atomic", "--no-metadata", *_place(at))
    await guests.write_little(at.virt.monitor_of("guest"))
    return at.virt.disk_of("guest")


def _place(at: Setting) -> tuple[str, ...]:
    """A name of its own for the next overlay: libvirt would cut the last one's off, and meet it again."""
    now = at.virt.disk_of("guest")
    return "--diskspec", f"vda,file={now.parent}/{'even' if now.stem != 'even' else 'odd'}.qcow2"


# --- at a depth, as a library call ------------------------------------------------------------------------------------


async def _grow(vm: qmpsnap.MachineHandle, depth: int) -> None:
    """Give the machine's disk so many layers."""
    for number in range(len((await vm.chains())[0].layers), depth):
        await vm.snapshot(f"d{number}")


def _create(vm: qmpsnap.MachineHandle) -> Way:
    async def way() -> Sample:
        with clock() as sample:
            await vm.snapshot("s")
        await vm.delete_snapshots("s")
        return sample

    return way


def _bare(at: Setting, vm: qmpsnap.MachineHandle) -> Way:
    async def way() -> Sample:
        socket, overlay = guests.monitor_of(vm.name), str(at.folder / "bare.qcow2")
        node, image = await guests.active(vm)
        with clock() as sample:
            await bare.create(socket, node, image, "16M", overlay)
        await bare.commit(socket, node, bare.OVERLAY, overlay)
        return sample

    return way
