"""The frame of every verb that changes a machine."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from qmpsnap.block import graph
from qmpsnap.block.graph import Beside
from qmpsnap.errors import LockHeld, NumberTaken, OperationPending, QmpsnapError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.operations.operation import DefinePlan, Operation, P
from qmpsnap.model.planning.inputs import Basis, PlanInputs
from qmpsnap.ops.base import free_numbers, requests
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, locked, require_folder, require_own, require_spec
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.reading import read_by
from qmpsnap.ops.outside import layer_changes, other_programs
from qmpsnap.ops.session import recovery, stale_store
from qmpsnap.ops.session.pending import Unfinished
from qmpsnap.ops.session.recovery import GivenUp
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.store import lock
from qmpsnap.store.store import Store

_PATIENCE: Final = 30.0
"""Seconds that other machines of the store may go on taking the numbers that a machine has planned with."""


async def require_agreement(
    session: MachineSession, chains: Sequence[Chain], *, doing: str, wanted: tuple[str, ...] | None = None
) -> Beside:
    """Make sure that a plan for these chains can be carried out: by the QEMU that has them, or without one.

    Returns which disks QEMU lacks, so that they cannot be included, and what it has besides.
    """
    if not session.qemu:
        require_spec(session.machine, doing)
        return Beside()
    now = await graph.read(session.qemu)
    found = await graph.beside(session.qemu, now, chains)
    lacking = found.unplugged.difference(wanted or ())
    await graph.require_chains(session.qemu, now, chains, machine=session.machine.name, lacking=lacking)
    return found


@asynccontextmanager
async def working(  # what a verb says of itself; the rest is for recovery
    context: Context,
    name: str,
    verb: str,
    *,
    removes: bool = False,
    alone: bool = True,
    unfinished: Unfinished = "refuse",
    report: Report = unreported,
    given_up: GivenUp | None = None,
) -> AsyncIterator[MachineSession]:
    """Lock the machine, end what an earlier operation left open, and reach its QEMU if it runs.

    The lock is held for ``verb``, as others will be told. ``removes``: it merges or removes layers, which others may
    read. ``alone``: nobody else may write to the machine's images; not asked by what changes none of them. The others
    are as for :func:`qmpsnap.ops.session.recovery.end_open`.

    Raises:
        NotFoundError: no such machine.
        ForeignHost: it is another host's.
        LockHeld: another controller works on it.
        OperationPending: an earlier operation is open and cannot be ended now.
        StoreMismatch: its folder was replaced; the store is an old copy, or lacks a machine and layers would go; or
            another program has written to a frozen image, whose snapshots are marked.
        ImageInUse: another program writes to one of its images.
    """
    machine = await context.astore.machine(name)
    require_own(context, machine)
    await to_read(require_folder, context.home, name)
    async with locked(context, name, verb), AsyncExitStack() as stack:
        machine = await context.astore.machine(name)  # again, now that nobody else can change it
        await stale_store.require_fit(context, machine, removes=removes)
        qemu = await stack.enter_async_context(context.monitor(machine))
        session = MachineSession(context, machine, qemu)
        await recovery.end_open(session, unfinished=unfinished, report=report, given_up=given_up)
        machine = await context.astore.machine(name)
        if qemu and not context.process(machine):  # an interrupted revert was ended, and its QEMU with it
            await stack.aclose()
            qemu = None
        session = MachineSession(context, machine, qemu)
        if alone:
            await _require_unspoilt(session)
        yield session
        await blocking(_keep, context.store, name)


async def _require_unspoilt(session: MachineSession) -> None:
    """Nobody writes to the machine's images, and nobody has written to frozen ones without being told."""
    store = session.context.store
    basis = await session.context.astore.basis(session.machine.name, sharers=False)
    await require_alone(session, basis)
    await blocking(lambda: layer_changes.keep(store, layer_changes.notice(store, basis)))


def _keep(store: Store, machine: str) -> None:
    with contextlib.suppress(QmpsnapError):
        layer_changes.keep(store, store.basis(machine, sharers=False))


@asynccontextmanager
async def looking(
    context: Context, name: str, *, removes: bool = False, alone: bool = True
) -> AsyncIterator[MachineSession]:
    """Reach a machine and its QEMU to see what a verb would do: nothing is locked, ended, made or changed.

    Raises:
        LockHeld: another controller is at an operation of it; what it leaves behind is not known yet.
        OperationPending: an earlier operation is open, and would be ended first.
        QmpsnapError: as :func:`working`.
    """
    machine = await context.astore.machine(name)
    require_own(context, machine)
    await to_read(require_folder, context.home, name)
    await stale_store.require_fit(context, machine, removes=removes)
    await require_settled(context, name)
    async with context.monitor(machine, look=True) as qemu:
        session = MachineSession(context, machine, qemu)
        if alone:
            await require_alone(session)
        yield session


async def require_settled(context: Context, name: str) -> None:
    """Refuse to foretell anything while an operation is open: whether it ends forward or back, nobody has asked yet."""
    pending = await context.astore.operations(name, only_open=True)
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


async def require_alone(session: MachineSession, basis: Basis | None = None) -> None:
    """Refuse while another program writes to an image that the machine, or a snapshot of it, reads.

    The active layers of a machine that runs are its QEMU's, which keeps others away by its locks.
    """
    basis = basis or await session.context.astore.basis(session.machine.name, sharers=False)
    layers = read_by(basis.chains, basis.snapshots, basis.forest)
    process = session.context.process(session.machine)
    active = {chain.active.id for chain in basis.chains} if session.qemu else set()
    await other_programs.require_unwritten(
        (layer for layer in layers if layer.id not in active), machine=basis.name, ours=[process.pid] if process else []
    )


async def inputs(session: MachineSession, basis: Basis, *, seen: frozenset[str] = frozenset()) -> PlanInputs:
    """What the machine's next plan is made from now."""
    taken = await free_numbers.taken(session.machine, session.qemu, seen=seen) if session.qemu else frozenset[str]()
    serial = free_numbers.first_free(session.machine, await session.context.astore.next_serial(), taken)
    mode = await requests.mode_of(session.qemu)
    return PlanInputs(basis=basis, serial=serial, home=session.context.home, mode=mode, now=time.time())


async def begin(
    session: MachineSession,
    basis: Basis,
    make: Callable[[PlanInputs], P],
    *,
    seen: frozenset[str] = frozenset(),
    serials: int = 1,
) -> Operation[P]:
    """Plan, and journal the plan; nothing has been changed before.

    Files are looked at before the store is locked, so that storage which hangs holds up no other machine: ``make`` is
    called in a thread. If another machine takes the number meanwhile, the plan is made again with the next one. Refused
    where the store says something else than ``basis`` by now, or where the machine is stopped and another program has
    an image open that would be written to or go.
    """

    async def planned() -> Operation[P]:
        at = await inputs(session, basis, seen=seen)
        plan = await to_read(make, at)
        if session.qemu is None and not isinstance(plan, DefinePlan):  # whose images others may read
            await to_end(lambda: other_programs.require_unread(plan, basis.forest, machine=plan.machine))
        return await session.context.astore.open_operation(plan, basis, serial=at.serial, serials=serials)

    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return await other_programs.retrying(planned)
        except NumberTaken:
            if time.monotonic() > end:
                raise
