"""Snapshots by other QMP commands than the usual ones, for people who test QEMU: the same outcome is asked of each."""

from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.errors import QmpError, StateError, StoreMismatch, UsageError
from qmpsnap.model.machines.spec import DiskSpec, Encryption, MachineSpec, Opened
from qmpsnap.ops.session import file_nodes
from tests.live.digest import raw_digest
from tests.live.machine import MIB, active_hash, content_hash, fill, hold_invariants, snapshot_hashes, user_monitor
from tests.live.test_internal import tag_hash

pytestmark = pytest.mark.version

SYNC: Final = "blockdev-snapshot-sync"


async def file_node(vm: qmpsnap.MachineHandle, layer: str) -> Any:
    """What QEMU has of the node below a layer's, and of the layer's."""
    async with user_monitor(vm) as qemu:
        nodes: Any = await qemu.execute("query-named-block-nodes", {"flat": True})
    above = next(node for node in nodes if node["node-name"] == layer)
    below = next(node for node in nodes if node["file"] == above["file"] and node["drv"] == "file")
    return above, below


async def test_sync_leaves_what_the_usual_command_leaves(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await vm.snapshot("s1")
    usual, _ = await file_node(vm, (await vm.chains())[0].active.id)
    await fill(vm, "vda", 2, offset=MIB)
    taken = await vm.snapshot("s2", by=SYNC)
    assert (taken.kind, taken.state) == ("disk", "ok")
    layer = (await vm.chains())[0].active.id
    above, below = await file_node(vm, layer)
    assert below["node-name"].startswith("#block")
    same = ("cache", "ro", "drv", "detect_zeroes", "encrypted", "write_threshold")
    assert {key: above[key] for key in same} == {key: usual[key] for key in same}
    process = (await vm.record()).process
    assert process is not None
    assert process.nodes[f"{layer}.file"] == below["node-name"]
    assert set(process.nodes) == {f"{chain.active.id}.file" for chain in await vm.chains()}
    await fill(vm, "vda", 3, offset=2 * MIB)
    hashes = await snapshot_hashes(vm)
    await hold_invariants(vm, hashes)
    # A merge opens the layer that it has written to anew, by the name of the node below.
    await vm.snapshot("s3")
    await fill(vm, "vda", 4, offset=3 * MIB)
    await vm.snapshot("s4")
    await vm.commit("vda", base=layer, top="s4", consume=True)
    await hold_invariants(vm)
    await vm.delete_snapshots("s2", "s4")
    await vm.stream("vda")
    await hold_invariants(vm)
    await vm.stop(force=True)
    await vm.start(paused=True)
    process = (await vm.record()).process
    assert process is not None
    assert process.nodes == {}
    await hold_invariants(vm)


async def test_sync_with_memory_and_in_chosen_files(
    q: qmpsnap.Controller, still_spec: MachineSpec, place: Path
) -> None:
    vm = await q.define(still_spec)
    await vm.start()
    await fill(vm, "vda", 1)
    await vm.snapshot("memory", kind="full", by=SYNC)
    await vm.snapshot("chosen", by=SYNC, files={"vda": place / "chosen.qcow2"})
    await fill(vm, "vda", 2)
    assert (await vm.chains())[0].active.path == str(place / "chosen.qcow2")
    await hold_invariants(vm)
    done = await vm.revert("memory", discard=True, state="paused")
    assert done.memory
    await hold_invariants(vm)


async def test_names_are_learnt_in_recovery(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await vm.snapshot("s1")

    def another(*_: Any, **__: Any) -> None:
        raise StoreMismatch("another file")

    with monkeypatch.context() as patch:
        patch.setattr("qmpsnap.ops.snapshot.create.require_opened", another)
        with pytest.raises(StoreMismatch, match="another file") as told:
            await vm.snapshot("s2", by=SYNC)
    assert told.value.effect == "applied"  # the guest writes to the new layers already
    process = (await vm.record()).process
    assert process is not None
    assert set(process.nodes) == {f"{chain.active.id}.file" for chain in await vm.chains()}
    await hold_invariants(vm)


async def test_what_sync_would_open_otherwise_is_refused(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    with pytest.raises(StateError, match="is stopped: there is no QEMU to send blockdev-snapshot-sync to"):
        await vm.snapshot(by=SYNC)
    with pytest.raises(UsageError, match="snapshots of kind volume are not taken by"):
        await vm.snapshot(kind="volume", by=SYNC)  # type: ignore[call-overload]
    for disk, lost in (
        (DiskSpec(name="vda", encryption=Encryption()), "without its key"),
        (DiskSpec(name="vda", opened=Opened(format={"detect-zeroes": "unmap", "discard": "unmap"})), "detect-zeroes"),
        (DiskSpec(name="vda", opened=Opened(file={"aio": "native", "cache": {}})), "without aio"),
    ):
        record = replace(await vm.record(), spec=MachineSpec(name="x", disks=(disk,)))
        with pytest.raises(StateError, match=lost):
            file_nodes.require_inherited(record, ["vda"], command=SYNC, default="blockdev-snapshot")


@pytest.mark.parametrize("start", ["paused", "stopped"])
async def test_drive_mirror(q: qmpsnap.Controller, still_spec: MachineSpec, place: Path, start: str) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await vm.snapshot("s1")
    await fill(vm, "vda", 2, offset=MIB)
    if start == "stopped":
        await vm.stop(force=True)
    held, hashes = await active_hash(vm), await snapshot_hashes(vm)
    plan = await vm.plan_mirror("vda", place / "copy", mode="pivot", by="drive-mirror")
    assert [command["execute"] for command in plan.qmp] == ["drive-mirror"]
    await vm.mirror("vda", place / "finished.raw", mode="finish", format="raw", by="drive-mirror")
    assert raw_digest(place / "finished.raw") == await content_hash(
        vm, (await vm.add_layers(disks=["vda"]))[0].backing or ""
    )
    done = await vm.mirror("vda", place / "copy", mode="pivot", by="drive-mirror")
    assert done.layer is not None
    chain = (await vm.chains())[0]
    assert [at.layer.path for at in chain.layers] == [str(place / "copy")]
    process = (await vm.record()).process
    assert (set(process.nodes) if process else set()) == ({f"{done.layer}.file"} if start == "paused" else set())
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == held
    if start == "paused":
        await vm.snapshot("s2")
        await fill(vm, "vda", 3, offset=2 * MIB)
        await vm.snapshot("s3")
        await vm.commit("vda", base=done.layer, top="s3", consume=True)
        await hold_invariants(vm)


async def test_what_drive_mirror_refuses(q: qmpsnap.Controller, still_spec: MachineSpec, place: Path) -> None:
    vm = await q.define(still_spec)
    await vm.snapshot("s1")
    with pytest.raises(UsageError, match="backing file of a shallow copy a second time"):
        await vm.mirror("vda", place / "copy", mode="pivot", shallow=True, by="drive-mirror")
    await vm.start(paused=True)
    assert (await vm.record()).process is not None
    await hold_invariants(vm)


# --- inside the images ------------------------------------------------------------------------------------------------


@pytest.fixture
def qcow2_spec() -> MachineSpec:
    return MachineSpec(
        name="still",
        memory=64 * MIB,
        disks=(DiskSpec(name="vda", size=16 * MIB), DiskSpec(name="vdb", size=16 * MIB)),
        agent=False,
    )


async def test_savevm_loadvm_delvm(q: qmpsnap.Controller, qcow2_spec: MachineSpec) -> None:
    vm = await q.define(qcow2_spec)
    with pytest.raises(StateError, match="has no memory to save"):
        await vm.snapshot("inside", kind="internal", by="savevm")
    await vm.start()
    await fill(vm, "vda", 1)
    plan = await vm.plan_snapshot("inside", kind="internal", by="savevm")
    assert {"execute": "human-monitor-command", "arguments": {"command-line": f"savevm {plan.details.tag}"}} in plan.qmp
    taken = await vm.snapshot("inside", kind="internal", by="savevm")
    assert taken.inside is not None
    assert taken.inside.bytes > 0
    assert taken.inside.layer in {point.layer for point in taken.points}
    assert await vm.state() == "running"
    held = await tag_hash(vm, taken.points[0].layer, str(taken.points[0].tag))
    await fill(vm, "vda", 2)
    process = (await vm.record()).process
    for by in ("loadvm", "snapshot-load"):
        done = await vm.revert("inside", discard=True, by=by, after=False)
        assert (done.memory, done.state, done.kept) == (True, "running", None)
    kept = (await vm.revert("inside", by="loadvm", state="paused", after=False)).kept
    assert kept is not None
    assert await vm.state() == "paused"
    assert (await vm.record()).process == process
    await hold_invariants(vm)
    assert await active_hash(vm) == held
    await vm.delete_snapshots("inside", kept.name, by="delvm")
    async with user_monitor(vm) as qemu:
        nodes: Any = await qemu.execute("query-named-block-nodes", {"flat": True})
    assert [node["image"].get("snapshots") for node in nodes if node["image"].get("snapshots")] == []
    await hold_invariants(vm)


async def test_what_the_human_monitor_would_do_unasked_is_refused(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start(paused=True)
    with pytest.raises(UsageError, match="always saves the memory"):
        await vm.snapshot(kind="internal", by="savevm", memory=False)
    with pytest.raises(UsageError, match="are not taken by savevm"):
        await vm.snapshot(by="savevm")  # type: ignore[call-overload]
    inside = await vm.snapshot("inside", kind="internal", by="savevm")
    tag = inside.points[0].tag
    with monkeypatch.context() as patch:
        patch.setattr("qmpsnap.ops.internal.create.tag_of", lambda *_: tag)
        with pytest.raises(StateError, match=f"savevm would replace the snapshot {tag}"):
            await vm.snapshot("again", kind="internal", by="savevm")
    assert [found.name for found in await vm.snapshots()] == ["inside"]
    await vm.snapshot("above")
    with pytest.raises(StateError, match="loadvm cannot load snapshot inside"):
        await vm.revert("inside", by="loadvm")
    with pytest.raises(StateError, match="delvm cannot delete snapshot inside"):
        await vm.delete_snapshots("inside", by="delvm")
    await hold_invariants(vm)


async def test_savevm_refuses_raw_flash(q: qmpsnap.Controller, qcow2_spec: MachineSpec) -> None:
    vm = await q.define(replace(qcow2_spec, firmware="uefi"))
    await vm.start(paused=True)
    with pytest.raises(StateError, match="savevm would put a snapshot into the flash"):
        await vm.snapshot("inside", kind="internal", by="savevm")
    assert await vm.snapshots() == ()


async def test_a_loadvm_that_fails_leaves_the_disks_at_the_snapshot(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await vm.snapshot("inside", kind="internal", by="savevm")
    await fill(vm, "vda", 2)

    async def fails(*_: Any, **__: Any) -> None:
        raise QmpError("QEMU's loadvm failed: Error")

    monkeypatch.setattr("qmpsnap.qmp.human.execute", fails)
    with pytest.raises(QmpError, match="loadvm failed") as told:
        await vm.revert("inside", discard=True, by="loadvm")
    assert told.value.effect == "applied"
    assert (await vm.state(), (await vm.record()).current) == ("stopped", "inside")
    await hold_invariants(vm)
