"""Guests that count on two disks at once, record by record and flushed; and what snapshots hold of that."""

from pathlib import Path

import anyio
from anyio import to_thread

import qmpsnap
from qmpsnap.block.image import content
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Snapshot
from tests.live.machine import MIB, context_of

_COUNT = (
    "n=0; while :; do n=$((n+1)); for f in {files}; do printf '%015d\\n' $n |"
    " dd of=$f bs=16 seek=$n conv=notrunc,fsync 2>/dev/null; done; done"
)
_MOUNT = (
    "mkfs.ext4 -q -E lazy_itable_init=0 /dev/{disk} && mkdir -p /mnt/{disk} && mount -t ext4 /dev/{disk} /mnt/{disk}"
)
DISKS = ("vda", "vdb")


async def count(vm: qmpsnap.MachineHandle, *, in_files: bool = False) -> None:
    """Let the guest count on both disks: on the devices themselves, or in a file of a file system on each."""
    if in_files:
        await vm.run(" && ".join([*(_MOUNT.format(disk=disk) for disk in DISKS), "sync"]), timeout=60)
    files = " ".join(f"/mnt/{disk}/file" if in_files else f"/dev/{disk}" for disk in DISKS)
    await vm.run(f"({_COUNT.format(files=files)}) >/dev/null 2>&1 &")


async def counted(vm: qmpsnap.MachineHandle, snapshot: Snapshot, folder: Path, *, in_files: bool = False) -> list[int]:
    """The last record on each disk of a snapshot."""
    layers = [context_of(vm).store.layer(point.layer) for point in snapshot.points]
    return [await counter(vm, layer, folder, in_file=in_files) for layer in layers]


async def counter(vm: qmpsnap.MachineHandle, layer: Layer, folder: Path, *, in_file: bool = False) -> int:
    """The last record in a layer; every record before it must be there, and whole, and a file system clean."""
    copy = folder / "copy"
    length = None if in_file else 1 * MIB
    await content.copy_out(layer, copy, length=length, qemu_img=context_of(vm).image.binary)
    if in_file:
        features = (await anyio.run_process(["debugfs", "-R", "features", copy])).stdout.decode()
        assert "needs_recovery" not in features
        await anyio.run_process(["e2fsck", "-fn", copy])
        await anyio.run_process(["debugfs", "-R", f"dump /file {folder / 'file'}", copy])
        copy = folder / "file"
    records = (await to_thread.run_sync(copy.read_bytes))[16:].rstrip(b"\0").decode().split()
    assert records == [f"{number:015d}" for number in range(1, len(records) + 1)]
    return len(records)


def hold_one_instant(counts: list[list[int]]) -> None:
    """Of each snapshot the disks differ by the record in flight at most, and the later ones have more records."""
    assert all(first - second in (0, 1) for first, second in counts), counts
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
