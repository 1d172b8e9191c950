"""Copy a disk of a running machine to a file of its own, with a progress bar.

Usage: python progress_bar.py MACHINE DISK FILE

Ctrl-C cancels the copy and removes the unfinished file; the guest runs on either way.
"""

import asyncio
import sys
from pathlib import Path

import qmpsnap

WIDTH = 40


async def main(machine: str, disk: str, file: str) -> None:
    """Copy the disk."""
    async with qmpsnap.open() as q:
        vm = await q.machine(machine)
        target = Path(file).absolute()
        # A block that fails, or is cancelled by Ctrl-C, cancels the job; its end waits for the job's.
        async with vm.mirror(disk, target, mode="finish") as job:
            async for info in job.progress():
                draw(info)
        print(f"\n{target} has the content of {disk}")


def draw(info: qmpsnap.JobInfo) -> None:
    """Draw the bar again. QEMU may still raise the total, so the bar can also become shorter."""
    part = info.current_progress / max(info.total_progress, 1)
    print(f"\r[{'#' * round(part * WIDTH):{WIDTH}}] {part:4.0%} {info.status:10}", end="", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
