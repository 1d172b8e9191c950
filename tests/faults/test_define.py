"""The controller dies around each step of `define`. Then: the same once more, and the machine works."""

from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.model.operations import steps
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.harness import watch
from tests.harness.deaths import Point
from tests.live.machine import hold_invariants

CASES = [(step.name, when) for step in steps.STEPS["define"] for when in watch.WHEN]


@pytest.mark.short
@pytest.mark.parametrize(("step", "when"), CASES)
async def test_killed(q: qmpsnap.Controller, home: Path, fault: Fault, step: str, when: watch.When) -> None:
    fault.case("kill -9: controller", "define")
    died = await controller_dies("define", home, Point("define", step, when))
    assert died.died, died.said
    fault.reached("define", step)
    there = [vm.name for vm in await q.machines()]
    assert there == (["still"] if (step, when) == (steps.SETTLED, "after") else [])
    vm = await q.machine("still") if there else await q.define(site.TWO)
    assert len(list((home / "machines" / "still").glob("vd*"))) == len(site.TWO.disks), "an image was left behind"
    await hold_invariants(vm)
    await vm.snapshot("afterwards")
    await hold_invariants(vm)
