"""A pool of forks, for programs without asyncio."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from qmpsnap.sync.runner import Held

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpsnap.api.forks import ForkPool as AsyncPool
    from qmpsnap.sync.machine import MachineHandle
    from qmpsnap.sync.runner import Runner


class ForkPool(Held):
    """Forks that wait, from :meth:`qmpsnap.sync.MachineHandle.pool`."""

    def __init__(self, runner: Runner, pool: AsyncPool) -> None:
        self._runner, self._pool = runner, pool

    def __repr__(self) -> str:
        return repr(self._pool)

    @property
    def waiting(self) -> int:
        """How many are ready now."""
        return self._pool.waiting

    def memory(self) -> int:
        """Bytes of memory that those take up, their share of what they have in common included (PSS)."""
        return self._call(self._pool.memory())

    @contextmanager
    def take(self) -> Iterator[MachineHandle]:
        """A fork for the block, running; it is removed behind the block, and another one made ready."""
        with self._entered(self._pool.take()) as found:
            yield found
