"""A guest's clock after memory was loaded: what its agent answers, and when, says little about what it did."""

import time
from collections.abc import Sequence
from typing import Any, cast

import anyio
import pytest

from qmpsnap.errors import DeadlinePassed, QemuGone, QmpError
from qmpsnap.machine.agent import Agent
from qmpsnap.ops.memory import post_resume

REFUSED = QmpError("the guest agent refused guest-set-time: hwclock failed")


class Guest:
    """Its clock is years behind, and set ``delays`` seconds after it was told the time, or not at all."""

    def __init__(self, *delays: float | None, answers: Sequence[Exception | None] = (), asked: float = 0) -> None:
        self.behind = 8e8
        self.sets = 0
        self._delays = delays
        self._answers = answers
        self._asked = asked

    async def set_time(self, nanoseconds: int, *, deadline: float) -> None:  # noqa: ARG002 - as the agent
        delay = self._delays[self.sets]
        answer = self._answers[self.sets] if self._answers else None
        self.sets += 1
        if delay is not None:
            self.behind = time.time() + delay - nanoseconds / 1e9
        if answer:
            raise answer

    async def get_time(self, *, deadline: float) -> int:  # noqa: ARG002
        if self._asked < 0:
            raise QmpError("the guest agent refused guest-get-time: disabled")
        await anyio.sleep(self._asked)
        return round((time.time() - self.behind) * 1e9)


async def told(guest: Guest) -> post_resume.Told:
    return await post_resume.set_clock(cast("Agent", cast("Any", guest)))


async def test_a_clock_that_is_right_is_set_once() -> None:
    guest = Guest(0)
    found = await told(guest)
    assert (found.notes, guest.sets) == ((), 1)
    assert found.clock_error_ms is not None
    assert abs(found.clock_error_ms) < 200


async def test_one_that_was_set_late_is_set_again() -> None:
    guest = Guest(5, 0.7, 0)
    found = await told(guest)
    assert (found.notes, guest.sets) == ((), 3)
    assert found.clock_error_ms is not None
    assert abs(found.clock_error_ms) < 200


async def test_one_that_stays_wrong_is_told_with_how_far() -> None:
    found = await told(Guest(5, 5, 5))
    (note,) = found.notes
    assert "was set 3 times but may still be off by up to 5.0" in note
    assert found.clock_error_ms == pytest.approx(-5000, abs=200)


async def test_an_agent_that_is_slow_to_tell_leaves_a_doubt() -> None:
    (note,) = (await told(Guest(0, 0, 0, asked=0.3))).notes
    assert "may still be off by up to" in note


async def test_what_hwclock_says_is_not_what_became_of_the_clock() -> None:
    (note,) = (await told(Guest(0, answers=[REFUSED]))).notes
    assert note.startswith("the guest's clock was set, but")
    found = await told(Guest(None, None, None, answers=[REFUSED] * 3))
    assert found.notes[0].startswith("the guest's clock was not set and is off by up to 8000")
    assert found.clock_error_ms is not None


@pytest.mark.parametrize("error", [DeadlinePassed("late"), QemuGone("closed")])
async def test_no_answer_says_nothing(error: Exception) -> None:
    found = await told(Guest(0, answers=[error]))
    assert found.notes[0].startswith("it is unknown whether the guest's clock was set")
    assert found.clock_error_ms is None


async def test_an_agent_that_does_not_tell_the_time() -> None:
    assert (await told(Guest(0, asked=-1))).notes[0].startswith("the guest's clock was set; its offset is unknown")
    assert (await told(Guest(None, answers=[REFUSED], asked=-1))).notes == (
        "the guest's clock was not set: the guest agent refused guest-set-time: hwclock failed",
    )
