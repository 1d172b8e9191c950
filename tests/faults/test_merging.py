"""The controller dies around each step of a revert whose storage merges the snapshot into the active image."""

from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.model.operations import steps
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.faults.scenarios import _volume_before
from tests.harness import watch
from tests.harness.deaths import Point
from tests.volumes import copying

STEPS = [step.name for step in steps.STEPS["revert"]]
CASES = [
    (step, when, dies)
    for step in STEPS
    for when in watch.WHEN
    for dies in ("controller", "both")
    if dies == "controller" or step == steps.PLANNED or (step, when) == (steps.STOPPING, "before")
]


@pytest.mark.short(one_of="merging")
@pytest.mark.parametrize("case", CASES, ids="-".join)
async def test_killed(q: qmpsnap.Controller, place: Path, fault: Fault, case: tuple[str, watch.When, str]) -> None:
    step, when, dies = case
    fault.case("kill -9: controller" + " and QEMU" * (dies == "both"), "revert")
    vm = await q.define(site.TWO)
    await site.grow(vm, "s1", "s2")
    await vm.start(paused=True)
    await _volume_before(vm, place)
    before = await site.look(vm)
    layers = [chain.active.id for chain in await vm.chains()]
    died = await controller_dies("revert by merging", place, Point("revert", step, when), qemu_too=dies == "both")
    assert died.died, died.said
    fault.reached("revert", step)
    forward = STEPS.index(step) > STEPS.index(steps.STOPPING) or (step, when) == (steps.STOPPING, "after")

    async def ends_as_it_must() -> None:
        assert [chain.active.id for chain in await vm.chains()] == layers
        wanted = {disk: found for (name, disk), found in before.hashes.items() if name == "before"}
        assert await site.disk_hashes(vm) == (wanted if forward else before.disks)

    with copying.merging():
        await site.judge(vm, place, before, site.Expected(goes_to="before", ends=True), also=ends_as_it_must)
