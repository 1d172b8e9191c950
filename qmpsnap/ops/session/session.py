"""The frame of every verb that changes a machine."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.graph import Beside
from qmpsnap.errors import HostCannot, ImageInUse, LockHeld, NumberTaken, OperationPending
from qmpsnap.hint import call
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations.operation import DefinePlan, Operation, P
from qmpsnap.model.planning.inputs import Basis, PlanInputs
from qmpsnap.ops.base import free_numbers, requests, volumes
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

_PATIENCE: Final = 30.0
"""Seconds that other machines of the store may go on taking the numbers that a machine has planned with."""
_TURN: Final = 1.0
"""Seconds that a verb waits for another's plan; then both may be given the same number, and one plans again."""


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

    def before() -> None:
        require_own(context, context.store.machine(name))
        require_folder(context.home, name)

    async with locked(context, name, verb, before=before), AsyncExitStack() as stack:
        begun = await blocking(_begun, context, name, removes=removes, alone=alone)  # now nobody else can change it
        basis = begun.basis
        qemu = await stack.enter_async_context(context.monitor(begun.machine))
        if begun.unended:
            session = MachineSession(context, begun.machine, qemu)
            await recovery.end_open(session, unfinished=unfinished, report=report, given_up=given_up)
            if qemu and not context.process(await context.astore.machine(name)):
                await stack.aclose()  # an interrupted revert was ended, and its QEMU with it
                qemu = None
        runs = qemu is not None
        if begun.unended or (alone and begun.alone_beside is not runs):
            basis = await _again(context, name, removes=removes, alone=alone, runs=runs)
        if qemu is None:
            basis = await _own(context, basis, removes=removes)
        assert basis.record
        if qemu and basis.record.names != begun.machine.names:  # recovery has learnt some
            await stack.aclose()
            qemu = await stack.enter_async_context(context.monitor(basis.record))
        await volumes.activate(basis.forest.layers.values())
        if context.expects and not context.expects.met:
            context.expects.require(await context.astore.basis(name), await requests.mode_of(qemu))
        yield MachineSession(context, basis.record, qemu, basis)
        await blocking(layer_changes.keep, context.store, name)


class _Begun(Struct, frozen=True):
    """What the store says of a machine as a verb begins; ``unended``: there is something that nobody has ended.

    ``alone_beside``: its images are unspoilt, and nobody else writes to them, its QEMU's if that runs; None where that
    is not known yet.
    """

    basis: Basis
    unended: bool
    alone_beside: bool | None = None

    @property
    def machine(self) -> Machine:
        """The machine as recorded."""
        assert self.basis.record
        return self.basis.record


def _begun(context: Context, name: str, *, removes: bool, alone: bool) -> _Begun:
    """Read what there is, and look at the machine's images where no operation is open.

    All in one call, and so one change to a thread and back, with a QEMU that is reached afterwards.
    """
    basis, pending = read_fitting(context, name, removes=removes)
    begun = _Begun(basis, unended=bool(pending))
    if begun.unended or recovery.helper_left(context, begun.machine):
        return replace(begun, unended=True)
    with contextlib.suppress(HostCannot):  # what is behind by a change without an operation
        context.store.records.keep(name)
    if not alone:
        return begun
    runs = context.process(begun.machine) is not None
    try:
        _require_unspoilt(context, basis, runs=runs)
    except ImageInUse:  # who has it may be about to close it, and is given some time
        return begun
    return replace(begun, basis=context.store.basis(name, sharers=removes), alone_beside=runs)


async def _again(context: Context, name: str, *, removes: bool, alone: bool, runs: bool) -> Basis:
    """What the store says of a machine that something was to be done for first."""
    basis = await context.astore.basis(name, sharers=removes)
    if basis.record is None:
        await context.astore.machine(name)  # which says that it is none: an interrupted rename has ended
    if alone:
        await other_programs.retrying(lambda: blocking(_require_unspoilt, context, basis, runs=runs))
    return await context.astore.basis(name, sharers=removes)


async def _own(context: Context, basis: Basis, *, removes: bool) -> Basis:
    """What the store says of a stopped machine, once one that was taken from its owner is recorded as our own."""
    record = basis.record
    if record and record.adopted:
        from qmpsnap.ops.session import taken  # of few machines

        if await blocking(taken.settle, context, record):
            return await context.astore.basis(basis.name, sharers=removes)
    return basis


def read_fitting(context: Context, name: str, *, removes: bool = False) -> tuple[Basis, tuple[Operation, ...]]:
    """What the store says of a machine, whose disks it is not older than, and the operations that are open."""
    with context.store.at_once():
        basis = context.store.basis(name, sharers=removes)
        pending = context.store.operations(name, only_open=True)
    if basis.record is None:
        context.store.machine(name)  # which says what may have become of it
    stale_store.require_fit(context, basis, pending, removes=removes)
    return basis, pending


