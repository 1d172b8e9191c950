"""kill -9 around every step of every verb: of the controller, of it and QEMU, of QEMU alone. Then: recover."""

from pathlib import Path
from typing import Literal

import pytest
from msgspec import Struct

import qmpsnap
from tests.faults import site
from tests.faults.deaths import controller_dies, ends_by_itself
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, ended, ready
from tests.harness import watch
from tests.harness.deaths import Point
from tests.harness.processes import kill_qemu

Death = Literal["controller", "both", "QEMU"]
DEATHS: dict[Death, str] = {
    "controller": "kill -9: controller",
    "both": "kill -9: controller and QEMU",
    "QEMU": "kill -9: QEMU",
}


class Case(Struct, frozen=True):
    """A scenario, the step at which something dies, and what."""

    name: str
    step: str
    when: watch.When
    death: Death

    def __str__(self) -> str:
        return f"{self.name}-{self.step}-{self.when}-{self.death}"


CASES = [
    Case(name, step, when, death)
    for name, scenario in SCENARIOS.items()
    for step in scenario.steps
    for when in watch.WHEN
    for death in DEATHS
    if death == "controller" or step not in scenario.idle
]


def _params() -> list[object]:
    """In the short form every step of every scenario once before and once after, the deaths in turn.

    Of those at the same step of the same verb CI takes one.
    """
    params: list[object] = []
    turn: dict[tuple[str, str, str], list[Case]] = {}
    for case in CASES:
        at = (case.name, case.step, case.when)
        turn.setdefault(at, []).append(case)
    for place, ((name, step, when), deaths) in enumerate(turn.items()):
        short = pytest.mark.short(one_of=(SCENARIOS[name].verb, step, when))
        params += [
            pytest.param(case, id=str(case), marks=short if case is deaths[place % len(deaths)] else ())
            for case in deaths
        ]
    return params


@pytest.mark.parametrize("case", _params())
async def test_killed(q: qmpsnap.Controller, place: Path, fault: Fault, case: Case) -> None:
    scenario = SCENARIOS[case.name]
    fault.case(DEATHS[case.death], scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    point = Point(scenario.verb, case.step, case.when)
    well = False
    if case.death == "QEMU":
        well = await _qemu_dies(vm, place, case.name, point) == ""
    else:
        died = await controller_dies(case.name, place, point, qemu_too=case.death == "both")
        assert died.died, f"never came to {point}: {died.said}"
        assert died.killed == (case.death == "both"), "there was no QEMU to kill"
    fault.reached(scenario.verb, case.step)

    async def ends_as_it_must() -> None:
        # Under a controller that lives the step becomes durable all the same.
        at = (case.step, "after" if case.death == "QEMU" else case.when)
        forward = well or scenario.goes_forward(at, dies=case.death)
        await ended(scenario, vm, place, forward=forward)

    await site.judge(vm, place, before, scenario.expected, also=ends_as_it_must)


async def _qemu_dies(vm: qmpsnap.MachineHandle, place: Path, name: str, point: Point) -> str:
    """QEMU dies under a controller that lives: that has to end, with an error, which is told, or without."""
    killed: list[bool] = []

    def hook(verb: str, step: str, when: watch.When) -> None:
        if not killed and (verb, step, when) == (point.verb, point.step, point.when):
            killed.append(kill_qemu(vm))

    with watch.watching(hook):
        ended = await ends_by_itself(lambda: SCENARIOS[name].act(vm, place))
    assert killed == [True], f"never came to {point}, or there was no QEMU to kill"
    return ended
