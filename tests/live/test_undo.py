"""What is refused or undone, so that nothing of the guest's goes: disks resized, a store put back, a job refused."""

from typing import Any

import pytest

import qmpsnap
from qmpsnap.errors import StoreMismatch
from qmpsnap.model.spec import MachineSpec
from tests.live.machine import MIB, fill, hold_invariants, user_monitor


async def _resize(vm: qmpsnap.MachineHandle, node: str, size: int) -> None:
    async with user_monitor(vm) as qemu:
        await qemu.execute("block_resize", {"node-name": node, "size": size})


@pytest.mark.parametrize("disk", ["vda", "vdb"], ids=["qcow2", "raw"])
async def test_no_layer_goes_over_a_disk_that_was_resized_behind_us(
    q: qmpsnap.Controller, still_spec: MachineSpec, disk: str
) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    node = next(view.active.id for view in await vm.chains() if view.disk == disk)
    await _resize(vm, node, 32 * MIB)
    await fill(vm, disk, 7, offset=30 * MIB)
    with pytest.raises(StoreMismatch, match="resized behind qmpsnap; nothing was changed") as refused:
        await vm.snapshot("s")
    assert refused.value.effect == "none"
    assert "undefine" in refused.value.hint
    assert await vm.snapshots() == ()
    async with user_monitor(vm) as qemu:
        backends: Any = await qemu.execute("query-block")
    sizes = {str(b["inserted"]["node-name"]): b["inserted"]["image"]["virtual-size"] for b in backends}
    assert sizes[node] == 32 * MIB
    await _resize(vm, node, 16 * MIB)
    await vm.snapshot("s")
    await hold_invariants(vm)
