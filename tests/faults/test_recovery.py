"""A recovery dies as well, at its first or second word to the journal. Then: recover, as if it had not."""

from pathlib import Path

import pytest
from msgspec import Struct

import qmpsnap
from qmpsnap.model.operations import steps
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, ready
from tests.harness import watch
from tests.harness.deaths import Point

FIRST = "kill -9 of the recovery, too"


class Case(Struct, frozen=True):
    """Where the controller died, and at which word to the journal the recovery does."""

    name: str
    step: str
    qemu: str
    when: watch.When
    nth: int

    def __str__(self) -> str:
        return f"{self.name}-{self.step}-QEMU {self.qemu}-{self.when} word {self.nth}"


def _cases() -> list[Case]:
    return [
        Case(name, step, qemu, when, nth)
        for name, scenario in SCENARIOS.items()
        for step in scenario.steps
        if step != steps.SETTLED
        for qemu in ("lives", "dies")
        if qemu == "lives" or step not in scenario.idle
        for when in watch.WHEN
        for nth in (1, 2)
    ]


def _params() -> list[object]:
    """In the short form one death for each step; and the one step that only a recovery comes by.

    Of those at the same step of the same verb CI takes one.
    """
    params: list[object] = []
    for place, case in enumerate(_cases()):
        undone = SCENARIOS[case.name].verb in ("commit", "stream") and case.step == steps.PLANNED
        chosen = (undone and case.nth == 1 and case.when == "after") or place % 11 == 0
        short = pytest.mark.short(one_of=(SCENARIOS[case.name].verb, case.step, undone))
        params.append(pytest.param(case, id=str(case), marks=short if chosen else ()))
    return params


@pytest.mark.parametrize("case", _params())
async def test_killed(q: qmpsnap.Controller, place: Path, fault: Fault, case: Case) -> None:
    scenario = SCENARIOS[case.name]
    fault.case(FIRST, scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    point = Point(scenario.verb, case.step, "after")
    died = await controller_dies(case.name, place, point, qemu_too=case.qemu == "dies")
    assert died.died, died.said
    assert died.killed == (case.qemu == "dies")
    again = await controller_dies(case.name, place, Point("", "", case.when, case.nth), recovering=True)
    if not again.died:
        fault.too_late()  # it had no such word left to say
    for verb, step in again.steps:
        if not step.startswith("("):
            fault.reached(verb, step)
    await site.judge(vm, place, before, scenario.expected)
