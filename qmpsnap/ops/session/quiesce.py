"""A guest whose file systems are frozen for the instant of a snapshot, and thawed whatever becomes of us.

The agent is spoken to, and a guard is there, before anything is held up; the freeze comes right before the disks'
transaction, when the intent is durable, and the thaw right after it. Only the guard thaws
(:mod:`qmpsnap.machine.guard`): when we ask for it, when we die, or when the freeze window is over.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, QemuGone, QmpError, QmpsnapError, StateError, UsageError
from qmpsnap.hint import option
from qmpsnap.host.threads import completed
from qmpsnap.machine import agent, watch
from qmpsnap.machine.agent import Agent
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.machine.watch import Watch
from qmpsnap.model.layers.snapshot import Quiesce
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import CreatePlan, InternalPlan, Operation, RevertPlan
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.session.pending import Broken
from qmpsnap.qmp import commands, runstate
from qmpsnap.qmp.session import Monitor

FREEZE_WINDOW = 5.0
"""Seconds a guest's file systems are frozen at most."""
WINDOW_LIMIT = 60.0
"""Seconds nobody may ask to exceed: a guest that cannot write for so long takes harm."""
AGENT_DEADLINE = 5.0
"""Seconds until the guest's agent must have answered at all."""
THAW_DEADLINE = 5.0
"""Seconds we wait for a thaw; the guard goes on for longer."""

_WITHOUT = option("quiesce", "prefer") + " takes the snapshot without freezing them"


class QuiesceRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for; ``window``: seconds the file systems may be frozen."""

    wish: Quiesce = "skip"
    window: float = FREEZE_WINDOW


class Freezer:
    """The freeze of one snapshot, from :func:`prepared`.

    ``wish`` is ``skip`` when it is certain that nothing will be frozen; ``why``: why the file systems are not (or were
    not all the time) frozen, where that was preferred. ``frozen_ms``: from when the agent was told to freeze (``sent``)
    until it had thawed; None before that, and where nobody knows when it did.
    """

    def __init__(
        self, wish: Quiesce = "skip", why: str = "", *, machine: str = "", window: float = FREEZE_WINDOW
    ) -> None:
        self.wish: Quiesce = wish
        self.why = why
        self.sent = False
        self.frozen_ms: float | None = None
        self._machine = machine
        self._window = window
        self._since = self._until = 0.0
        self._agent: Agent | None = None
        self._watch: Watch | None = None

    @property
    def reached(self) -> bool:
        """The file systems were frozen at the instant of the transaction."""
        return self.sent and not self.why

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """For the block the guest's file systems are frozen, once it is certain that they will be thawed.

        Raises:
            QmpError: the guest refused, froze nothing, or answered nonsense. Only with ``require``, like the others.
            DeadlinePassed: it did not freeze in time, or nobody knows whether it has thawed.
        """
        if self._agent is None or self._watch is None:
            yield
            return
        try:
            await self._freeze(self._agent, self._watch)
            yield
        except BaseException:
            with contextlib.suppress(QmpsnapError):
                await completed(self._thaw(self._agent, self._watch))
            raise
        finally:
            await completed(self._finish())

    @contextmanager
    def within(self) -> Iterator[None]:
        """For the transaction: it counts only if it is over before anybody may have thawed."""
        if not self.sent or self.why:
            yield
            return
        left = self._until - time.monotonic() if self.wish == "require" else None
        try:
            with anyio.fail_after(left):
                yield
        except TimeoutError as error:
            raise self._late() from error
        if time.monotonic() > self._until:
            self._give_up(self._late())

    async def _freeze(self, guest: Agent, guard: Watch) -> None:
        self._since = time.monotonic()
        self._until = self._since + self._window
        self.sent = True
        guard.say(b"f")  # its window begins later than ours: in time by our clock means in time by its clock
        try:
            count = await guest.freeze(deadline=self._window)
        except QmpsnapError as error:
            # Behind the window the guard speaks on this channel, and what it is answered looks like our answer.
            late = isinstance(error, QmpError) and time.monotonic() > self._until
            self._give_up(guest.late(self._window, "guest-fsfreeze-freeze") if late else error)
            return
        if count == 0:
            self._give_up(QmpError(f"the guest of machine {self._machine} has no file system to freeze"))

    def _give_up(self, error: QmpsnapError) -> None:
        self.why = self.why or error.message
        if self.wish == "require":
            error.hint = error.hint or _WITHOUT
            raise error

    async def _finish(self) -> None:
        """Thaw, unless that was done for an error that goes on."""
        if self._agent is None or self._watch is None:
            return
        try:
            count = await self._thaw(self._agent, self._watch)
            if count == 0 and not self.why:
                self._give_up(QmpError(f"another client thawed the guest of machine {self._machine} meanwhile"))
        except QmpsnapError as error:
            self._give_up(error)

    async def _thaw(self, guest: Agent, guard: Watch) -> int:
        """Let the guard thaw, or do so where it has ended, and leave both."""
        self._agent = self._watch = None
        guard.say(b"t")
        try:
            # Few bytes, written at once: they come as one.
            if said := await guard.hear(64, deadline=THAW_DEADLINE):
                count = int(said[1:])
            else:
                await guest.synchronise(deadline=THAW_DEADLINE)
                count = await guest.thaw(deadline=THAW_DEADLINE)
            self.frozen_ms = (time.monotonic() - self._since) * 1000
        except QmpsnapError as error:
            raise DeadlinePassed(
                f"the guest of machine {self._machine} did not thaw its file systems within {THAW_DEADLINE:g} s",
                hint="a guard process keeps trying for a minute",
                machine=self._machine,
            ) from error
        finally:
            await guard.leave(b"")
            await guest.close()
        return count

    def _late(self) -> DeadlinePassed:
        return DeadlinePassed(
            f"the snapshot of machine {self._machine} took longer than the freeze window of {self._window:g} s",
            hint="allow more with " + option("freeze_window", "SECONDS") + ", or try again when the host is less busy",
            machine=self._machine,
        )


@asynccontextmanager
async def prepared(
    context: Context, machine: Machine, qemu: Monitor | None, request: QuiesceRequest
) -> AsyncIterator[Freezer]:
    """A freezer whose agent has answered and whose guard watches; nothing is frozen yet.

    Raises:
        UsageError: a freeze window that makes no sense.
        StateError: there is no guest that could answer. Only with ``require``, like the others.
        QemuGone: nobody has the agent's channel.
        DeadlinePassed: the agent does not answer.
        HostCannot: no guard can be started.
    """
    _require_window(request)
    if request.wish == "skip":
        yield Freezer()
        return
    async with contextlib.AsyncExitStack() as stack:
        freezer = Freezer(request.wish, machine=machine.name, window=request.window)
        try:
            await _require_guest(machine, qemu)
            run_dir = context.home.run_dir(machine.name)
            guest = await stack.enter_async_context(
                agent.connect(run_dir / AGENT_SOCKET, machine=machine.name, deadline=AGENT_DEADLINE)
            )
            guard = await watch.over_agent(guest.channel, window=request.window, run_dir=run_dir)
            stack.push_async_callback(guard.leave, b"")
            freezer._agent, freezer._watch = guest, guard  # noqa: SLF001 - its own maker
        except QmpsnapError as error:
            if request.wish == "require":
                error.effect = "none"
                raise
            freezer = Freezer(why=error.message)
        yield freezer


async def foreseen(machine: Machine, qemu: Monitor | None, request: QuiesceRequest) -> Freezer:
    """The freezer for a plan that nobody carries out: the agent is not spoken to."""
    _require_window(request)
    if request.wish == "skip":
        return Freezer()
    try:
        await _require_guest(machine, qemu)
    except StateError as error:
        if request.wish == "require":
            raise
        return Freezer(why=error.message)
    return Freezer(request.wish)


def _require_window(request: QuiesceRequest) -> None:
    if not 0 < request.window <= WINDOW_LIMIT:
        raise UsageError(f"a freeze window of {request.window:g} s is not above 0 and at most {WINDOW_LIMIT:g} s")


async def _require_guest(machine: Machine, qemu: Monitor | None) -> None:
    status = await commands.query_status(qemu) if qemu else None
    if status is None or not status.running:
        state = "stopped" if status is None else runstate.SUSPENDED if status.live else "paused"
        problem = f"is {state}: only a running guest can freeze its file systems"
    elif machine.adopted or not machine.spec.agent:
        problem = "has no guest agent channel"
    else:
        return
    raise StateError(f"machine {machine.name} {problem}", hint=_WITHOUT, machine=machine.name)


# --- afterwards -------------------------------------------------------------------------------------------------------


def unproven(operation: Operation) -> bool:
    """Whether its snapshot had to be of frozen file systems, and nobody can tell any more that they were; pure."""
    plan = operation.plan
    if not isinstance(plan, CreatePlan | InternalPlan) or plan.quiesce != "require":
        return False
    return operation.step in (steps.TRANSACTION, steps.STARTED)


def may_be_frozen(operation: Operation) -> bool:
    """Whether its guest's file systems may be frozen because of us; pure."""
    plan = operation.plan
    if isinstance(plan, CreatePlan | InternalPlan):
        return plan.quiesce != "skip" and operation.step != steps.PLANNED
    return (
        isinstance(plan, RevertPlan) and bool(plan.vmstate and plan.vmstate.frozen) and operation.step == steps.STARTING
    )


@asynccontextmanager
async def thawed(broken: Broken, monitor: Monitor | None) -> AsyncIterator[None]:
    """A thaw comes first, before the block decides what becomes of an operation; or last, where it lets the guest run.

    An agent that does not answer is no reason to leave an operation open: the guard has asked it for longer.
    """
    wanted = monitor is not None and may_be_frozen(broken.operation)
    runs = wanted and monitor is not None and (await commands.query_status(monitor)).running
    if runs:
        await _thaw_left(broken)
    try:
        yield
    finally:
        if wanted and not runs and monitor is not None:
            with contextlib.suppress(QmpsnapError):
                if (await commands.query_status(monitor)).running:
                    await _thaw_left(broken)


async def _thaw_left(broken: Broken) -> None:
    with contextlib.suppress(DeadlinePassed, QemuGone, QmpError):
        await thaw(broken.context, broken.machine)


async def thaw(context: Context, machine: Machine) -> None:
    """Thaw a running guest's file systems, if they are frozen."""
    socket = context.home.run_dir(machine.name) / AGENT_SOCKET
    async with agent.connect(socket, machine=machine.name, deadline=AGENT_DEADLINE) as guest:
        await guest.thaw(deadline=THAW_DEADLINE)
