"""In the guest: a machine that appends a counter to two disks, one after the other, while its volumes are snapshotted.

Its guest is a boot sector, as no Linux runs in an emulator in an emulator: each record is a sector of its own, and is
written through (``cache: writethrough``) to the logical volume first and to the qcow2 file on xfs then.
"""

import json
import os
import struct
import subprocess
from pathlib import Path

import anyio

import qmpsnap
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec

from .conftest import tool
from .machine import MIB, case, home, made, whole

__all__ = ["home"]

SECTOR = 512
RECORDS = 1 << 14
"""Sectors behind the first one, after which the counter begins again at the first of them."""
SNAPSHOTS = 20
_APPENDS = bytes.fromhex(
    "31c08ed88ec08ed0bc007c"  # segments and stack
    "66ff060080 66a10080 6625ff3f0000 6640 66a3087e"  # the counter at 0x8000, the sector's number
    "66c706007e10000100 66c706047e00800000 66c7060c7e00000000"  # one sector from 0x8000
    "b280e80700 b281e80200 ebc4"  # to the first disk, to the second, again
    "be007e b80043 cd13 72f6 c3"  # the BIOS writes a sector
)


def _boot_sector() -> bytes:
    return _APPENDS.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def _last(content: bytes) -> int:
    """The highest counter; every record before it has to be there, and none may be torn."""
    found = [content[at : at + SECTOR] for at in range(SECTOR, (RECORDS + 1) * SECTOR, SECTOR)]
    assert all(not record[4:].strip(b"\0") for record in found), "a record is torn"
    numbers = [struct.unpack_from("<I", record)[0] for record in found]
    last: int = max(numbers)
    assert [numbers[number % RECORDS] for number in range(max(1, last - RECORDS + 2), last + 1)] == list(
        range(max(1, last - RECORDS + 2), last + 1)
    ), "a record before the last one lacks"
    return last


def _of_volume(path: str) -> int:
    with Path(path).open("rb") as device:
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _last(device.read((RECORDS + 1) * SECTOR))


def _of_file(path: str) -> int:
    raw = Path("/dev/shm/raw")
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, str(raw)], check=True)
    return _last(raw.read_bytes())


async def _advances(path: str, last: int) -> int:
    """Until the guest has written more; the volume is written through, so that its device shows it."""
    with anyio.fail_after(400):
        while (now := _of_volume(path)) <= last:
            await anyio.sleep(0.2)
    return now


def _spec(path: str) -> MachineSpec:
    disks = (
        DiskSpec(name="vda", device=path, cache="writethrough"),
        DiskSpec(name="vdb", size=16 * MIB, cache="writethrough"),
    )
    return MachineSpec(name="web", memory=32 * MIB, disks=disks, agent=False)


async def _counters() -> None:
    tool("modprobe", "xfs")
    Path("/mnt/xfs").mkdir(parents=True, exist_ok=True)
    tool("mount", "-t", "xfs", "/dev/vde", "/mnt/xfs")
    os.environ["QMPSNAP_HOME"] = "/mnt/xfs"
    path = made("web", thin=True)
    Path("/dev/shm/boot").write_bytes(_boot_sector())
    tool("dd", "if=/dev/shm/boot", f"of={path}", "conv=fsync")
    seen: dict[str, tuple[int, int]] = {}
    pauses = []
    async with qmpsnap.open() as q:
        vm = await q.define(_spec(path))
        await vm.start()
        last = await _advances(path, 0)
        for number in range(SNAPSHOTS):
            taken = await vm.snapshot(f"s{number}", kind="volume")
            pauses.append(taken.pause_ms)
            last = await _advances(path, last)
        await vm.stop(force=True)
        assert [len(chain.layers) for chain in await vm.chains()] == [1, 1]
        assert (await vm.chains())[0].active.path == path
        for snapshot in await vm.snapshots():
            files = [vm._context.store.layer(point.layer).path for point in snapshot.points]
            seen[snapshot.name] = (_of_volume(files[0]), _of_file(files[1]))
        Path("/tmp/work/out/counters.json").write_text(json.dumps({"counters": seen, "pause_ms": pauses}))
        assert len(seen) == SNAPSHOTS
        assert all(second in (first, first - 1) for first, second in seen.values()), seen
        assert sorted(seen.values()) == list(seen.values()), "a later snapshot holds less"
        await whole(vm)
        for name in ("s3", f"s{SNAPSHOTS - 1}"):
            assert (await vm.revert(name)).kept
            first, second = [chain.active.path for chain in await vm.chains()]
            assert (_of_volume(first), _of_file(second)) == seen[name]
        await whole(vm)
        await vm.undefine(disks="remove")
    tool("umount", "/mnt/xfs")


test_snapshots_of_an_appending_guest_differ_by_the_record_in_flight = case(_counters)
