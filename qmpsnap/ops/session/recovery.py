"""Ending operations that nobody ended: QEMU and the files are asked, then rolled forward or back.

The rule for each verb is a pure function of what was durable and what is found; running it twice changes nothing more.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any, Final

import anyio

from qmpsnap.effect import Effect
from qmpsnap.errors import HostCannot, OperationPending, QemuGone, QmpsnapError
from qmpsnap.hint import call
from qmpsnap.host.system_errors import translated
from qmpsnap.host.threads import to_end
from qmpsnap.machine import worker
from qmpsnap.machine.config import firmware_files
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations.devices import AttachNicPlan, AttachPlan, DetachNicPlan, DetachPlan
from qmpsnap.model.operations.flatten import FlattenPlan
from qmpsnap.model.operations.operation import (
    CreatePlan,
    DefinePlan,
    ForkPlan,
    InternalPlan,
    LoadPlan,
    MergePlan,
    MirrorPlan,
    Operation,
    OperationState,
    Plan,
    ResizePlan,
    RevertPlan,
)
from qmpsnap.model.operations.rename import RenamePlan
from qmpsnap.model.operations.undefine import UndefinePlan
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.session import quiesce
from qmpsnap.ops.session.pending import Broken, Direction, Unfinished
from qmpsnap.qmp import commands
from qmpsnap.qmp.jobs import JobStuck, Report, unreported
from qmpsnap.qmp.session import Monitor

GivenUp = Callable[[Operation, QmpsnapError], object]
Ending = Callable[[Broken[Any], Monitor | None], Awaitable[Direction]]

ENDINGS: Final[Mapping[type[Plan], str]] = {
    AttachNicPlan: "qmpsnap.ops.devices.nics:end_attach",
    AttachPlan: "qmpsnap.ops.devices.attach:end",
    CreatePlan: "qmpsnap.ops.snapshot.recover:end",
    DefinePlan: "qmpsnap.ops.lifecycle.recover:end",
    DetachNicPlan: "qmpsnap.ops.devices.nics:end_detach",
    FlattenPlan: "qmpsnap.ops.merge.flatten:end",
    DetachPlan: "qmpsnap.ops.devices.detach:end",
    ForkPlan: "qmpsnap.ops.fork.recover:end",
    InternalPlan: "qmpsnap.ops.internal.recover:end_create",
    LoadPlan: "qmpsnap.ops.internal.recover:end_load",
    MergePlan: "qmpsnap.ops.merge.recover:end",
    MirrorPlan: "qmpsnap.ops.mirror.recover:end",
    RenamePlan: "qmpsnap.ops.lifecycle.rename:end",
    ResizePlan: "qmpsnap.ops.lifecycle.resize:end",
    RevertPlan: "qmpsnap.ops.revert.recover:end",
    UndefinePlan: "qmpsnap.ops.lifecycle.recover:end_undefine",
}
"""Which function ends which kind of operation, as ``module:function``: these modules import this one."""

SETTLE_DEADLINE = 45.0
"""Seconds that finding out what became of a failed attempt may take, also when the caller was cancelled.

