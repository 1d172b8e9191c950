"""What a handle tells of its machine without being asked again: events, states, its own text; on a real QEMU."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

import qmpsnap
from qmpsnap import JobChanged, Shortage, ShortageChanged, ShortageKind, State, StateChanged
from qmpsnap.ops.base import free_space
from tests.live.machine import ONE_DISK, grown, user_monitor

pytestmark = pytest.mark.version


async def until(events: AsyncIterator[qmpsnap.Event], found: Callable[[qmpsnap.Event], bool]) -> qmpsnap.Event:
    async for event in events:
        if found(event):
            return event
    raise AssertionError("they have ended")


async def test_events_tell_states_and_end_with_qemu(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    assert [event async for event in vm.events()] == [StateChanged(state=State.STOPPED, before=None)]
    await vm.start(paused=True)
    events = vm.events(interval=0.02)
    assert await anext(events) == StateChanged(state=State.PRELAUNCH, before=None)
    await vm.resume()
    running = await until(events, lambda event: isinstance(event, StateChanged))
    assert running == StateChanged(state=State.RUNNING, before=State.PRELAUNCH)
    assert repr(vm) == "<Machine still running>"
    await vm.pause()
    paused = await until(events, lambda event: isinstance(event, StateChanged))
    assert paused == StateChanged(state=State.PAUSED, before=State.RUNNING)
    await vm.stop(force=True)
    rest = [event async for event in events]
    assert rest == [StateChanged(state=State.STOPPED, before=State.PAUSED)]


async def test_another_qemu_ends_them_too(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    await vm.snapshot("s")
    events = vm.events(interval=0.02)
    await anext(events)
    await vm.revert("s", state="paused")  # ends QEMU and starts another
    assert [event async for event in events] == [StateChanged(state=State.STOPPED, before=State.PRELAUNCH)]
    assert await vm.is_running()


async def test_events_tell_of_jobs_of_a_verb_at_work(q: qmpsnap.Controller, slow_jobs: None) -> None:
    vm = await grown(q, "s1", "s2")
    events = vm.events(interval=0.02)
    job = vm.stream("vda")
    async for info in job.progress():
        if info.status == "running":
            break
    begun = await until(events, lambda event: isinstance(event, JobChanged))
    assert isinstance(begun, JobChanged)
    assert (begun.job.type, begun.ended) == ("stream", False)
    await job.cancel()
    ended = await until(events, lambda event: isinstance(event, JobChanged) and event.ended)
    assert isinstance(ended, JobChanged)
    assert ended.job.id == begun.job.id
    await events.aclose()


async def test_events_tell_of_shortage(q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    monkeypatch.setattr(free_space, "room", lambda _: free_space.Room(1, 5 << 20))
    events = vm.events(interval=0.02)
    short = await until(events, lambda event: isinstance(event, ShortageChanged))
    assert isinstance(short, ShortageChanged)
    (one,) = short.shortage
    assert (one.kind, one.disks, one.free) == (ShortageKind.LOW, ("vda",), 5 << 20)
    assert str(one).startswith("only 5 MiB are free at")
    assert str(Shortage(kind=ShortageKind.UNKNOWN)).startswith("the free space is unknown")
    await events.aclose()


async def test_a_busy_or_hanging_qemu_is_looked_at_again(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    events = vm.events(interval=0.02)
    await anext(events)
    told = asyncio.create_task(until(events, lambda event: isinstance(event, StateChanged)))
    async with user_monitor(vm) as qemu:
        await qemu.execute("cont")
        assert await told == StateChanged(state=State.RUNNING, before=State.PRELAUNCH)
    await events.aclose()


async def test_handles_are_equal_by_machine_and_tell_its_state(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    assert repr(vm) == "<Machine still stopped>"
    again = await q.machine("still")
    assert vm == again
    assert {vm, again} == {vm}
    assert vm != await q.define(qmpsnap.MachineSpec(name="other", disks=ONE_DISK.disks))
    assert vm != "still"
    await again.start(paused=True)
    assert repr(again) == "<Machine still prelaunch>"
    state = await vm.state()
    assert (state, str(state), state.has_qemu, state.guest_runs) == ("prelaunch", "prelaunch", True, False)
    await vm.stop(force=True)
    assert repr(again) == "<Machine still stopped>"
    await vm.undefine(disks="remove")
    assert repr(vm) == "<Machine still undefined>"


def test_a_state_of_a_later_qemu_is_its_text() -> None:
    later = State("frobnicating")
    assert (later, str(later), repr(later)) == ("frobnicating", "frobnicating", "<State.frobnicating: 'frobnicating'>")
    assert later.has_qemu
    assert not later.guest_runs
    assert State("paused: no space") is State.NO_SPACE
    assert State.NO_SPACE.disk_failed
    with pytest.raises(ValueError, match="3 is not a valid State"):
        State(3)  # type: ignore[arg-type]
