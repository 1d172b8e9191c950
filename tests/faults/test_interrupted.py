"""Faults under a controller that lives: cancelled at any await, its monitor lost, its QEMU stopped by a signal."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.machine import qemu as machine
from qmpsnap.model.operations import steps
from qmpsnap.ops.memory import save
from qmpsnap.ops.session import recovery
from qmpsnap.qmp import session
from qmpsnap.qmp.session import Session
from tests.faults import claims, site
from tests.faults.deaths import ends_by_itself
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, ready
from tests.harness import watch
from tests.harness.awaits import Counted
from tests.harness.processes import qemus
from tests.live.machine import context_of, hold_invariants

LIVE = {name: scenario for name, scenario in SCENARIOS.items() if scenario.start != "stopped"}
AWAITS = (1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 20, 23, 26, 29, 33, 37, 41, 46, 51, 57, 64, 72, 81, 91, 102, 114, 127, 141)
QUICK = 1.0
"""Seconds after which a command to a stopped QEMU counts as unanswered."""


def _cancelled() -> list[object]:
    params: list[object] = []
    for place, name in enumerate(SCENARIOS):
        for turn, nth in enumerate(AWAITS):
            short = pytest.mark.short if turn % len(AWAITS) == place * 5 % len(AWAITS) else ()
            params.append(pytest.param(name, nth, id=f"{name}-await {nth}", marks=short))
    return params


@pytest.mark.parametrize(("name", "nth"), _cancelled())
async def test_cancelled_at_an_await(q: qmpsnap.Controller, place: Path, fault: Fault, name: str, nth: int) -> None:
    scenario = SCENARIOS[name]
    fault.case("cancelled at an await", scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    task = asyncio.current_task()
    assert task
    once = AWAITS.index(nth) % 2  # as asyncio cancels; anyio does so at every await from there on
    with anyio.CancelScope() as scope:
        counted = Counted(scenario.act(vm, place), nth, task.cancel if once else scope.cancel)
        try:
            with claims.hearing():
                await counted
        except asyncio.CancelledError:
            if not once:
                raise
            task.uncancel()
    if counted.count < nth:
        fault.too_late()
    await site.judge(vm, place, before, scenario.expected)


# --- cancelled while the store writes ---------------------------------------------------------------------------------

PATIENCE = 0.3
"""Seconds that the writing thread waits for the task that must not have left it."""


def _writes() -> list[object]:
    """Every scenario and each of its steps; in the short form each verb's step once."""
    cases = [(name, step) for name, scenario in SCENARIOS.items() for step in dict.fromkeys(scenario.steps)]
    first = {(SCENARIOS[name].column, step): (name, step) for name, step in reversed(cases)}
    return [
        pytest.param(name, step, id=f"{name}-{step}", marks=pytest.mark.short if (name, step) in first.values() else ())
        for name, step in cases
    ]


