"""The registry of the journal's steps: every kind of operation has some, and every form of a step is found in it."""

from typing import get_args

import pytest

from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import MergePlan, Plan


def test_every_kind_of_plan_has_its_steps_and_no_other() -> None:
    merges = set(get_args(MergePlan.__annotations__["verb"]))
    others = {str(plan.__struct_config__.tag) for plan in get_args(Plan) if plan is not MergePlan}
    assert set(steps.STEPS) == merges | others


@pytest.mark.parametrize("verb", steps.STEPS)
def test_it_begins_planned_and_ends_settled(verb: str) -> None:
    names = [step.name for step in steps.STEPS[verb]]
    assert (names[0], names[-1]) == (steps.PLANNED, steps.SETTLED)
    assert len(set(names)) == len(names)


def test_what_a_step_carries_is_not_part_of_its_name() -> None:
    assert steps.of_job(2, steps.FINALIZING, running=True) == "2:finalizing:running"
    assert steps.of_job(0, steps.STARTED, state=(3, 4, 5)) == "0:started:3:4:5"
    assert steps.of_file(steps.STARTED, 64769, 12) == "started:64769:12"
    assert steps.of_file(steps.STARTED, 64769, 12, birth=7, running=True) == "started:64769:12:born:7:running"
    assert steps.on_device("started:64769:12:born:7", {64769: 2}) == "started:2:12:born:7"
    for verb, step, name in (
        ("commit", steps.of_job(0, steps.FINALIZING, running=True), "N:finalizing"),
        ("commit", steps.of_job(0, steps.STARTED, state=(3, 4, 5)), "N:started"),
        ("delete", steps.of_job(12, steps.SETTLED), "N:settled"),
        ("mirror", steps.of_file(steps.STARTED, 64769, 12, running=True), "started:FILE"),
        ("create", steps.LOST, "memory lost"),
    ):
        assert steps.name_of(step) == name
        steps.require_known(verb, step)


@pytest.mark.parametrize("step", ["started", "0:made", "started:1:2", "0", ""])
def test_a_step_of_another_kind_is_refused(step: str) -> None:
    with pytest.raises(ValueError, match="has no step"):
        steps.require_known("commit", step)
