"""Pools: forks that are loaded, have an identity and wait, so that whoever needs one only has to let it run.

A fork is made ready in the background: it runs until its agent has answered once, since a guest that has just been
loaded is slow until then, and is paused. All are ephemeral and end with this process.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct

from qmpsnap.errors import HostCannot, QmpsnapError, UsageError
from qmpsnap.host.threads import to_read
from qmpsnap.machine import agent, templates
from qmpsnap.machine import qemu as qemus
from qmpsnap.machine.starting import process as processes
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.fork import ephemeral, identity, run
from qmpsnap.ops.fork.request import ForkRequest
from qmpsnap.qmp import commands, parked

FLOOR = 512 << 20
"""Bytes of memory that a pool leaves to the rest of the host."""
OWN = 48 << 20
"""Bytes of memory that a waiting fork has to itself, most of it what TCG has translated."""
FILLERS = 2
"""Forks that are made ready side by side."""
_LOOK = 1.0
"""Seconds between two looks at the host's memory when it is short."""


class PoolRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for: ``size`` forks of a snapshot that wait, with ``floor`` bytes of memory left to others."""

    snapshot: str
    size: int = 4
    fresh: bool = True
    floor: int = FLOOR


class Pool:
    """Forks that wait; from :func:`opened`."""

    def __init__(self, context: Context, parent: str, request: PoolRequest) -> None:
        self._context, self._parent, self._request = context, parent, request
        self._slots = anyio.Semaphore(request.size)
        self._ready: deque[str] = deque()
        self._changed = anyio.Condition()
        self._error: QmpsnapError | None = None
        self._tasks: TaskGroup | None = None
        self._begun: set[str] = set()
        self._made_now = self._taken = 0

    @property
    def waiting(self) -> int:
        """Forks that are ready now."""
        return len(self._ready)

    async def memory(self) -> int:
        """Bytes of memory that the waiting forks take up: their share of what they share included (PSS)."""
        machines = [await self._context.astore.machine(name) for name in self._ready]
        pids = [found.pid for machine in machines if (found := self._context.process(machine))]
        return await to_read(lambda: sum(map(pss, pids)))

    @asynccontextmanager
    async def take(self) -> AsyncIterator[str]:
        """A fork that runs, for the block; it is removed behind the block."""
        async with self._changed:
            await self._one_ready()
            name = self._ready.popleft()
        self._taken += 1
        self._slots.release()
        try:
            await self._let_run(name)
            yield name
        finally:
            if self._tasks:
                self._tasks.start_soon(self._remove, name)

    async def _one_ready(self) -> None:
        """Wait for a fork that is ready; no longer than there is one to come, or memory to be given back for it."""
        while not self._ready:
            if self._error:
                raise self._error
            if not (self._made_now or self._taken or self._may_grow()):
                raise HostCannot(
                    f"no fork of snapshot {self._request.snapshot} is ready, and none can be made: of"
                    f" {available() >> 20} MiB of memory that are available, a fork needs {OWN >> 20} and the pool"
                    f" leaves {self._request.floor >> 20} to others",
                    hint="free some memory, or use a smaller floor",
                )
            await self._changed.wait()

    async def _let_run(self, name: str) -> None:
        machine = await self._context.astore.machine(name)
        async with self._context.monitor(machine) as qemu:
            if qemu:
                await commands.control(qemu, "cont")
        socket = self._context.home.run_dir(name) / AGENT_SOCKET
        with contextlib.suppress(QmpsnapError):  # a guest without an agent, or without this program, keeps its time
            async with agent.connect(socket, machine=name, keep=agent.KEEP) as guest:
                await guest.execute("guest-exec", {"path": "date", "arg": ["-u", "-s", f"@{round(time.time())}"]})

    async def _remove(self, name: str) -> None:
        with anyio.CancelScope(shield=True):  # another pool may have the name next
            await end(self._context, name)
            self._begun.discard(name)
            self._taken -= 1

    async def end_all(self) -> None:
        """Remove every fork of this pool, in whatever state of being made or removed it is."""
        async with anyio.create_task_group() as tasks:
            for name in self._begun.intersection(await self._context.astore.ephemeral()):
                tasks.start_soon(end, self._context, name)

    async def fill(self, tasks: TaskGroup) -> None:
        """Begin to make forks ready, and return once there is a first one.

        Raises:
            QmpsnapError: it cannot be made.
        """
        self._tasks = tasks
        require_memory(self._request)
        for _ in range(min(FILLERS, self._request.size)):
            tasks.start_soon(self._filling)
        async with self._changed:
            await self._one_ready()

    async def _filling(self) -> None:
        while self._error is None:
            await self._slots.acquire()
            while not self._may_grow():
                await self._tell()
                await anyio.sleep(_LOOK)
            self._made_now += 1
            try:
                self._ready.append(await self._made())
            except QmpsnapError as error:
                self._error = error
            finally:
                self._made_now -= 1
            await self._tell()

    def _may_grow(self) -> bool:
        return available() >= self._request.floor + OWN

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _made(self) -> str:
        owner = processes.existing(os.getpid())
        wanted = ForkRequest(
            snapshot=self._request.snapshot,
            ephemeral=True,
            owner=owner,
            paused=True,
            identity="fresh" if self._request.fresh else "keep",
        )
        (fork,) = await run.run(self._context, self._parent, wanted, begun=self._begun)
        if not self._request.fresh:
            await self._warm(fork.machine.name)
        self._hold_agent(fork.machine.name)
        return fork.machine.name

    def _hold_agent(self, name: str) -> None:
        """Keep the connection by which the fork was made ready: a new one would cost whoever takes it 100 ms."""
        socket = self._context.home.run_dir(name) / AGENT_SOCKET
        if kept := parked.taken(socket):
            parked.keep(socket, kept, None)

    async def _warm(self, name: str) -> None:
        """Let a twin answer once."""
        machine = await self._context.astore.machine(name)
        async with self._context.monitor(machine) as qemu:
            if qemu and machine.spec.agent:
                await commands.control(qemu, "cont")
                socket = self._context.home.run_dir(name) / AGENT_SOCKET
                with contextlib.suppress(QmpsnapError):
                    async with agent.connect(socket, machine=name, deadline=identity.ANSWER, keep=agent.KEEP) as guest:
                        await guest.run(["true"], deadline=identity.ANSWER)
                await commands.control(qemu, "stop")


@asynccontextmanager
async def opened(context: Context, parent: str, request: PoolRequest) -> AsyncIterator[Pool]:
    """A pool for the block, at whose end all of its forks are removed.

    Raises:
        UsageError: its size is none.
        HostCannot: the host has not the memory.
    """
    if not 1 <= request.size <= 1000:  # noqa: PLR2004
        raise UsageError(f"a pool of {request.size} forks is not possible", hint="use a size from 1 to 1000")
    pool = Pool(context, parent, request)
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            try:
                await pool.fill(tasks)
                yield pool
            except (anyio.get_cancelled_exc_class(), GeneratorExit):
                raise
            except BaseException as error:  # noqa: BLE001 - it goes on, but not as a group, which the caller has not made
                failure = error
            finally:
                tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await pool.end_all()
    if failure:
        raise failure


async def end(context: Context, name: str) -> None:
    """End a fork's QEMU, without asking it, and remove the fork."""
    parked.let_go(context.home.run_dir(name) / AGENT_SOCKET)
    with contextlib.suppress(QmpsnapError):
        if process := context.process(await context.astore.machine(name)):
            await qemus.end(process, None)
        await ephemeral.remove(context, name)


def require_memory(request: PoolRequest) -> None:
    """Make sure that the pool leaves its floor."""
    need = request.size * OWN
    if (free := available()) < request.floor + need:
        raise HostCannot(
            f"a pool of {request.size} forks needs {need >> 20} MiB of memory and leaves {request.floor >> 20} MiB to"
            f" others, but {free >> 20} MiB are available",
            hint="use a smaller size or floor",
        )


def available() -> int:
    """Bytes of memory that this host can give."""
    return templates.available()


def pss(pid: int) -> int:
    """Bytes of memory of a process, and of what it shares its share."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
