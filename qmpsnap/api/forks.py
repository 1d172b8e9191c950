"""What a program does with forks: make them, and look after the templates of their memory."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from msgspec.structs import replace

from qmpsnap.api import asked, old_names
from qmpsnap.host.borders import border
from qmpsnap.later import Later
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.ops.base import requests

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Literal

    from qmpsnap.api import plans
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.api.plans import Plan
    from qmpsnap.ops.base.context import Context
    from qmpsnap.ops.fork import ephemeral, run, upkeep
    from qmpsnap.ops.fork import pool as pools
    from qmpsnap.ops.fork.pool import Pool
    from qmpsnap.ops.fork.run import Forked
    from qmpsnap.ops.fork.upkeep import Pruned, Shelved
else:
    pools, upkeep = Later("ops.fork.pool"), Later("ops.fork.upkeep")
    ephemeral, run, plans = Later("ops.fork.ephemeral"), Later("ops.fork.run"), Later("api.plans")


async def sweep(context: Context) -> None:
    """Remove ephemeral forks that have ended, where there are any."""
    if await context.astore.ephemeral():
        await ephemeral.sweep(context)


@border
class Templates:
    """A controller as the keeper of templates."""

    context: Context

    async def templates(self) -> tuple[Shelved, ...]:
        """The templates of snapshots' memory that forks share, by folder; the one that is removed first, first.

        Raises:
            HostCannot: a folder of templates cannot be read.
        """
        return await upkeep.listed(self.context)

    async def prune_templates(self, *, all: bool = False) -> Pruned:  # noqa: A002 - as it is typed
        """Remove the templates that no running fork maps.

        Args:
            all: also the others, which their forks keep.

        Raises:
            StateError: another process makes a template.
        """
        return await upkeep.prune(self.context, all=all)

    async def plan_prune_templates(self, *, all: bool = False) -> Plan[Pruned, Pruned]:  # noqa: A002 - as it is typed
        """What :meth:`prune_templates` would remove now."""
        shape = plans.of_prune(await upkeep.prune(self.context, all=all, look=True))

        async def act(q: Templates) -> Pruned:
            again = await q.plan_prune_templates(all=all)
            plans.require_same(again.files, shape.files, "")
            return await q.prune_templates(all=all)

        return plans.planned("prune_templates", "", shape, act)

    preview_prune_templates = old_names.previewed("prune_templates", old_names.details)


@border
class Forking:
    """A machine as the parent of others."""

    _context: Context
    name: str

    async def fork(
        self,
        snapshot: Snapshot | str | None = None,
        name: str | None = None,
        *,
        count: int = 1,
        ephemeral: bool = False,
        paused: bool = False,
        identity: Literal["keep", "fresh"] = "keep",
        description: str = "",
    ) -> list[Forked]:
        """Make machines that go on from a full snapshot of this one, side by side with it.

        Each is a machine of its own with new overlays on the snapshot's points. All share the snapshot's memory until
        they write to it.

        Args:
            snapshot: the full snapshot, or its name; None takes one of the running machine first.
            name: the fork's name; None takes the next free ``NAME-fN``. Of several each gets a number behind it.
            count: how many.
            ephemeral: remove all of a fork once its QEMU has ended.
            paused: leave the vCPUs stopped.
            identity: ``fresh`` lets the guest agent replace what the guest has in common with this one: clock, random
                pool, hostname, machine-id and MAC addresses.
            description: of the snapshot that is taken.

        Raises:
            NotFoundError: there is no such snapshot.
            NameTaken: there is a machine of that name.
            StateError: the machine is adopted or has a TPM, the snapshot has no memory, or its hardware has changed.
            HostCannot: there is no room for the snapshot's memory.
        """
        request = asked.to_fork(
            snapshot, name, count=count, ephemeral=ephemeral, paused=paused, identity=identity, description=description
        )
        return await run.run(self._context, self.name, request)

    @asynccontextmanager
    async def pool(
        self, snapshot: Snapshot | str, *, size: int = 4, fresh: bool = True, floor: int | None = None
    ) -> AsyncIterator[ForkPool]:
        """Keep that many forks of a snapshot loaded and waiting, for the block: ``async with vm.pool("warm") as pool``.

        Args:
            snapshot: the full snapshot, or its name.
            size: how many wait.
            fresh: each has an identity of its own, for which the guest needs an agent.
            floor: bytes of the host's memory that are left to others; no fork is made below that.

        Raises:
            HostCannot: there is not that much memory.
            QmpsnapError: as :meth:`fork`.
        """
        name = snapshot.name if isinstance(snapshot, Snapshot) else snapshot
        request = pools.PoolRequest(snapshot=name, size=size, fresh=fresh)
        if floor is not None:
            request = replace(request, floor=floor)
        async with pools.opened(self._context, self.name, requests.well_typed(request)) as found:
            yield ForkPool(self._context, found)


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
            HostCannot: none is ready, and the host has not the memory for another one.
        """
        from qmpsnap.api.machine_handle import MachineHandle

        async with self._pool.take() as name:
            yield MachineHandle(self._context, name)
