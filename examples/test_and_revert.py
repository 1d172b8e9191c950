"""Run a risky command in a guest: keep what it did if it succeeds, undo everything if it fails.

Usage: python test_and_revert.py MACHINE COMMAND

The snapshot holds disks and memory, so after a revert the guest is back at the instant before the command, with its
programs still running. Both ways the snapshot is deleted at the end. The exit code is 0 if the command succeeded.
"""

import asyncio
import sys

import qmpsnap

HOUR = 3600


async def main(machine: str, command: str) -> int:
    """Run the command; returns the exit code."""
    async with qmpsnap.open() as q:
        vm = await q.machine(machine)
        before = await vm.snapshot(kind="full", description=f"before: {command}")
        print(f"took {before.name}; the guest was paused for {before.pause_ms:.0f} ms")
        done = await vm.run(command, timeout=HOUR, check=False)
        print(done.stdout + done.stderr, end="")
        if done.exit_status == 0:
            print("the command succeeded: its changes stay")
        else:
            reverted = await vm.revert(before, discard=True)
            print(f"the command ended with status {done.status}: the guest is {reverted.state}, as before it")
        await vm.delete_snapshots(before.name)
        return 0 if done.status == 0 else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
