"""The controller dies around each step of `nic attach` and `nic detach`: the machine has the card, or has it not."""

from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.model.machines.spec import NicSpec
from qmpsnap.model.operations import steps
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.harness import watch
from tests.harness.deaths import Point
from tests.live.machine import hold_invariants
from tests.live.test_nics import macs

ONE = replace(site.TWO, nics=(NicSpec(),))
CASES = [("nic-attach", step.name, when) for step in steps.STEPS["nic-attach"] for when in watch.WHEN]


@pytest.mark.short
@pytest.mark.parametrize("case", CASES, ids="-".join)
async def test_killed(q: qmpsnap.Controller, home: Path, fault: Fault, case: tuple[str, str, watch.When]) -> None:
    verb, step, when = case
    fault.case("kill -9: controller", "others")
    vm = await q.define(ONE)
    await vm.start()
    died = await controller_dies(verb, home, Point(verb, step, when))
    assert died.died, died.said
    fault.reached(verb, step)
    await vm.recover()
    cards = len((await vm.record()).spec.nics)
    assert cards == (2 if step == steps.SETTLED else 1) == len(await macs(vm))
    await hold_invariants(vm)
    assert (await vm.check()).findings == ()


GOES = [(step.name, when) for step in steps.STEPS["nic-detach"] for when in watch.WHEN]


@pytest.mark.short
@pytest.mark.parametrize("case", GOES, ids="-".join)
async def test_killed_as_a_card_goes(
    q: qmpsnap.Controller, home: Path, fault: Fault, case: tuple[str, watch.When]
) -> None:
    """Of a machine that runs, whose guest does not answer; the last step is that of one that is stopped."""
    step, when = case
    fault.case("kill -9: controller", "others")
    vm = await q.define(replace(ONE, nics=()))
    await vm.attach_nic({})
    if step != steps.SETTLED:
        await vm.start()
    died = await controller_dies("nic-detach", home, Point("nic-detach", step, when))
    assert died.died, died.said
    fault.reached("nic-detach", step)
    await vm.recover()
    gone = (step, when) == (steps.SETTLED, "after")
    assert len((await vm.record()).spec.nics) == (0 if gone else 1)
    await hold_invariants(vm)
    assert (await vm.check()).findings == ()
