"""One machine lives on through every change that it may see; each snapshot reverts and reads right, or says why not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

import qmpsnap
from qmpsnap.errors import StateError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.base import relocate
from tests.live.machine import MIB, fill, hold_invariants, user_monitor
from tests.live.test_upgrade import later, use, vm_version

__all__ = ["later"]

SPEC = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=(DiskSpec(name="vda", size=2 * MIB),),
)
SECOND = DiskSpec(name="vdb", size=2 * MIB)
STEP = 64 << 10
"""Bytes that are written before each snapshot, of its number, behind those of the one before."""


class Life:
    """The machine, and what is expected of each of its snapshots: the size of each disk, and which writes it has."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.home, self.patch = "still", home / "first", monkeypatch
        self.sizes = {"vda": 2 * MIB}
        self.written: dict[str, list[int]] = {"vda": [], "vdb": []}
        self.expected: dict[str, tuple[dict[str, int], dict[str, list[int]]]] = {}
        monkeypatch.setenv("QMPSNAP_HOME", str(self.home))

    @asynccontextmanager
    async def machine(self) -> AsyncIterator[qmpsnap.MachineHandle]:
        async with qmpsnap.open() as q:
            yield await q.machine(self.name)

    async def take(self, vm: qmpsnap.MachineHandle, kind: str, *, run: bool = True) -> None:
        """A snapshot of that kind, after a write that only it and those after it have."""
        number = len(self.expected) + 1
        for disk in self.sizes if run else ():
            await fill(vm, disk, number, offset=(number - 1) * STEP, length=STEP)
            self.written[disk].append(number)
        self.expected[f"s{number}"] = dict(self.sizes), {disk: list(self.written[disk]) for disk in self.sizes}
        await vm.snapshot(f"s{number}", kind=kind)  # type: ignore[call-overload]

    async def reads_right(self, vm: qmpsnap.MachineHandle, name: str) -> None:
        """By the running QEMU: every write before it, nothing of later ones, and the sizes of its time."""
        sizes, written = self.expected[name]
        async with user_monitor(vm) as qemu:
            for disk, size in sizes.items():
                for number in range(1, len(self.expected) + 1):
                    pattern = number if number in written[disk] else 0
                    await _read(qemu, disk, f"read -P {pattern} {(number - 1) * STEP} {STEP}")
                assert {drive["inserted"]["image"]["virtual-size"] for drive in await _drives(qemu, disk)} == {size}


async def _drives(qemu: QMPClient, disk: str) -> list[Any]:
    drives: Any = await qemu.execute("query-block")
    return [drive for drive in drives if disk in str(drive.get("qdev", "")).split("/")]


async def _read(qemu: QMPClient, disk: str, command: str) -> None:
    (drive,) = await _drives(qemu, disk)
    line = f'qemu-io -d {drive["qdev"]} "{command}"'
    said = str(await qemu.execute("human-monitor-command", {"command-line": line}))
    assert "fail" not in said.lower(), said


@pytest.mark.grid
async def test_a_machine_lives_on(
    home: Path,
    later: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    life = Life(home, monkeypatch)
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        await vm.start()
        for kind in ("disk", "full", "internal"):
            await life.take(vm, kind)
        await vm.stop(force=True)
        for kind in ("disk", "internal"):
            await life.take(vm, kind, run=False)
        await vm.start()
        life.sizes["vda"] = 3 * MIB
        await vm.resize("vda", life.sizes["vda"])
        await vm.attach_disk(SECOND)
        life.sizes["vdb"] = 2 * MIB
        for kind in ("disk", "full", "internal"):
            await life.take(vm, kind)
        await vm.stop(force=True)
        await vm.set({"memory": "96M", "cpus": "2"})
        await vm.start()
        for kind in ("full", "disk", "internal"):
            await life.take(vm, kind)
        await vm.stop(force=True)
        await vm.rename("other")
        life.name = "other"
    async with life.machine() as vm:
        await vm.start()
        for kind in ("full", "disk", "internal"):
            await life.take(vm, kind)
        await vm.stop(force=True)
    life.home = life.home.rename(home / "second")
    monkeypatch.setenv("QMPSNAP_HOME", str(life.home))
    async with qmpsnap.open() as q:
        assert (await relocate.run(q.context)).done
    async with life.machine() as vm:
        await vm.start()
        for kind in ("full", "internal", "disk"):
            await life.take(vm, kind)
        await vm.stop(force=True)
    use(later["11.1"], monkeypatch)
    async with life.machine() as vm:
        await vm.start()
        assert vm_version(await vm.record()) == "11.1"
        for kind in ("full", "disk", "internal"):
            await life.take(vm, kind)
        assert len(life.expected) == 20
        await vm.stop(force=True)
        await vm.commit("vda", base="s18", top="s19", consume=True)
        await _each_reverts(vm, life)


async def _each_reverts(vm: qmpsnap.MachineHandle, life: Life) -> None:
    await hold_invariants(vm)
    states = {snapshot.name: snapshot.state for snapshot in await vm.snapshots()}
    assert states.keys() == life.expected.keys()
    assert list(states.values()).count("ok") >= 18
    for snapshot in await vm.snapshots():
        if snapshot.state != "ok":
            with pytest.raises(StateError, match=f"{snapshot.name}"):
                await vm.plan_revert(snapshot)
            continue
        spec, disks = (await vm.record()).spec, life.expected[snapshot.name][0]
        # Disks that the machine does not have now come back with the hardware of that time.
        then = "now" if {disk.name for disk in spec.disks} == set(disks) else "snapshot"
        if snapshot.hardware and (then == "snapshot" or snapshot.hardware.memory != spec.memory):
            with pytest.raises(StateError, match="different virtual hardware"):
                await vm.plan_revert(snapshot)
            then = "snapshot"
        await vm.revert(snapshot, hardware=then, state="paused", discard=True)  # type: ignore[arg-type]
        if snapshot.hardware:
            assert (await vm.record()).spec.memory == snapshot.hardware.memory
        await life.reads_right(vm, snapshot.name)
    await hold_invariants(vm)
