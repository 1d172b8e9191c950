"""``pause``, ``resume``, ``wakeup``: stop a guest's vCPUs; resume them, also if QEMU stopped them."""

import anyio

from qmpsnap.errors import DeadlinePassed, HostCannot, StateError
from qmpsnap.hint import call
from qmpsnap.machine.starting.run_files import QMP_SOCKET
from qmpsnap.model.machines.record import Machine
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, locked, require_own
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.outside import unseen_qemu
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.session import read_fitting, working
from qmpsnap.qmp import commands, runstate, status_poll
from qmpsnap.qmp.session import Monitor

RESUMABLE = frozenset({"paused", "prelaunch", runstate.NO_SPACE, runstate.FAILED})
"""States that ``cont`` leads out of, and in which it can do no harm."""

ASLEEP = RESUMABLE | {runstate.SUSPENDED}
"""States in which a guest does nothing, hears no button and answers nobody."""

WAKEUP_DEADLINE = 10.0
"""Seconds in which QEMU has woken a guest."""

AGAIN = 0.5
"""Seconds in which a request that failed before has failed again, if it still cannot be done."""


async def pause(context: Context, name: str) -> None:
    """Stop the vCPUs of a running guest; its QEMU stays."""
    async with working(context, name, "pause") as work:
        state = await _state(work.qemu)
        if work.qemu is None or state != "running":
            raise StateError(
                f"machine {name} is not running ({state})",
                hint=runstate.remedy(state, name) or ("" if work.qemu or work.machine.adopted else call("start", name)),
                machine=name,
            )
        await commands.control(work.qemu, "stop")


async def resume(context: Context, name: str) -> str:
    """Resume a guest, also one that something else paused; QEMU retries the request that it was paused for.

    Returns the run state then: a guest that was suspended when it was paused is suspended again.
    """
    machine = await context.astore.machine(name)
    require_own(context, machine)
    async with locked(context, name, "resume", anywhere=True), context.monitor(machine) as qemu:
        state = await _state(qemu)
        failed = state in {runstate.NO_SPACE, runstate.FAILED}
        if not failed:
            # Who was stopped by us, in the midst of something, runs again when that is ended, and no sooner. What QEMU
            # has paused by itself was not stopped by us, and must not wait for a job that needs the same space.
            await blocking(read_fitting, context, name)
            await recovery.end_open(MachineSession(context, machine, qemu))
            state = await _state(qemu)
        if qemu is None and await blocking(unseen_qemu.may_run, context.home, context.store, machine):
            raise unseen_qemu.not_running(name, hidden=True)
        if qemu is None or state not in RESUMABLE:
            raise StateError(
                f"machine {name} is not paused ({state})",
                hint=call("start", name) if qemu is None and not machine.adopted else runstate.remedy(state, name),
                machine=name,
            )
        await commands.control(qemu, "cont")
        if failed:
            await _require_running(machine, qemu)
        return await _state(qemu)


async def wakeup(context: Context, name: str) -> None:
    """Wake a guest that has put itself to sleep (ACPI S3)."""
    async with working(context, name, "wakeup") as work:
        state = await _state(work.qemu)
        if work.qemu is None or state != runstate.SUSPENDED:
            hint: str = call("resume", name) if state in RESUMABLE else ""
            if work.qemu is None and not work.machine.adopted:
                hint = call("start", name)
            raise StateError(f"the guest of machine {name} is not suspended ({state})", hint=hint, machine=name)
        async with work.qemu.listen("WAKEUP") as bell:
            await commands.control(work.qemu, "system_wakeup")
            with anyio.move_on_after(WAKEUP_DEADLINE):
                while await _state(work.qemu) == runstate.SUSPENDED:
                    await bell.wait(AGAIN)
                return
        raise DeadlinePassed(
            f"the guest of machine {name} did not wake up within {WAKEUP_DEADLINE:g} s",
            hint=call("state", name) + " shows its state",
            machine=name,
        )


async def require_awake(context: Context, machine: Machine) -> None:
    """Refuse what only a guest can do while its vCPUs are stopped; where QEMU cannot be asked at once, go on."""
    if machine.adopted or context.process(machine) is None:
        return
    sockets = {machine.name: context.home.run_dir(machine.name) / QMP_SOCKET}
    state = (await blocking(status_poll.states, sockets)).get(machine.name, "running")
    if state in ASLEEP:
        raise asleep(machine.name, state)


def asleep(name: str, state: str) -> StateError:
    """What a guest whose vCPUs are stopped is refused with."""
    return StateError(
        f"the guest of machine {name} is not running ({state})",
        hint=runstate.remedy(state, name) or call("resume", name),
        machine=name,
    )


async def _state(qemu: Monitor | None) -> str:
    return await commands.run_state(qemu) if qemu else "stopped"


async def _require_running(machine: Machine, qemu: Monitor) -> None:
    async with qemu.listen("STOP") as bell:
        with anyio.move_on_after(AGAIN):
            while (state := await commands.run_state(qemu)) not in {runstate.NO_SPACE, runstate.FAILED}:
                await bell.wait(AGAIN)
            raise HostCannot(
                f"the guest of machine {machine.name} was resumed and paused again at once ({state})",
                hint=runstate.remedy(state, machine.name),
                machine=machine.name,
            )
