"""The UEFI variable store, and a TPM's state, at the instant of the disks' snapshot: no transaction has them.

The copy is made first and is valid if the store still equals it after the transaction. A guest that keeps writing to
its variables is paused for copy and transaction instead. So is a guest that wrote to them in between, when the snapshot
is taken again.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from qmpsnap.block.image.header import printable
from qmpsnap.errors import DeadlinePassed, HostCannot, QemuGone, StateError
from qmpsnap.hint import call
from qmpsnap.host.threads import bounded, to_end
from qmpsnap.machine.config import firmware_files
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import CreatePlan, Operation
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.memory.save import RESUME_DEADLINE
from qmpsnap.qmp import commands, runstate
from qmpsnap.qmp.session import Monitor

LOOKS = 5
"""Attempts to find a store unchanged for :data:`STILL` seconds; after them the guest is paused."""
STILL = 0.01
"""Seconds; more than a guest lets pass between two writes of one update."""

Copied = tuple[str, str]
"""A machine's variable store and the path of its copy."""


class VariablesMoved(StateError):
    """The store was written to between its copy and the disks' transaction: the snapshot has to be taken again."""


def proven(operation: Operation) -> bool:
    """Whether the copy that a broken ``snapshot create`` has made is that of the disks' instant, or none is wanted."""
    plan = operation.plan
    if not isinstance(plan, CreatePlan) or plan.variables is None:
        return True
    if operation.step == steps.TRANSACTION:
        return _read_alike(*plan.variables)
    return plan.memory is not None  # made while the guest was paused for it; otherwise the step records its loss


async def is_still(path: Path) -> bool:
    """Whether a running guest leaves its variable store alone now, at one of several looks."""
    content = await to_end(_content, str(path))
    for _ in range(LOOKS):
        await anyio.sleep(STILL)
        before, content = content, await to_end(_content, str(path))
        if content == before:
            return True
    return False


async def copy(copied: Copied | None) -> None:
    """Make the copy, or make it again where the store has changed since; durable."""
    if copied and not await to_end(_read_alike, *copied):
        await to_end(firmware_files.copy_variables, *copied)


async def have_moved(copied: Copied | None) -> bool:
    """Whether somebody has written to the store since the copy was made."""
    return copied is not None and not await to_end(_read_alike, *copied)


@asynccontextmanager
async def held(qemu: Monitor, *, when: bool, machine: str) -> AsyncIterator[None]:
    """Pause the guest for the block; unless ``when``, do nothing.

    ``StateError``: QEMU has paused the guest by itself before we could; it stays paused.
    """
    if not when:
        yield
        return
    ours = True
    try:
        await commands.control(qemu, "stop")
        state = await commands.run_state(qemu)
        ours = state in {"paused", runstate.SUSPENDED}  # an earlier QEMU does not stop a guest that sleeps
        if not ours:
            raise StateError(
                f"the guest of machine {machine} cannot be paused for its UEFI variables: it is {state}",
                hint=runstate.remedy(state, machine) or call("state", machine) + " shows why",
                machine=machine,
            )
        yield
    finally:
        if ours:
            await bounded(RESUME_DEADLINE, commands.control(qemu, "cont"))


async def left_out(context: Context, machine: Machine) -> tuple[str, ...]:
    """A sentence if the guest of an adopted machine has UEFI variables, which are its owner's and in no snapshot.

    Only a QEMU that runs can tell; one that does not answer is not waited for any longer.
    """
    if not machine.adopted:
        return ()
    try:
        async with context.monitor(machine, look=True) as qemu:
            drives = await commands.query_block(qemu) if qemu else ()
    except (QemuGone, DeadlinePassed):
        return ()
    files = [drive.inserted.file for drive in drives if drive.is_flash and drive.inserted and not drive.inserted.ro]
    named = ", ".join(map(printable, files))
    text = f"the UEFI variables of machine {machine.name} belong to its owner and are in no snapshot: {named}"
    return (text,) if files else ()


def _content(path: str) -> tuple[bytes, bytes]:
    try:
        return firmware_files.content(path)
    except OSError as error:
        raise HostCannot(f"the variable store {path} cannot be read: {error.strerror}") from error


def _read_alike(source: str, target: str) -> bool:
    try:
        return firmware_files.content(source) == firmware_files.content(target)
    except OSError:
        return False
