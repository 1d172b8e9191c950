"""The controller dies around each step of `disk attach` and `disk detach`: the machine has the disk, or has it not."""

from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.model.operations import steps
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.harness import watch
from tests.harness.deaths import Point
from tests.live.machine import hold_invariants, snapshot_hashes

CASES = [
    (verb, step.name, when)
    for verb in ("disk-attach", "disk-detach")
    for step in steps.STEPS[verb]
    for when in watch.WHEN
]


@pytest.mark.short
@pytest.mark.parametrize("case", CASES, ids="-".join)
async def test_killed(q: qmpsnap.Controller, home: Path, fault: Fault, case: tuple[str, str, watch.When]) -> None:
    verb, step, when = case
    fault.case("kill -9: controller", "others")
    vm = await q.define(site.TWO)
    await vm.snapshot("before")
    hashes = await snapshot_hashes(vm)
    had = {"vda", "vdb"}
    will = {"vda", "vdb", "vdc"} if verb == "disk-attach" else {"vda"}
    died = await controller_dies(verb, home, Point(verb, step, when))
    assert died.died, died.said
    fault.reached(verb, step)
    await vm.recover()
    disks = {disk.name for disk in (await vm.record()).spec.disks}
    assert disks == {chain.disk for chain in await vm.chains()}
    assert disks == (will if step == steps.SETTLED else had) or (disks == had and when == "before")
    await hold_invariants(vm, hashes)
    assert (await vm.check()).findings == ()
    await vm.snapshot("afterwards")
    await vm.revert("before", hardware="snapshot")
    assert {chain.disk for chain in await vm.chains()} == had
    await hold_invariants(vm)
