"""No fault at all: the verb comes to its end by the steps that it is said to come by."""

from pathlib import Path

import pytest

import qmpsnap
from tests.faults import site
from tests.faults.deaths import ends_by_itself
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, ready
from tests.harness import watch


@pytest.mark.short
@pytest.mark.parametrize("name", SCENARIOS)
async def test_undisturbed(q: qmpsnap.Controller, place: Path, fault: Fault, name: str) -> None:
    scenario = SCENARIOS[name]
    fault.case("none", scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    came_by: list[str] = []

    def hook(verb: str, step: str, when: watch.When) -> None:
        if (verb, when) == (scenario.verb, "after") and step not in came_by:
            came_by.append(step)

    with watch.watching(hook):
        assert await ends_by_itself(lambda: scenario.act(vm, place)) == scenario.ends
    assert sorted(step for step in came_by if not step.startswith("(")) == sorted(scenario.steps)
    await site.judge(vm, place, before, scenario.expected)