def _require_unspoilt(context: Context, basis: Basis, *, runs: bool) -> None:
    """Nobody writes to the machine's images, and nobody has written to frozen ones without being told."""
    _require_alone(context, basis, runs=runs)
    layer_changes.notice(context.store, basis)
    layer_changes.keep(context.store, basis.name)


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

    def look() -> Basis:
        require_own(context, context.store.machine(name))
        require_folder(context.home, name)
        return read_fitting(context, name, removes=removes)[0]

    basis = await blocking(look)
    await require_settled(context, name)
    assert basis.record
    async with context.monitor(basis.record, look=True) as qemu:
        record = basis.record if qemu else basis.record.own
        if context.expects:
            context.expects.see(await context.astore.basis(name), await requests.mode_of(qemu))
        if alone:
            runs = qemu is not None
            await other_programs.retrying(lambda: to_end(lambda: _require_alone(context, basis, runs=runs)))
        yield MachineSession(context, record, qemu, replace(basis, record=record))


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


def _require_alone(context: Context, basis: Basis, *, runs: bool) -> None:
    """Refuse while another program writes to an image that the machine, or a snapshot of it, reads.

    The active layers of a machine that runs are its QEMU's, which keeps others away by its locks.
    """
    layers = read_by(basis.chains, basis.snapshots, basis.forest)
    process = context.process(basis.record) if basis.record else None
    active = {chain.active.id for chain in basis.chains} if runs else set()
    if not runs:
        # QEMU locks no image in a cluster against another QEMU: both would write.
        alone = [chain.active.path for chain in basis.chains if chain.active.storage == "rbd"]
        other_programs.require_free_now(alone, machine=basis.name, readers=True)
    other_programs.require_free_now(
        (layer.path for layer in layers if layer.id not in active),
        machine=basis.name,
        ours=[process.pid] if process else [],
    )


async def inputs(session: MachineSession, basis: Basis, *, seen: frozenset[str] = frozenset()) -> PlanInputs:
    """What the machine's next plan is made from now."""
    return await to_read(await _asked(session, basis, seen=seen, jobs=True))


async def _asked(
    session: MachineSession, basis: Basis, *, seen: frozenset[str], jobs: bool
) -> Callable[[], PlanInputs]:
    """The same of what QEMU says now; the number is looked up when it is called, in a thread."""
    taken = await free_numbers.taken(session.machine, session.qemu, seen, jobs=jobs) if session.qemu else frozenset()
    mode = await requests.mode_of(session.qemu)

    def at() -> PlanInputs:
        serial = free_numbers.first_free(session.machine, session.context.store.next_serial(), taken)
        return PlanInputs(basis=basis, serial=serial, home=session.context.home, mode=mode, now=time.time())

    return at


async def begin(
    session: MachineSession,
    basis: Basis,
    make: Callable[[PlanInputs], P],
    *,
    seen: frozenset[str] = frozenset(),
    serials: int = 1,
    jobs: bool = True,
) -> Operation[P]:
    """Plan, and journal the plan; nothing has been changed before.

    Files are looked at before the store is locked, so that storage which hangs holds up no other machine: ``make`` is
    called in a thread. If another machine takes the number meanwhile, the plan is made again with the next one. Refused
    where the store says something else than ``basis`` by now, or where the machine is stopped and another program has
    an image open that would be written to or go. ``jobs``: it starts some, whose names are not to be taken.
    """

    async def planned() -> Operation[P]:
        asked = await _asked(session, basis, seen=seen, jobs=jobs)

        def made() -> tuple[P, OperationId]:
            at = asked()
            plan = make(at)
            if session.qemu is None and not isinstance(plan, DefinePlan):  # whose images others may read
                other_programs.require_unread(plan, basis.forest, machine=plan.machine)
            return plan, at.serial

        async with _turn(session.context):
            plan, serial = await to_read(made)
            return await session.context.astore.open_operation(plan, basis, serial=serial, serials=serials)

    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return await other_programs.retrying(planned)
        except NumberTaken:
            if time.monotonic() > end:
                raise


@asynccontextmanager
async def _turn(context: Context) -> AsyncIterator[None]:
    """For the block, no other verb of this program makes a plan, unless one takes too long, as its storage hangs."""
    with anyio.move_on_after(_TURN) as waiting:
        await context.planning.acquire()
    try:
        yield
    finally:
        if not waiting.cancelled_caught:
            context.planning.release()
