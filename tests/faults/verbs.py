"""Verbs that no death is injected into, as they have few steps or none of their own: for faults that need no step."""

import os
from pathlib import Path

import anyio

import qmpsnap
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.faults.scenarios import Scenario
from tests.faults.site import SIZE, TWO, Expected
from tests.live.machine import MIB

OTHER = "other"
"""The machine that is defined or adopted."""
IMAGE = "mine"
"""In the user's folder: an image that somebody else has made."""
QEMU = "qmp"
"""In the user's folder: the monitor of a QEMU that somebody else has launched on it."""


async def _an_image(_: qmpsnap.MachineHandle, place: Path) -> None:
    binary = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"
    await anyio.run_process([binary, "create", "-q", "-f", "qcow2", str(place / IMAGE), str(SIZE)])


async def _a_qemu(vm: qmpsnap.MachineHandle, place: Path) -> None:
    await _an_image(vm, place)
    argv = [os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64", "-nodefaults", "-display", "none", "-S"]
    argv += ["-accel", "tcg", "-m", "64", "-qmp", f"unix:{place / QEMU},server=on,wait=off", "-daemonize"]
    argv += ["-drive", f"file={place / IMAGE},format=qcow2,if=virtio"]
    await anyio.run_process(argv, cwd=place)


async def _define(place: Path, disk: DiskSpec) -> object:
    async with qmpsnap.open() as q:
        return await q.define(MachineSpec(name=OTHER, memory=64 * MIB, disks=(disk,), agent=False), folders=(place,))


async def _define_image(_: qmpsnap.MachineHandle, place: Path) -> object:
    return await _define(place, DiskSpec(name="vda", image=str(place / IMAGE), format="qcow2"))


async def _define_base(_: qmpsnap.MachineHandle, place: Path) -> object:
    return await _define(place, DiskSpec(name="vda", base=str(place / IMAGE), format="qcow2"))


async def _adopt(_: qmpsnap.MachineHandle, place: Path) -> object:
    async with qmpsnap.open() as q:
        return await q.adopt(OTHER, place / QEMU)


async def _start(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.start(paused=True)


async def _stop(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.stop(force=True)


async def _add_layers(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.add_layers()


async def _push(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.push("pushed")


async def _pop(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.pop()


async def _saved(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.save()


async def _restore(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.restore(after=False)


async def _rename(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.rename_snapshot("s2", "renamed")


async def _undefine(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.undefine(disks="remove")


async def _give_back(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.undefine(disks="keep")


async def _other_is_there(_: qmpsnap.MachineHandle, __: Path) -> bool:
    async with qmpsnap.open() as q:
        return any(found.name == OTHER for found in await q.machines())


async def _runs(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return await vm.is_running()


async def _deeper(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return len((await vm.chains())[0].layers) > 3


async def _renamed(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return any(found.name == "renamed" for found in await vm.snapshots())


async def _forgotten(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    async with qmpsnap.open() as q:
        return all(found.name != vm.name for found in await q.machines())


_MINE = Expected(place=frozenset({IMAGE}))
_THEIRS = Expected(place=frozenset({IMAGE, QEMU}))
_NO_MEMORY = frozenset({"saving", "cloning", "memory lost", "ending", "transaction"})

VERBS: dict[str, Scenario] = {
    "define of an image": Scenario(
        column="define",
        verb="define",
        act=_define_image,
        prepare=_an_image,
        expected=_MINE,
        happened=_other_is_there,
    ),
    "define of a base": Scenario(
        column="define",
        verb="define",
        act=_define_base,
        prepare=_an_image,
        expected=_MINE,
        happened=_other_is_there,
    ),
    "adopt": Scenario(
        column="define",
        verb="define",
        act=_adopt,
        prepare=_a_qemu,
        expected=_THEIRS,
        happened=_other_is_there,
    ),
    "start": Scenario(column="others", verb="", act=_start, happened=_runs, expected=Expected(ends=True)),
    "stop": Scenario(column="others", verb="", act=_stop, start="paused", expected=Expected(ends=True)),
    "add layers, stopped": Scenario(
        column="create", verb="create", act=_add_layers, spec=TWO, without=_NO_MEMORY, happened=_deeper
    ),
    "pop": Scenario(
        column="delete",
        verb="delete",
        act=_pop,
        prepare=_push,
        without=frozenset({"undone", "N:started", "N:finalizing"}),
        expected=Expected(loses=frozenset({"pushed"}), goes_to="pushed"),
    ),
    "restore": Scenario(
        column="revert",
        verb="revert",
        act=_restore,
        without=frozenset({"merging"}),
        start="paused",
        warm=_saved,
        expected=Expected(goes_to="saved-4", ends=True),
    ),
    "rename": Scenario(
        column="others", verb="", act=_rename, happened=_renamed, expected=Expected(loses=frozenset({"s2"}))
    ),
    "undefine, removing": Scenario(column="undefine", verb="", act=_undefine, happened=_forgotten),
    "undefine, keeping": Scenario(column="undefine", verb="", act=_give_back, happened=_forgotten),
}
