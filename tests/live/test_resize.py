"""``resize`` on real QEMU: running, stopped, raw and qcow2, in the middle of a chain's life, and refused."""

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.errors import HostCannot, NotFoundError, StateError, UsageError
from qmpsnap.host.files import opened
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations.by import LoadBy
from tests.live.machine import MIB, context_of, hold_invariants, user_monitor

pytestmark = pytest.mark.version

SPEC = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=(
        DiskSpec(name="vda", size=MIB),
        DiskSpec(name="vdb", size=MIB, format="raw"),
        DiskSpec(name="vdc", size=MIB, bus="scsi"),
    ),
)


async def sizes(vm: qmpsnap.MachineHandle) -> dict[str, list[int]]:
    """The recorded sizes of each disk's layers, base first; each file's header says the same."""
    found: dict[str, list[int]] = {}
    for chain in await vm.chains():
        for at in chain.layers:
            layer = at.layer
            with opened(layer.path) as descriptor:
                there = header.inspect(descriptor, path=layer.path, format=layer.format).virtual_size
            assert there == layer.virtual_size
            found.setdefault(chain.disk, []).append(there)
    return found


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_each_layer_keeps_its_size_and_revert_brings_it_back(q: qmpsnap.Controller, state: str) -> None:
    vm = await q.define(SPEC)
    if state == "running":
        await vm.start(paused=True)
    await vm.resize("vdb", 2 * MIB)
    await vm.snapshot("small")
    for disk in ("vda", "vdb", "vdc"):
        await vm.resize(disk, "+3M")
    assert await sizes(vm) == {"vda": [MIB, 4 * MIB], "vdb": [2 * MIB, 5 * MIB], "vdc": [MIB, 4 * MIB]}
    if state == "running":
        async with user_monitor(vm) as monitor:
            drives: Any = await monitor.execute("query-block")
        assert {drive["inserted"]["image"]["virtual-size"] for drive in drives} == {4 * MIB, 5 * MIB}
    await vm.snapshot("large")
    await vm.revert("small", discard=True)
    assert {disk: found[-1] for disk, found in (await sizes(vm)).items()} == {
        "vda": MIB,
        "vdb": 2 * MIB,
        "vdc": MIB,
    }
    await vm.revert("large")
    assert {found[-1] for found in (await sizes(vm)).values()} == {4 * MIB, 5 * MIB}
    await vm.delete_snapshots("large", "small")
    await hold_invariants(vm)
    assert (await vm.check()).findings == ()


@pytest.mark.parametrize("by", ["snapshot-load", "loadvm", None])
async def test_a_snapshot_inside_the_layer_brings_its_size_back(q: qmpsnap.Controller, by: LoadBy | None) -> None:
    """In the QEMU that runs, and taken out into a layer of its own where none does."""
    vm = await q.define(replace(SPEC, disks=SPEC.disks[::2]))
    if by:
        await vm.start(paused=True)
    await vm.snapshot("small", kind="internal")
    await vm.resize("vda", 4 * MIB)
    await vm.snapshot("large", kind="internal")
    for name, size in (("small", MIB), ("large", 4 * MIB), ("small", MIB)):
        await vm.revert(name, by=by)
        found = await sizes(vm)
        assert (found["vda"][-1], found["vdc"][-1]) == (size, MIB)
        await hold_invariants(vm)
    if by:
        async with user_monitor(vm) as monitor:
            drives: Any = await monitor.execute("query-block")
        assert {drive["inserted"]["image"]["virtual-size"] for drive in drives} == {MIB}


async def test_what_is_refused_changes_nothing(q: qmpsnap.Controller) -> None:
    vm = await q.define(SPEC)
    before = await sizes(vm)
    for size in ("", "x", "-1M", "0", "1000", "1M ", "1e6", "+", "+-5M", "9" * 30, "8E", 1.5, True):
        with pytest.raises(UsageError, match="is no size of a disk"):
            await vm.resize("vda", size)  # type: ignore[arg-type]
    for size in (MIB, "512K"):
        with pytest.raises(StateError, match="1048576 bytes"):
            await vm.resize("vda", size)
    with pytest.raises(NotFoundError, match="no disk"):
        await vm.resize("vdx", "2M")
    path = Path((await vm.chains())[0].active.path)
    path.chmod(0o400)
    if os.geteuid():
        with pytest.raises(HostCannot):
            await vm.resize("vda", "2M")
    path.chmod(0o600)
    assert await sizes(vm) == before
    assert [found.verb for found in context_of(vm).store.operations("still")] == ["define"]


async def test_a_disk_with_a_job_is_refused(q: qmpsnap.Controller, tmp_path: Path) -> None:
    vm = await q.define(SPEC)
    await vm.start(paused=True)
    async with user_monitor(vm) as monitor:
        node = (await vm.chains())[0].active.id
        file = {"driver": "file", "filename": _made(tmp_path / "mine", MIB)}
        await monitor.execute("blockdev-add", {"node-name": "mine", "driver": "raw", "file": file})
        await monitor.execute(
            "blockdev-mirror", {"job-id": "mine", "device": node, "target": "mine", "sync": "full", "speed": 1}
        )
        with pytest.raises(StateError, match="busy with job mine"):
            await vm.resize("vda", "2M")
        await vm.resize("vdb", "2M")
        assert ((await sizes(vm))["vda"], (await sizes(vm))["vdb"]) == ([MIB], [2 * MIB])
        await monitor.execute("block-job-cancel", {"device": "mine", "force": True})


def _made(path: Path, size: int) -> str:
    path.touch()
    os.truncate(path, size)
    return str(path)


async def test_a_dry_run_tells_and_changes_nothing(q: qmpsnap.Controller) -> None:
    vm = await q.define(SPEC)
    plan = (await vm.plan_resize("vda", "2M")).details
    assert (plan.disk, plan.size, plan.live) == ("vda", 2 * MIB, False)
    assert (await sizes(vm))["vda"] == [MIB]
    assert context_of(vm).home.machine_dir("still").is_dir()
