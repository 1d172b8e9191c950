"""Calls of the library, cancelled at random awaits in one process: ``python -m tests.live.cancels NUMBER SEED``.

The machine is paused from its start on. What is printed is how the calls ended, and what is left afterwards of each
kind: tasks, threads, descriptors, child processes, QEMU's jobs, locks, open operations, findings of a check.
"""

import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import psutil

import qmpsnap
from qmpsnap.errors import QmpsnapError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.qmp import status_poll
from qmpsnap.store import lock
from tests.harness.awaits import Counted
from tests.live.machine import context_of

SPEC = MachineSpec(name="still", memory=16 << 20, disks=(DiskSpec(name="vda", size=2 << 20),), agent=False)
MOST = 8
"""Snapshots that there are at most: with more every call gets longer."""
ROUND = 250
"""Cancelled calls between two looks at what is left."""

Call = Callable[[], Awaitable[object]]


class Calls:
    """What can be called; which, and where it is cancelled, a seed decides."""

    def __init__(self, q: qmpsnap.Controller, vm: qmpsnap.MachineHandle, chance: random.Random) -> None:
        self.q, self.vm, self.chance, self.number = q, vm, chance, 0
        self.awaits: dict[str, int] = {}
        self.ended: Counter[str] = Counter()
        self.kinds: dict[str, tuple[int, Call]] = {
            "state": (20, vm.state),
            "is_running": (5, vm.is_running),
            "snapshots": (4, vm.snapshots),
            "chains": (6, vm.chains),
            "jobs": (6, vm.jobs),
            "machines": (3, q.machines),
            "check": (6, vm.check),
            "open": (4, self._open),
            "preview": (5, self._preview),
            "snapshot": (14, self._snapshot),
            "internal": (3, self._internal),
            "rename": (5, self._rename),
            "delete": (8, self._delete),
            "commit": (4, self._commit),
            "stream": (3, self._stream),
            "resume": (4, vm.resume),
            "pause": (4, vm.pause),
            "revert": (2, self._revert),
            "full": (2, self._full),
            "recover": (2, vm.recover),
        }

    def _name(self) -> str:
        self.number += 1
        return f"s{self.number}"

    async def _any(self) -> str:
        return self.chance.choice([found.name for found in await self.vm.snapshots()] or ["none"])

    async def _open(self) -> object:
        async with qmpsnap.open() as q:
            return await q.machines()

    async def _preview(self) -> object:
        return await self.vm.plan_snapshot()

    async def _snapshot(self) -> object:
        if len(await self.vm.snapshots()) >= MOST:
            return await self._delete()
        return await self.vm.snapshot(self._name())

    async def _internal(self) -> object:
        return await self.vm.snapshot(self._name(), kind="internal", memory=False)

    async def _full(self) -> object:
        return await self.vm.snapshot(self._name(), kind="full")

    async def _rename(self) -> object:
        return await self.vm.rename_snapshot(await self._any(), self._name())

    async def _delete(self) -> object:
        return await self.vm.delete_snapshots(await self._any())

    async def _commit(self) -> object:
        return await self.vm.commit("vda", consume=True)

    async def _stream(self) -> object:
        return await self.vm.stream("vda")

    async def _revert(self) -> object:
        return await self.vm.revert(await self._any(), discard=True, after=False)

    def choose(self) -> str:
        """The kind of the next call."""
        names = list(self.kinds)
        return self.chance.choices(names, [self.kinds[name][0] for name in names])[0]

    async def once(self, kind: str, *, cancelled: bool = True) -> None:
        """One call, cancelled at one of its awaits, or after a time, in one of the ways that there are."""
        nth = self.chance.randint(1, self.awaits.get(kind, 3) + 1) if cancelled else 0
        how = self.chance.choice(("cancel", "cancel twice", "timeout", "scope")) if cancelled else "not"
        counted: list[Counted] = []

        async def calling() -> None:
            with anyio.CancelScope() as scope:
                task = asyncio.current_task()
                assert task
                act = {"scope": scope.cancel, "timeout": lambda: None}.get(how, task.cancel)
                counted.append(Counted(self.kinds[kind][1](), nth, act))
                await counted[0]

        task = asyncio.ensure_future(self._in_time(calling) if how == "timeout" else calling())
        if how == "cancel twice":
            asyncio.get_running_loop().call_later(self.chance.random() / 50, task.cancel)
        try:
            await task
            self.ended["done"] += 1
        except (asyncio.CancelledError, TimeoutError):
            self.ended["cancelled"] += 1
        except QmpsnapError as error:
            self.ended[f"refused: {error.code}"] += 1
        self.awaits[kind] = max(self.awaits.get(kind, 0), counted[0].count if counted else 0)

    async def _in_time(self, calling: Call) -> None:
        async with asyncio.timeout(self.chance.random() * self.chance.choice((0.005, 0.05, 0.3))):
            await calling()


def left(vm: qmpsnap.MachineHandle) -> dict[str, Any]:
    """What this process has: but for the task that asks, the loop's own descriptors and anyio's idle threads."""
    gc.collect()
    opened = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this very look
            opened.append(str(descriptor.readlink()).partition(":")[0])
    return {
        "tasks": sorted(repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()),
        "threads": sorted(one.name for one in threading.enumerate() if not one.name.startswith("AnyIO worker")),
        "descriptors": dict(Counter(name for name in opened if not name.startswith("/proc/"))),
        "children": [child.name() for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE],
        "lock": lock.holder(context_of(vm).home.lock(vm.name)),
    }


async def main(number: int, seed: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    loop.slow_callback_duration = 1e9  # a busy host is no defect
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        await vm.start(paused=True)
        calls = Calls(q, vm, random.Random(seed))  # noqa: S311
        for kind in calls.kinds:
            await calls.once(kind, cancelled=False)
        calls.ended.clear()
        before, worst = left(vm), 0
        for done in range(number):
            await calls.once(calls.choose())
            if done % ROUND == ROUND - 1:
                await asyncio.sleep(0.1)
                worst = max(worst, sum(left(vm)["descriptors"].values()))
        await vm.recover()
        await asyncio.sleep(0.2)
        after = left(vm)
        found = {
            "ended": dict(calls.ended),
            "before": before,
            "after": after,
            "most descriptors": worst,
            "jobs": [job.id for job in await vm.jobs()],
            "open": [found.verb for found in context_of(vm).store.operations(vm.name, only_open=True)],
            "findings": [finding.text for finding in (await vm.check(deep=True)).findings],
            "qemus": sum(_ours(one) for one in psutil.process_iter()),
        }
        await vm.stop(force=True)
        return found


def _ours(process: psutil.Process) -> bool:
    try:
        return process.cwd().startswith(os.environ["QMPSNAP_HOME"])
    except psutil.Error:
        return False


if __name__ == "__main__":
    status_poll.DEADLINE = 5.0
    sys.stdout.write(json.dumps(asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))))
