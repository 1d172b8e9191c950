"""The controller dies around each step of a machine's `rename`. Then: it has one name, and so have all its files."""

from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.errors import NotFoundError
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.operations import steps
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.harness import watch
from tests.harness.deaths import Point
from tests.live.machine import context_of, hold_invariants, snapshot_hashes

CASES = [(step.name, when) for step in steps.STEPS["rename"] for when in watch.WHEN]


@pytest.mark.short
@pytest.mark.parametrize(("step", "when"), CASES)
async def test_killed(q: qmpsnap.Controller, home: Path, fault: Fault, step: str, when: watch.When) -> None:
    fault.case("kill -9: controller", "others")
    vm = await q.define(site.TWO)
    await vm.snapshot("before")
    base = context_of(vm).store.snapshots("still")[0].points[0].layer
    disk = DiskSpec(name="vda", base=context_of(vm).store.layer(base).path)
    clone = await q.define(replace(site.TWO, name="clone", disks=(disk,)))
    hashes = await snapshot_hashes(vm)
    died = await controller_dies("rename of a machine", home, Point("rename", step, when))
    assert died.died, died.said
    fault.reached("rename", step)
    try:
        await vm.recover()
    except NotFoundError:
        assert step == steps.SETTLED
    (name,) = {found.name for found in await q.machines()} - {"clone"}
    moved = (home / "machines" / "other").exists()
    assert name == ("other" if moved else "still")
    assert not (home / "machines" / ("still" if moved else "other")).exists()
    if step == steps.SETTLED:
        assert moved
    vm = await q.machine(name)
    await vm.recover()
    for one in (vm, clone):
        await hold_invariants(one)
    await hold_invariants(vm, hashes)
    await vm.snapshot("afterwards")
    await vm.rename("third")
    await clone.snapshot("own")
    await hold_invariants(clone)
