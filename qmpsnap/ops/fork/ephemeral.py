"""Ephemeral forks: all of one is removed once its QEMU has ended, however it has, by the next command."""

import contextlib

import anyio

from qmpsnap.errors import NotFoundError, QmpsnapError
from qmpsnap.machine import qemu
from qmpsnap.machine.starting import alive
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.lifecycle import undefine

AT_ONCE = 8
"""Forks that are removed side by side: each waits for its images, and all for the store."""


async def sweep(context: Context) -> list[str]:
    """Remove every ephemeral fork that has no QEMU any more; returns their names.

    One that somebody works on is left to them, and one that cannot be removed now to the next command.
    """
    removed: list[str] = []
    limit = anyio.CapacityLimiter(AT_ONCE)

    async def one(name: str) -> None:
        async with limit:
            with contextlib.suppress(QmpsnapError):
                if await _is_over(context, name):
                    await remove(context, name)
                    removed.append(name)

    async with anyio.create_task_group() as group:
        for name in await context.astore.ephemeral():
            group.start_soon(one, name)
    return removed


async def remove(context: Context, name: str) -> None:
    """Remove all of a fork that has no QEMU."""
    await undefine.run(context, name, disks="remove")


async def _is_over(context: Context, name: str) -> bool:
    try:
        machine = await context.astore.machine(name)
    except NotFoundError:
        return False
    if machine.host != context.host or machine.origin is None:
        return False
    process = await qemu.unless_ending(context.process(machine))
    if process is None:
        return True
    owner = machine.origin.owner
    if owner is None or alive.is_alive(owner):
        return False
    return await qemu.end(process, None)