The longest way is a revert's: QEMU is ended, 10 s for each of two tries, before files and record are put right. The
others need less, as their QEMU is only asked; how long a caller waits at most is the same for all.
"""


async def end_open(
    session: MachineSession,
    *,
    unfinished: Unfinished = "refuse",
    report: Report = unreported,
    given_up: GivenUp | None = None,
) -> list[Operation]:
    """End every open operation of a machine whose lock we hold; returns them as they were.

    ``given_up`` is told of what cannot be ended now, and why, unless the machine's QEMU or a worker runs; it stays
    open.
    """
    context, machine = session.context, session.machine
    run_dir = context.home.run_dir(machine.name)
    pending = await context.astore.operations(machine.name, only_open=True)
    if pending:
        await context.astore.require_writable()
    else:
        with contextlib.suppress(HostCannot):  # what is behind by a change without an operation
            await blocking(context.store.records.keep, machine.name)
    for operation in pending:
        broken = Broken(context=context, machine=machine, operation=operation, unfinished=unfinished, report=report)
        try:
            await _end(broken, session.qemu)
        except QmpsnapError as error:
            if given_up and session.qemu is None and worker.find(machine, run_dir) is None:
                given_up(operation, error)
                continue
            if isinstance(error, JobStuck):
                error.tell(machine.name, waits=True)
            if isinstance(error, (OperationPending, JobStuck)):
                raise
            told = broken.pending(error.message)
            told.claim("unknown")  # it may have got as far as to remove a file
            raise told from error
    if pending or helper_left(context, machine):  # left by a process that died before its job began, or once it settled
        await end_helpers(context, machine)
    return list(pending)


def helper_left(context: Context, machine: Machine) -> bool:
    """Whether a worker runs, or the emulator of a TPM whose QEMU has ended or was never there."""
    if worker.find(machine, context.home.run_dir(machine.name)):
        return True
    emulated = machine.spec.tpm and context.process(machine) is None
    return emulated and firmware_files.tpm_runs(context.home.tpm(machine.name))


async def end_helpers(context: Context, machine: Machine) -> None:
    """End what :func:`helper_left` finds."""
    await worker.end_leftover(machine, context.home.run_dir(machine.name))
    if machine.spec.tpm and context.process(machine) is None:
        await to_end(firmware_files.end_left, context.home.tpm(machine.name))


@asynccontextmanager
async def attempting(session: MachineSession, operation: Operation) -> AsyncIterator[None]:
    """The block carries out an operation; when it fails or is cancelled, what it has left is found out and ended first.

    That is shielded from cancellation and takes :data:`SETTLE_DEADLINE` seconds at most; what is not ended by then
    stays open for the next command. The block's error goes on, and says what became of the operation.
    """
    try:
        yield
    except BaseException as error:
        told = translated(error) or error
        with anyio.move_on_after(SETTLE_DEADLINE, shield=True):
            await after_failure(session, operation, told)
        if told is error:
            raise
        raise told from error


async def after_failure(session: MachineSession, operation: Operation, error: BaseException) -> None:
    """Find out what a failed attempt has left and end it; tell the error what became of it."""
    context, machine = session.context, session.machine
    direction: Direction | None = None
    try:
        recorded = await context.astore.operations(machine.name)
        operation = next((found for found in recorded if found.id == operation.id), operation)
        # A cancelled caller wants the job to end; a failed one wants to know first.
        unfinished: Unfinished = "refuse" if isinstance(error, Exception) else "cancel"
        broken = Broken(
            context=context,
            machine=machine,
            operation=operation,
            unfinished=unfinished,
            error=_why(error),
        )
        direction = _ENDED.get(operation.state) or await _end(broken, session.qemu)
    except Exception as failure:
        if translated(failure) is None:
            raise
        # The store itself may be what failed; the operation stays open then, which is as good.
        with contextlib.suppress(QmpsnapError):
            await context.astore.mark(operation.id, "unknown", error=_why(error))
    if isinstance(error, QmpsnapError):
        error.machine, error.operation = machine.name, str(operation.id)
        error.claim(*await _found(context, operation))
        if isinstance(error, JobStuck):
            error.tell(machine.name, waits=direction is None)
        elif direction is None and not isinstance(error, HostCannot | OperationPending):  # these say more
            error.hint = call("recover", machine.name) + " completes or undoes it"


def _why(error: BaseException) -> str:
    return (error.message if isinstance(error, QmpsnapError) else str(error)) or "cancelled"


async def _found(context: Context, operation: Operation) -> tuple[Effect, str]:
    """The effect of an operation as the journal has it now, and what is left of it in words."""
    try:
        recorded = await context.astore.operations(operation.machine)
    except QmpsnapError:
        return "unknown", ""
    ended = next((found for found in recorded if found.id == operation.id), operation)
    return ended.effect or "unknown", ended.outcome or ""


async def _end(broken: Broken, qemu: Monitor | None) -> Direction:
    plan = broken.operation.plan
    module, function = ENDINGS[type(plan)].split(":")
    ending: Ending = getattr(import_module(module), function)
    unborn = isinstance(plan, DefinePlan) and not isinstance(plan, ForkPlan)
    if unborn or isinstance(plan, UndefinePlan):  # there is no machine yet, or none any more
        return await ending(broken, None)
    async with _answering(broken, qemu) as monitor, quiesce.thawed(broken, monitor):
        return await ending(broken, monitor)


_ENDED: dict[OperationState, Direction] = {"settled": "forward", "failed": "back"}
"""The failure came after the operation's end: there is nothing left to do."""


@asynccontextmanager
async def _answering(broken: Broken, qemu: Monitor | None) -> AsyncIterator[Monitor | None]:
    """A monitor that answers: the one at hand, a new one if that has closed, or None when QEMU has ended."""
    if qemu is not None:
        try:
            await commands.query_status(qemu)
        except QemuGone:
            pass
        else:
            yield qemu
            return
    async with broken.context.monitor(broken.machine) as fresh:
        yield fresh
