"""A pool of forks as a program sees it: machines that wait to be used once."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.ops.base.context import Context
    from qmpsnap.ops.fork.pool import Pool


class ForkPool:
    """Forks that wait, from :meth:`qmpsnap.MachineHandle.pool`."""

    def __init__(self, context: Context, pool: Pool) -> None:
        self._context, self._pool = context, pool

    def __repr__(self) -> str:
        return f"<ForkPool with {self.waiting} waiting>"

    @property
    def waiting(self) -> int:
        """How many are ready now."""
        return self._pool.waiting

    async def memory(self) -> int:
        """Bytes of memory that those take up, their share of what they have in common included (PSS)."""
        return await self._pool.memory()

    @asynccontextmanager
    async def take(self) -> AsyncIterator[MachineHandle]:
        """A fork for the block, running; it is removed behind the block, and another one made ready.

        Raises:
            QmpsnapError: no fork can be made any more.
        """
        from qmpsnap.api.machine_handle import MachineHandle

        async with self._pool.take() as name:
            yield MachineHandle(self._context, name)
