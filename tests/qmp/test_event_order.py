"""Events in any order, twice, of somebody else's, or never: the end is the same, because a query decides."""

import math
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu.qmp import Message

from qmpsnap.errors import HostCannot, QemuGone, QmpError, StateError
from qmpsnap.model.layers.vmstate import Hardware
from qmpsnap.model.names import JobId
from qmpsnap.model.operations.memory import Memory
from qmpsnap.ops.memory import save
from qmpsnap.qmp import jobs, session
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import JobStuck
from qmpsnap.qmp.session import Session
from qmpsnap.testing import HELLO, Event, Expect, Refuse, Reply, Turn, scripted

JOB = JobId("qs.1.vda")

NOISE = st.lists(
    st.builds(
        Event,
        st.sampled_from(["JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR", "BLOCK_JOB_READY", "STOP", "RESUME", "MIGRATION"]),
        st.integers(-5, 5),
    ),
    max_size=3,
)
"""What QEMU says by itself between two answers."""

UNDER_WAY = st.sampled_from(["created", "running", "running", "paused", "standby", "waiting", "aborting"])
ENDS = st.sampled_from(["ready", "pending", "concluded", "failed", "gone", "nospace"])


def fuzzed(examples: int) -> settings:
    """The same examples every time."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


def transcript(turns: Sequence[Turn], noise: Sequence[Sequence[Event]]) -> list[Turn]:
    """The turns, with events before each answer as far as there are any."""
    left = list(noise)
    mixed: list[Turn] = []
    for turn in turns:
        if isinstance(turn, Reply) and left:
            mixed += left.pop()
        mixed.append(turn)
    return mixed


def played(turns: Sequence[Turn], act: Callable[[Session], Awaitable[Any]]) -> Any:
    """What becomes of ``act`` on a monitor that plays the turns: its result, or its error."""

    async def run() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "qmp"
            async with scripted(path, *HELLO, *turns), session.connect(path, machine="web") as monitor:
                with anyio.fail_after(30):
                    try:
                        return await act(monitor)
                    except (QmpError, QemuGone, HostCannot, StateError) as error:
                        return error

    real = session._EventBell.wait

    async def soon(bell: session._EventBell, seconds: float) -> None:
        await real(bell, min(seconds, 0.002))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session._EventBell, "wait", soon)
        return anyio.run(run)


def queried(states: Sequence[str], left: Sequence[int] = ()) -> list[Turn]:
    """What is asked and answered while a job goes through these states."""
    turns: list[Turn] = []
    rest = list(left)
    for state in states:
        more = {"current-progress": 10, "total-progress": 10 + rest.pop(0)} if rest else {}
        status = {"failed": "concluded", "nospace": "paused"}.get(state, state)
        info = {"id": JOB, "type": "commit", "status": status, **more}
        if state == "failed":
            info["error"] = "No such luck"
        others = [{"id": "another", "type": "backup", "status": "concluded", "error": "not ours"}]
        turns += [Expect("query-jobs"), Reply([*others, *([] if state == "gone" else [info])])]
        if status == "paused":
            found = {"device": JOB, "io-status": "nospace" if state == "nospace" else "ok", "type": "commit"}
            turns += [Expect("query-block-jobs"), Reply([found])]
    return turns


def expected(end: str) -> Any:
    return {"failed": QmpError, "gone": QemuGone, "nospace": JobStuck}.get(end, end)


@fuzzed(80)
@given(st.lists(UNDER_WAY, max_size=5), ENDS, st.lists(NOISE, max_size=8))
def test_a_job_is_followed_to_the_same_end(before: list[str], end: str, noise: list[list[Event]]) -> None:
    turns = transcript(queried([*before, end]), noise)
    found = played(turns, lambda monitor: jobs.follow(monitor, JOB, "ready", "pending"))
    told = found.status if isinstance(found, JobInfo) else type(found)
    assert told == expected(end)


@fuzzed(80)
@given(
    st.lists(st.integers(0, 3), max_size=6), ENDS, st.sampled_from(["blocking", "outrun"]), st.lists(NOISE, max_size=8)
)
def test_an_outrun_mirror_is_told_once_to_hold_its_guest(
    left: list[int], end: str, told_as: str, noise: list[list[Event]]
) -> None:
    """With no patience at all: at the first look at which there is no less to do than at the best one before."""
    turns: list[Turn] = []
    least, told = 1 << 63, False
    for rest in left:
        turns += queried(["running"], [rest])
        if 10 + rest and rest < least:
            least = rest
        elif not told:
            told = True
            arguments = {"id": JOB, "type": "mirror", "copy-mode": "write-blocking"}
            answer = Reply() if told_as == "blocking" else Refuse("CommandNotFound", "no such command")
            turns += [Expect("block-job-change", arguments), answer]
    turns += queried([end])
    seen: list[str] = []
    found = played(
        transcript(turns, noise),
        lambda monitor: jobs.follow_mirror(
            monitor, JOB, "ready", "pending", patience=-1, report=lambda info: seen.append(info.status)
        ),
    )
    assert (found.status if isinstance(found, JobInfo) else type(found)) == expected(end)
    assert (told_as in seen) == told


PAGES = {"transferred": 1, "remaining": 1, "total": 2, "normal": 1, "duplicate": 0}
SAVES = {
    "tracks": {"status": "active", "ram": PAGES},
    "completed": {"status": "completed", "ram": PAGES},
    "failed": {"status": "failed", "error-desc": "no space"},
    "cancelled": {"status": "cancelled"},
}


def behind(*, resume: bool) -> Memory:
    """A memory to be saved behind a guest."""
    return Memory(
        path="/memory",
        part="/memory.part",
        mode="background",
        layout="stream",
        compression="none",
        hardware=Hardware(
            uuid="", qemu_version="10.0.0", machine_type="q35", accel="tcg", cpu="max", cpus=1, memory=1, devices=()
        ),
        resume=resume,
    )


def held(turns: list[Turn], how: Memory, transact: Callable[[], Awaitable[None]]) -> Any:
    return played(turns, lambda monitor: save.hold(monitor, how, {"uri": "fd:x"}, transact, machine="web"))


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("state", ["guest-panicked", "watchdog", "shutdown", "running"])
def test_a_guest_that_does_not_stand_still_because_of_us_is_left_alone(state: str, *, resume: bool) -> None:
    turns: list[Turn] = [Expect("stop"), Reply()] if resume else []
    turns += [Expect("query-status"), Reply({"status": state, "running": state == "running"})]
    turns += [Expect("query-migrate"), Reply({"status": "none"})]

    async def transact() -> None:
        pytest.fail("the disks have moved")

    assert isinstance(held(transcript(turns, []), behind(resume=resume), transact), StateError)


@fuzzed(80)
@given(
    st.lists(st.sampled_from([{"status": "setup"}, {"status": "active"}]), max_size=4),
    st.sampled_from(sorted(SAVES)),
    st.sampled_from(["running", "paused"]),
    st.lists(NOISE, max_size=10),
)
def test_the_guest_is_held_until_its_memory_is_fixed_and_never_longer(
    before: list[dict[str, str]], end: str, guest: str, noise: list[list[Event]]
) -> None:
    resume = guest == "running"
    how = behind(resume=resume)
    fails = end in ("failed", "cancelled")
    asked = [*before, SAVES[end], *([SAVES[end]] if fails else [])]  # who gives up looks once more
    turns: list[Turn] = [Expect("stop"), Reply()] if resume else []
    turns += [Expect("query-status"), Reply({"status": "paused", "running": False})]
    turns += [Expect("migrate", {"uri": "fd:x"}), Reply()]
    for answer in asked:
        turns += [Expect("query-migrate"), Reply(answer)]
    turns += [Expect("cont"), Reply()] if resume else []
    moved: list[bool] = []

    async def transact() -> None:
        moved.append(True)

    found = held(transcript(turns, noise), how, transact)
    assert moved == [True]
    if fails:
        assert isinstance(found, HostCannot)
    else:
        assert isinstance(found, save.Held)
        assert found.pause_ms is None or found.pause_ms >= 0
        assert ("cont" in found.steps) == resume


@pytest.mark.parametrize("stamp", [{"seconds": "x"}, {"seconds": None}, {"seconds": 10**400}, [], "x"])
def test_a_moment_that_is_none_is_not_a_number(stamp: Any) -> None:
    assert math.isnan(session._seconds(Message({"event": "STOP", "timestamp": stamp})))
