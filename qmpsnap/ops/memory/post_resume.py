"""After a guest has resumed from saved memory: set its clock, and announce its network cards.

The agent sets the guest's clock at once and then runs ``hwclock``, which takes a second or many, or fails: so its
answer says little about the clock. The clock itself is read, and set again until it is right.
"""

import time

import anyio
from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, QemuGone, QmpError, QmpsnapError
from qmpsnap.machine import agent
from qmpsnap.machine.agent import Agent
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.model.machines.record import Machine
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp import commands

DEADLINE = 5.0
"""Seconds the guest's agent has until it answers at all."""
CLOCK_DEADLINE = 20.0
"""Seconds for the clock, once the agent has answered: a guest's ``hwclock`` may wait for the next second, and longer.
"""
SETS = 3
"""How often the clock is set: the first time a guest that has just gone on may be slow to do so."""
NEAR_MS = 200.0
"""Milliseconds that the clock may be off, what we cannot tell of it included."""


class Told(Struct, frozen=True, kw_only=True):
    """What came of it: what did not succeed, one sentence each, and how far the guest's clock is ahead of the host's.

    That is less than 0 where it is behind; None where it was not asked for or could not be.
    """

    notes: tuple[str, ...] = ()
    clock_error_ms: float | None = None


async def tell(context: Context, machine: Machine) -> Told:
    """Announce the network cards and set the guest's clock.

    A guest without an agent keeps the time it had; it is not waited for.
    """
    try:
        async with context.monitor(machine) as qemu:
            if qemu is None:
                return Told()
            if machine.spec.nics:
                await commands.announce_self(qemu)
            listens = await commands.agent_listens(qemu)
    except QmpsnapError as error:
        return Told(notes=(f"the network was not announced and the clock was not set: {error.message}",))
    if not machine.spec.agent:
        return Told()
    if not listens:
        return Told(notes=("the guest's clock was not set: no guest agent runs",))
    try:
        socket = context.home.run_dir(machine.name) / AGENT_SOCKET
        async with agent.connect(socket, machine=machine.name, deadline=DEADLINE) as guest:
            return await set_clock(guest)
    except QmpsnapError as error:
        return Told(notes=(f"the guest's clock was not set: {error.message}",))


class _Asked(Struct, frozen=True):
    """How far the guest's clock is ahead, and how far from that it may be; milliseconds."""

    error_ms: float
    doubt_ms: float

    @property
    def near(self) -> bool:
        return abs(self.error_ms) + self.doubt_ms < NEAR_MS


async def set_clock(guest: Agent) -> Told:
    """Set the guest's clock to the host's, until it is :data:`NEAR_MS` near or was set :data:`SETS` times."""
    end = anyio.current_time() + CLOCK_DEADLINE
    said: QmpsnapError | None = None
    found: _Asked | None = None
    for _ in range(SETS):
        said = None
        try:
            await guest.set_time(time.time_ns(), deadline=_left(end))
        except QmpError as error:
            said = error  # of hwclock, it may be, after the clock was set
        except (DeadlinePassed, QemuGone) as error:
            return Told(notes=(f"it is unknown whether the guest's clock was set: {error.message}",))
        try:
            found = await _ask(guest, end)
        except (QmpError, DeadlinePassed, QemuGone) as error:
            if said:  # refused, and nothing says that it was set all the same
                return Told(notes=(f"the guest's clock was not set: {said.message}",))
            return Told(notes=(f"the guest's clock was set; its offset is unknown: {error.message}",))
        if found.near:
            break
    assert found
    return Told(notes=_notes(found, said), clock_error_ms=round(found.error_ms, 1))


def _notes(found: _Asked, said: QmpsnapError | None) -> tuple[str, ...]:
    if found.near:
        if said is None:
            return ()
        return (f"the guest's clock was set, but its agent did not complete cleanly: {said.message}",)
    off = f"by up to {(abs(found.error_ms) + found.doubt_ms) / 1000:.2f} s"
    if said:
        return (f"the guest's clock was not set and is off {off}: {said.message}",)
    return (f"the guest's clock was set {SETS} times but may still be off {off}",)


async def _ask(guest: Agent, end: float) -> _Asked:
    """Compare the guest's clock with the host's; it was read at some time between question and answer."""
    before, started = time.time_ns(), time.monotonic_ns()
    theirs = await guest.get_time(deadline=_left(end))
    took = time.monotonic_ns() - started
    return _Asked((theirs - before - took / 2) / 1e6, took / 2e6)


def _left(end: float) -> float:
    return max(0.1, end - anyio.current_time())
