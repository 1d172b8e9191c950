"""Adopt a QEMU that something else started, and take its first snapshot; the guest does not notice.

Usage: python adopt_running.py NAME SOCKET

SOCKET is a QMP monitor that no other program is connected to, as from `-qmp unix:SOCKET,server=on,wait=off`.
"""

import asyncio
import sys

import qmpsnap


async def main(name: str, socket: str) -> None:
    """Adopt the QEMU as the machine ``name``."""
    async with qmpsnap.open() as q:
        found, _ = (await q.plan_adopt(name, socket)).details  # changes nothing
        for disk in found.disks:
            print(f"disk {disk.name}: {disk.backend} in QEMU, {'read-only' if disk.read_only else 'writable'}")
        for reason in found.left_out:
            print(f"not a disk: {reason}")

        vm = await q.adopt(name, socket)
        snapshot = await vm.snapshot("adopted", description="as it was found")
        print(f"took {snapshot.name} of {', '.join(point.disk for point in snapshot.points)}")

        # From now on the guest writes to new layers. Whoever starts this QEMU has to name these files.
        for chain in await vm.chains():
            print(f"start {chain.disk} on {chain.layers[-1].layer.path}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
