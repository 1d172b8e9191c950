"""Deaths of a controller that does a scenario's verb, or recovers; and acts that end by themselves."""

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio

import qmpsnap
from tests.faults import claims, filters, mutants
from tests.faults.scenarios import SCENARIOS
from tests.faults.site import NAME, TWO
from tests.harness import deaths
from tests.harness.deaths import WAIT, Call, Death, Point
from tests.volumes import copying

deaths.preload(__name__)

FORKS = ("fork", "ephemeral fork")
POOL = "pool"


async def controller_dies(
    scenario: str,
    place: Path,
    point: Point | Call,
    *,
    recovering: bool = False,
    logs: Path | None = None,
    qemu_too: bool = False,
) -> Death:
    """Let a controller do a scenario's verb, or recover, until it comes to the point; then its guards, to their end.

    ``logs`` is where QEMU logs the writes to the layers that it opens, for a loss of power; ``qemu_too``: every QEMU of
    the machine dies right before the controller does, so that no guard comes between.
    """
    act = partial(_act, scenario, place, recovering=recovering, logs=logs)
    return await deaths.dies(act, point, qemu_too=qemu_too, guards_too=logs is not None)


def _act(scenario: str, place: Path, *, recovering: bool, logs: Path | None) -> None:
    mutants.apply()
    with filters.logging(logs) if logs else contextlib.nullcontext():
        anyio.run(_do, scenario, place, recovering)


async def _do(scenario: str, place: Path, recovering: bool) -> None:  # noqa: FBT001 - anyio.run hands on no names
    async with qmpsnap.open() as q:
        if scenario == "define":
            await q.define(TWO)
            return
        vm = await q.machine(NAME)
        if recovering:
            await vm.recover()
        elif act := OTHERS.get(scenario):
            await act(vm)
        else:
            await SCENARIOS[scenario].act(vm, place)


async def _merges(vm: qmpsnap.MachineHandle) -> None:
    with copying.merging():
        await vm.revert("before", discard=True)


async def _forked(vm: qmpsnap.MachineHandle, *, ephemeral: bool) -> None:
    await vm.fork("warm", "child", ephemeral=ephemeral)


async def _pooled(vm: qmpsnap.MachineHandle) -> None:
    async with vm.pool("warm", size=2, fresh=False) as pool, pool.take():
        pass


OTHERS: dict[str, Callable[[qmpsnap.MachineHandle], Awaitable[object]]] = {
    "undefine": lambda vm: vm.undefine(disks="remove"),
    "rename of a machine": lambda vm: vm.rename("other"),
    "flatten": lambda vm: vm.flatten("vda"),
    "revert by merging": _merges,
    "disk-attach": lambda vm: vm.attach_disk({"size": "1M", "bus": "scsi"}),
    POOL: _pooled,
    "disk-detach": lambda vm: vm.detach_disk("vdb"),
    "nic-attach": lambda vm: vm.attach_nic({}),
    "nic-detach": lambda vm: vm.detach_nic(0, timeout=0.1),
    **{name: partial(_forked, ephemeral=name == "ephemeral fork") for name in FORKS},
}
"""Verbs that are no scenarios."""


async def ends_by_itself(act: Callable[[], Awaitable[object]]) -> str:
    """Do it in this process; returns the error it ended with, or nothing. Anything but an error of ours is raised."""
    try:
        with anyio.fail_after(WAIT):
            await act()
    except qmpsnap.QmpsnapError as error:
        claims.heard(error)
        return error.code
    return ""