@pytest.mark.parametrize(("name", "step"), _writes())
async def test_cancelled_in_a_write(q: qmpsnap.Controller, place: Path, fault: Fault, name: str, step: str) -> None:
    """As Ctrl-C and ``asyncio.timeout`` do it, which anyio does not hold up; the thread takes no notice of it."""
    scenario = SCENARIOS[name]
    fault.case("cancelled in a write", scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    with _cancelling(scenario.verb, step) as run:
        await run(scenario.act(vm, place))
    fault.reached(scenario.verb, step)
    if scenario.happened and step == steps.SETTLED:
        assert await scenario.happened(vm, place), "it had ended well, and was undone"
    await site.judge(vm, place, before, scenario.expected)


@pytest.mark.short
@pytest.mark.parametrize("step", [step.name for step in steps.STEPS["define"]])
async def test_defining_is_cancelled_in_a_write(q: qmpsnap.Controller, fault: Fault, step: str) -> None:
    fault.case("cancelled in a write", "define")
    with _cancelling("define", step) as run:
        await run(q.define(site.TWO))
    fault.reached("define", step)
    there = [vm.name for vm in await q.machines()]
    assert there == (["still"] if step == steps.SETTLED else [])
    vm = await q.machine("still") if there else await q.define(site.TWO)
    await hold_invariants(vm)


@contextmanager
def _cancelling(verb: str, step: str) -> Iterator[Callable[[Awaitable[object]], Awaitable[None]]]:
    """Yields what runs a verb in a task, which is cancelled once, while the step is about to become durable."""
    loop = asyncio.get_running_loop()
    started: list[asyncio.Future[object]] = []
    cancelled = False

    def hook(of: str, at: str, when: watch.When) -> None:
        nonlocal cancelled
        if not cancelled and (of, at, when) == (verb, step, "before"):
            cancelled = True
            loop.call_soon_threadsafe(started[0].cancel)
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and not started[0].done():
                time.sleep(0.01)

    async def run(act: Awaitable[object]) -> None:
        started.append(asyncio.ensure_future(act))
        with contextlib.suppress(asyncio.CancelledError), claims.hearing():
            await started[0]

    with watch.watching(hook):
        yield run
    assert cancelled


# --- the monitor is lost ----------------------------------------------------------------------------------------------


@contextmanager
def _sessions() -> Iterator[list[Session]]:
    """Every session that is opened in the block."""
    found: list[Session] = []
    real = Session.__init__

    def init(self: Session, *arguments: Any) -> None:
        real(self, *arguments)
        found.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", init)
        yield found


def _cut(found: list[Session]) -> bool:
    cut = False
    for one in found:
        writer = one._client._writer
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                cut = True
    return cut


def _at_steps(*, every: int) -> list[object]:
    """Every live scenario and each of its steps, but the last, after which nothing is to be done."""
    cases = [
        (name, step) for name, at in LIVE.items() for step in at.steps if step != steps.SETTLED and step not in at.idle
    ]
    return [
        pytest.param(name, step, id=f"{name}-{step}", marks=pytest.mark.short if place % every == 0 else ())
        for place, (name, step) in enumerate(cases)
    ]


@pytest.mark.parametrize(("name", "step"), _at_steps(every=5))
async def test_the_monitor_is_lost(q: qmpsnap.Controller, place: Path, fault: Fault, name: str, step: str) -> None:
    scenario = SCENARIOS[name]
    fault.case("monitor lost", scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    lost: list[bool] = []
    with _sessions() as found:

        def hook(verb: str, at: str, when: watch.When) -> None:
            if not lost and (verb, at, when) == (scenario.verb, step, "after"):
                lost.append(_cut(found))

        with watch.watching(hook):
            await ends_by_itself(lambda: scenario.act(vm, place))
    assert lost == [True]
    fault.reached(scenario.verb, step)
    await site.judge(vm, place, before, scenario.expected)


# --- QEMU is stopped by a signal --------------------------------------------------------------------------------------


@contextmanager
def short_deadlines(stopped: list[int]) -> Iterator[None]:
    """From the moment QEMU is stopped nobody waits for long."""
    execute, connect = Session.execute, session.connect

    async def quick(self: Session, command: str, arguments: Any = None, *, deadline: float = 30.0) -> Any:
        return await execute(self, command, arguments, deadline=QUICK if stopped else deadline)

    def quick_connect(path: Path, *, machine: str, deadline: float = session.CONNECT_DEADLINE) -> Any:
        return connect(path, machine=machine, deadline=QUICK if stopped else deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "execute", quick)
        patch.setattr(session, "connect", quick_connect)
        patch.setattr(machine, "QUIT_DEADLINE", QUICK)
        patch.setattr(save, "RESUME_DEADLINE", QUICK)
        patch.setattr(recovery, "SETTLE_DEADLINE", 5 * QUICK)
        yield


@pytest.mark.parametrize(("name", "step"), _at_steps(every=6))
async def test_qemu_is_stopped(q: qmpsnap.Controller, place: Path, fault: Fault, name: str, step: str) -> None:
    scenario = SCENARIOS[name]
    fault.case("SIGSTOP of QEMU", scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    stopped: list[int] = []

    def hook(verb: str, at: str, when: watch.When) -> None:
        if not stopped and (verb, at, when) == (scenario.verb, step, "after"):
            stopped.extend(_stop(vm))

    try:
        with short_deadlines(stopped), watch.watching(hook):
            await ends_by_itself(lambda: scenario.act(vm, place))
        assert stopped
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    fault.reached(scenario.verb, step)
    await site.judge(vm, place, before, scenario.expected)


def _stop(vm: qmpsnap.MachineHandle) -> list[int]:
    pids = qemus(context_of(vm).home.run_dir(vm.name))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids
