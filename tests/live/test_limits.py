"""What would fail later is refused at its first place, and what the hint says is done and helps."""

import shlex
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import ImageRefused, StateError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.base import overlays
from tests.live.machine import MIB, hold_invariants


async def test_a_raw_image_of_odd_size_past_the_page_cache(q: qmpsnap.Controller, place: Path) -> None:
    image = place / "an odd.raw"
    image.write_bytes(bytes(1_000_000))
    disk = DiskSpec(name="vda", image=str(image), format="raw", cache="none")
    with pytest.raises(ImageRefused, match="with a multiple of 512") as refused:
        await q.define(MachineSpec(name="m", disks=(disk,)), folders=[place])
    await q.define(MachineSpec(name="other", disks=(replace(disk, cache="writeback"),)), folders=[place])
    await (await q.machine("other")).undefine(disks="keep")
    await anyio.run_process(shlex.split(refused.value.hint.partition(", or")[0]))
    await q.define(MachineSpec(name="m", disks=(disk,)), folders=[place])


async def test_no_chain_is_made_that_could_not_be_defined_again(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlays, "MAX_LAYERS", 3)
    vm = await q.define(MachineSpec(name="m", disks=(DiskSpec(name="vda", size=MIB),)))
    for name in ("a", "b"):
        await vm.snapshot(name)
    for refused in (vm.snapshot("c"), vm.plan_snapshot("c"), vm.add_layers()):
        with pytest.raises(StateError, match="disk vda has 3 layers") as error:
            await refused
        assert error.value.effect == "none"
        assert "qmpsnap stream" in as_typed(error.value.hint)
    await vm.revert("b")
    top = (await vm.chains())[0].active.path
    with pytest.raises(StateError, match="disk vda has 3 layers"):
        await q.define(MachineSpec(name="clone", disks=(DiskSpec(name="vda", base=top),)))
    await vm.stream("vda")
    await vm.snapshot("c")
    await hold_invariants(vm)
    top = (await vm.chains())[0].active.path
    await vm.undefine(disks="keep")
    await q.define(MachineSpec(name="again", disks=(DiskSpec(name="vda", image=top),)))
