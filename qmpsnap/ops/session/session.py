"""The frame of every verb that changes a machine."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from msgspec import Struct

from qmpsnap.block import graph
from qmpsnap.block.graph import Beside
from qmpsnap.errors import LockHeld, OperationPending
from qmpsnap.hint import call
from qmpsnap.host.threads import to_read
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations.operation import Operation, Plan
from qmpsnap.ops.base.context import Context, blocking, locked, require_folder, require_own, require_spec
from qmpsnap.ops.base.reading import read_by
from qmpsnap.ops.outside import layer_changes, other_programs
from qmpsnap.ops.session import recovery, stale_store
from qmpsnap.ops.session.pending import Unfinished
from qmpsnap.ops.session.recovery import GivenUp
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor
from qmpsnap.store import lock


class Work(Struct, frozen=True):
    """A machine that is ours for the length of one verb; ``qemu`` is None when it is stopped."""

    machine: Machine
    qemu: Monitor | None


async def require_agreement(
    work: Work, chains: Sequence[Chain], *, doing: str, wanted: tuple[str, ...] | None = None
) -> Beside:
    """Make sure that a plan for these chains can be carried out: by the QEMU that has them, or without one.

    Args:
        work: the machine.
        chains: its live chains as the store has them.
        doing: what would be done without a QEMU, for the message.
        wanted: disks that were asked for by name.

    Returns:
        Which disks QEMU lacks, so that they cannot be included, and what it has besides.

    Raises:
        StoreMismatch: QEMU has other chains.
        StateError: it is stopped, and somebody else starts it.
    """
    if not work.qemu:
        require_spec(work.machine, doing)
        return Beside()
    now = await graph.read(work.qemu)
    found = await graph.beside(work.qemu, now, chains)
    lacking = found.unplugged.difference(wanted or ())
    await graph.require_chains(work.qemu, now, chains, machine=work.machine.name, lacking=lacking)
    return found


@asynccontextmanager
async def working(
    context: Context,
    name: str,
    verb: str,
    *,
    removes: bool = False,
    alone: bool = True,
    unfinished: Unfinished = "refuse",
    report: Report = unreported,
    given_up: GivenUp | None = None,
) -> AsyncIterator[Work]:
    """Lock the machine, end what an earlier operation left open, and reach its QEMU if it runs.

    Args:
        context: where.
        name: the machine.
        verb: what the lock is held for, as others will be told.
        removes: the verb merges or removes layers, which others may read.
        alone: nobody else may write to the machine's images; not asked by what changes none of them.
        unfinished: what to do with a job that still works for an earlier operation.
        report: told about the progress of such a job.
        given_up: as for :func:`qmpsnap.ops.session.recovery.end_open`.

    Raises:
        NotFoundError: no such machine.
        ForeignHost: it is another host's.
        StoreMismatch: its folder was replaced.
        LockHeld: another controller works on it.
        OperationPending: an earlier operation is open and cannot be ended now.
        StoreMismatch: the store is an old copy, or lacks a machine and layers would go.
        ImageInUse: another program writes to one of its images.
        StoreMismatch: another program has written to a frozen image; its snapshots are marked.
    """
    machine = await blocking(context.store.machine, name)
    require_own(context, machine)
    await to_read(require_folder, context.home, name)
    async with locked(context, name, verb):
        machine = await blocking(context.store.machine, name)  # again, now that nobody else can change it
        await stale_store.require_fit(context, machine, removes=removes)
        async with context.monitor(machine) as qemu:
            await recovery.end_open(context, machine, qemu, unfinished=unfinished, report=report, given_up=given_up)
            machine = await blocking(context.store.machine, name)
            if qemu is None or context.process(machine):
                work = Work(machine, qemu)
                if alone:
                    await _require_unspoilt(context, work)
                yield work
                await blocking(layer_changes.keep, context.store, name)
                return
        if alone:
            await _require_unspoilt(context, Work(machine, None))
        yield Work(machine, None)  # an interrupted revert was ended, and its QEMU with it
        await blocking(layer_changes.keep, context.store, name)


async def _require_unspoilt(context: Context, work: Work) -> None:
    """Nobody writes to the machine's images, and nobody has written to frozen ones without being told."""
    await require_alone(context, work)
    await blocking(layer_changes.notice, context.store, work.machine.name)
    await blocking(layer_changes.keep, context.store, work.machine.name)


@asynccontextmanager
async def looking(context: Context, name: str, *, removes: bool = False, alone: bool = True) -> AsyncIterator[Work]:
    """Reach a machine and its QEMU to see what a verb would do: nothing is locked, ended, made or changed.

    Raises:
        LockHeld: another controller is at an operation of it; what it leaves behind is not known yet.
        OperationPending: an earlier operation is open, and would be ended first.
        QmpsnapError: as :func:`working`.
    """
    machine = await blocking(context.store.machine, name)
    require_own(context, machine)
    await to_read(require_folder, context.home, name)
    await stale_store.require_fit(context, machine, removes=removes)
    await require_settled(context, name)
    async with context.monitor(machine, look=True) as qemu:
        work = Work(machine, qemu)
        if alone:
            await require_alone(context, work)
        yield work


async def require_settled(context: Context, name: str) -> None:
    """Refuse to foretell anything while an operation is open: whether it ends forward or back, nobody has asked yet.

    Raises:
        LockHeld, OperationPending: as :func:`looking`.
    """
    pending = await blocking(lambda: context.store.operations(name, only_open=True))
    if not pending:
        return
    what = f"operation {pending[0].id} ({pending[0].verb}) of machine {name} is open"
    if owner := await blocking(lock.holder, context.home.lock(name)):
        raise LockHeld(f"{what}: {owner} is at work", hint="wait until it has ended", machine=name)
    raise OperationPending(
        f"{what} and would be recovered first",
        hint=call("recover", name) + ", then try again",
        machine=name,
        operation=str(pending[0].id),
    )


async def require_alone(context: Context, work: Work) -> None:
    """Refuse while another program writes to an image that the machine, or a snapshot of it, reads.

    The active layers of a machine that runs are its QEMU's, which keeps others away by its locks.

    Raises:
        ImageInUse: one does; the message names it.
    """
    name, store = work.machine.name, context.store
    chains = await blocking(store.chains, name)
    layers = read_by(chains, await blocking(store.snapshots, name), await blocking(store.forest))
    process = context.process(work.machine)
    active = {chain.active.id for chain in chains} if work.qemu else set()
    await other_programs.require_unwritten(
        (layer for layer in layers if layer.id not in active),
        machine=name,
        ours=[process.pid] if process else [],
    )


async def begin(context: Context, work: Work, make: Callable[[OperationId], Plan]) -> Operation:
    """Journal a plan; nothing has been changed before. Of a machine that is stopped nobody may read what will change.

    Raises:
        ImageInUse: another program has an image open that would be written to or go.
    """
    forest = await blocking(context.store.forest)

    def unread(serial: OperationId) -> Plan:
        plan = make(serial)
        if work.qemu is None:
            other_programs.require_unread(plan, forest, machine=work.machine.name)
        return plan

    return await other_programs.retrying(lambda: blocking(context.store.open_operation, work.machine.name, unread))
