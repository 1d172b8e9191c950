"""Fifty machines whose vCPUs are stopped, snapshotted at once."""

import asyncio
from contextlib import AsyncExitStack

import anyio

import qmpsnap
from tests.bench import bare, guests
from tests.bench.measure import Way, clock
from tests.bench.merging import SCRIPT
from tests.bench.program import PYTHON, Sample
from tests.bench.setting import Setting

MEASURES = ("fifty",)
MACHINES = 50
AT_ONCE = 4
"""QEMUs that are started at once."""

Place = tuple[str, str, str, str, str]
"""The arguments of :func:`tests.bench.bare.create`."""


async def measure(at: Setting) -> None:
    """Time them."""
    async with qmpsnap.open() as q, AsyncExitStack() as stack:
        names = [f"many{number}" for number in range(MACHINES)]
        vms = [await q.define(guests.still(name, size=1 << 20, memory=16 << 20)) for name in names]
        for vm in vms:
            stack.push_async_callback(vm.stop, force=True)
        limit = anyio.CapacityLimiter(AT_ONCE)

        async def start(vm: qmpsnap.MachineHandle) -> None:
            async with limit:
                await vm.start(paused=True)

        async with anyio.create_task_group() as group:
            for vm in vms:
                group.start_soon(start, vm)
        ways = {"library": _library(vms), "bare": _scripts(at, vms), "processes": _processes(at, vms)}
        await at.results.compare("fifty", ways, share=0.5)


async def _places(at: Setting, vms: list[qmpsnap.MachineHandle]) -> list[Place]:
    """Where the scripts put their overlays; after a deletion of qmpsnap's that may be another node."""
    found = []
    for vm in vms:
        node, image = await guests.active(vm)
        found.append((guests.monitor_of(vm.name), node, image, "1M", str(at.folder / f"{vm.name}.bare")))
    return found


def _library(vms: list[qmpsnap.MachineHandle]) -> Way:
    async def snapshot(vm: qmpsnap.MachineHandle) -> None:
        await vm.snapshot("s")

    async def way() -> Sample:
        with clock() as sample:
            async with anyio.create_task_group() as group:
                for vm in vms:
                    group.start_soon(snapshot, vm)
        for vm in vms:
            await vm.delete_snapshots("s")
        return sample

    return way


def _scripts(at: Setting, vms: list[qmpsnap.MachineHandle]) -> Way:
    """All in this process."""

    async def way() -> Sample:
        places = await _places(at, vms)
        with clock() as sample:
            await asyncio.gather(*(bare.create(*place) for place in places))
        await _undo(places)
        return sample

    return way


def _processes(at: Setting, vms: list[qmpsnap.MachineHandle]) -> Way:
    """Each a process of its own."""

    async def create(place: Place) -> None:
        await anyio.run_process([str(PYTHON), str(SCRIPT), "create", *place])

    async def way() -> Sample:
        places = await _places(at, vms)
        with clock() as sample:
            await asyncio.gather(*(create(place) for place in places))
        await _undo(places)
        return sample

    return way


async def _undo(places: list[Place]) -> None:
    for socket, node, _, _, overlay in places:
        await bare.commit(socket, node, bare.OVERLAY, overlay)
