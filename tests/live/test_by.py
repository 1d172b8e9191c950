"""Snapshots by other QMP commands than the usual ones, for people who test QEMU: the same outcome is asked of each."""

from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.errors import StateError, StoreMismatch, UsageError
from qmpsnap.model.machines.spec import DiskSpec, Encryption, MachineSpec, Opened
from qmpsnap.ops.session import file_nodes
from tests.live.machine import MIB, fill, hold_invariants, snapshot_hashes, user_monitor

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
