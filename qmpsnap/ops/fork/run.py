"""``fork``: machines that go on from a full snapshot of another one."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import anyio
from msgspec import Struct

from qmpsnap.errors import LockHeld, NameTaken, NotFoundError, QmpsnapError, StateError
from qmpsnap.hint import call
from qmpsnap.host import files
from qmpsnap.host.threads import first_of, to_end, to_read
from qmpsnap.machine import templates
from qmpsnap.machine.config import firmware as uefi
from qmpsnap.model.layers.snapshot import Snapshot, require_snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import CreatePlan, ForkPlan, Operation
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.ops.base.context import Context, forget_places, locked, require_folder, require_own
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import identified, make_overlays, require_free
from qmpsnap.ops.fork import bake, identity
from qmpsnap.ops.fork import plan as planning
from qmpsnap.ops.fork.bake import Source
from qmpsnap.ops.fork.request import ForkRequest, memory_of, names, require_forkable, require_sensible
from qmpsnap.ops.lifecycle import define, power
from qmpsnap.ops.memory.load import hardware_to_start, require_fits
from qmpsnap.ops.memory.strategy import MemoryRequest
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.session import begin
from qmpsnap.ops.snapshot import create
from qmpsnap.ops.snapshot.plan import CreateRequest
from qmpsnap.qmp import commands

AT_ONCE = 8
"""Forks that are made side by side: each waits for its QEMU, and all for the store."""


class Forked(Struct, frozen=True, kw_only=True):
    """A fork, as it is now.

    Attributes:
        machine: as recorded; ``machine.origin`` says whether its identity is ``fresh``, or why it is a ``twin``.
        snapshot: that it went on from.
        taken: whether that was taken for this.
        background: why the memory of its own full snapshots cannot be saved while it runs; empty if it can.
    """

    machine: Machine
    snapshot: Snapshot
    taken: bool
    background: str = ""


async def run(context: Context, parent: str, request: ForkRequest, *, begun: set[str] | None = None) -> list[Forked]:
    """Fork a machine.

    Args:
        context: where.
        parent: the machine.
        request: what is asked for.
        begun: the names of forks of which there may be something are added to it.

    Raises:
        NotFoundError: no such machine or snapshot.
        StateError: it is adopted, the snapshot has no memory, or its hardware has changed.
        NameTaken: there is a machine of that name.
        HostCannot: no room for the template.
    """
    wanted = await _wanted(context, parent, request)
    taken = None if request.snapshot else await _taken(context, parent, request)
    made: dict[str, Machine] = {}
    try:
        source = await source_of(context, parent, request.snapshot or taken or "")
        await _all(context, source, wanted, request, made=made, begun=set() if begun is None else begun)
        if request.identity == "fresh":
            _require_fresh(made.values())
    except QmpsnapError as error:
        left = [f"snapshot {taken} of machine {parent} stays"] if taken else []
        left += [f"fork {name} is there" for name in made]
        if left and error.effect == "none":
            error.claim("applied", "; ".join(left))
        raise
    why = await _why_not_behind_it(context, source)
    found = [made[name] for name in sorted(made, key=lambda name: (len(name), name))]
    return [Forked(machine=one, snapshot=source.snapshot, taken=taken is not None, background=why) for one in found]


async def _wanted(context: Context, parent: str, request: ForkRequest) -> Iterator[str]:
    """The names of the forks, after all was refused that can be without a snapshot."""
    require_sensible(request)
    machine = await context.astore.machine(parent)
    require_own(context, machine)
    require_forkable(machine)
    taken = frozenset(found.name for found in await context.astore.machines())
    if request.name:
        for name in names(parent, request, frozenset()):
            await define.require_new(context, name)
    return names(parent, request, taken)


async def _all(
    context: Context,
    source: Source,
    wanted: Iterator[str],
    request: ForkRequest,
    *,
    made: dict[str, Machine],
    begun: set[str],
) -> None:
    limit = anyio.CapacityLimiter(AT_ONCE)

    async def fork() -> None:
        async with limit:
            while True:
                name = next(wanted)
                if name in begun:  # the same caller makes it beside this one
                    continue
                begun.add(name)
                try:
                    made[name] = await _one(context, source, name, request)
                except (NameTaken, LockHeld):
                    begun.remove(name)
                    if request.name:
                        raise
                else:
                    return

    try:
        async with anyio.create_task_group() as group:
            for _ in range(request.count):
                group.start_soon(fork)
    except BaseExceptionGroup as errors:  # Python 3.11.2 groups again what an except* raises
        raise first_of(errors) from errors


class Preview(Struct, frozen=True, kw_only=True):
    """What a fork would do: the snapshot that would be taken before, with its machine, and the plan of each fork."""

    taken: tuple[Machine, CreatePlan] | None
    plans: tuple[ForkPlan, ...]


async def preview(context: Context, parent: str, request: ForkRequest) -> Preview:
    """What :func:`run` would do now, without doing it; refused as that would be, but for a file damaged inside."""
    wanted = await _wanted(context, parent, request)
    taken = None
    if request.snapshot:
        source = await source_of(context, parent, request.snapshot)
        machine, snapshot, chains = source.machine, source.snapshot, source.chains
        missing = not await bake.find(context, source)
    else:
        taken = await create.preview(context, parent, _snapshot_for(request))
        machine, (snapshot,), missing = taken[0], taken[1].change.snapshots, True
        chains = (await context.astore.basis(parent, sharers=False)).chains
    plans: list[ForkPlan] = []
    serial = OperationId(await context.astore.next_serial() + (taken is not None))
    for name in itertools.islice(wanted, request.count):
        new = planning.machine(machine, snapshot, chains, name=name, request=request)
        at = PlanInputs(basis=await context.astore.basis(name), serial=serial, home=context.home)
        uefi = machine.spec.firmware == "uefi"
        plans.append(planning.plan(at, new, chains, request, variables=uefi, bake=missing and not plans))
        serial = OperationId(serial + max(1, len(chains)))
    return Preview(taken=taken, plans=tuple(plans))


async def _why_not_behind_it(context: Context, source: Source) -> str:
    """Which way a fork's memory is saved while it runs: QEMU tracks no writes to a private mapping of a disk's file."""
    shelf = await to_read(lambda: bake.shelf_of(context, source))
    if shelf is None or templates.is_memory(shelf.folder):
        return ""
    return f"its memory is mapped from {shelf.folder}, which is no tmpfs"


def _require_fresh(forks: Iterable[Machine]) -> None:
    for fork in forks:
        if fork.origin and fork.origin.identity != "fresh":
            raise StateError(
                f"fork {fork.name} still has the identity of {fork.origin.name}: {'; '.join(fork.origin.lacks)}",
                hint=call("stop", fork.name, force=True) + ", or keep it as a twin",
                effect="applied",
                machine=fork.name,
            )


async def _taken(context: Context, parent: str, request: ForkRequest) -> str:
    """The name of a new full snapshot of the machine as it is now."""
    return (await create.run(context, parent, _snapshot_for(request))).name


def _snapshot_for(request: ForkRequest) -> CreateRequest:
    return CreateRequest(memory=MemoryRequest(), description=request.description or "taken for a fork")


async def source_of(context: Context, parent: str, name: str) -> Source:
    """What forks of a snapshot go on from; refused where they could not."""
    basis = await context.astore.basis(parent, sharers=False)
    assert basis.record
    snapshot = require_snapshot(basis.snapshots, name, machine=parent)
    state = memory_of(basis.record, snapshot)
    hardware = await hardware_to_start(context, basis.record)
    require_fits(snapshot, hardware, machine=parent)
    return Source(
        machine=basis.record,
        snapshot=snapshot,
        state=state,
        chains=planning.points(basis, snapshot),
        hardware=hardware,
        user=context.run_as.uid if context.run_as else None,
    )


async def _one(context: Context, source: Source, name: str, request: ForkRequest) -> Machine:
    was_there = context.home.run_dir(name).exists()
    async with locked(context, name, "fork"):
        await define.end_earlier(context, name)
        try:
            operation = await _begun(context, source, name, request)
            new = operation.plan.change.define
            assert new
            async with recovery.attempting(MachineSession(context, new), operation):
                await _carry_out(context, source, operation)
        except BaseException:
            if not await _exists(context, name):
                forget_places(context.home, name, run=not was_there)
            raise
    return await context.astore.machine(name)


async def _renew(context: Context, source: Source, planned: ForkPlan) -> None:
    machine = await context.astore.machine(planned.machine)
    await identity.renew(context, machine, source.machine)
    if planned.paused:
        async with context.monitor(machine) as qemu:
            if qemu:
                await commands.control(qemu, "stop")


async def _exists(context: Context, name: str) -> bool:
    with anyio.CancelScope(shield=True):
        try:
            await context.astore.machine(name)
        except NotFoundError:
            return False
    return True


async def _begun(context: Context, source: Source, name: str, request: ForkRequest) -> Operation[ForkPlan]:
    basis = await context.astore.basis(name)
    new = planning.machine(source.machine, source.snapshot, source.chains, name=name, request=request)
    missing = not await bake.find(context, source)
    uefi = source.machine.spec.firmware == "uefi"

    def make(at: PlanInputs) -> ForkPlan:
        planned = planning.plan(at, new, source.chains, request, variables=uefi, bake=missing)
        require_free([*(layer.path for layer in planned.created), *([planned.variables] if planned.variables else [])])
        return planned

    return await begin(MachineSession(context, new), basis, make, serials=max(1, len(source.chains)))


async def _carry_out(context: Context, source: Source, operation: Operation[ForkPlan]) -> None:
    planned = operation.plan
    assert planned.change.define
    await to_read(require_folder, context.home, planned.machine)
    await to_end(files.make_folder, context.home.machine_dir(planned.machine))

    async def baking() -> None:
        await context.astore.mark(operation.id, "running", step=steps.BAKING)

    async with bake.template_of(context, source, baking=baking) as loading:
        headers = await make_overlays(context, planned.change.define, planned.overlays)
        if planned.variables:
            await to_end(
                files.write_new, planned.variables, Path(uefi.chosen(planned.change.define.spec).vars).read_bytes()
            )
        change = identified(planned.change, headers)
        await context.astore.settle(operation.id, planned.machine, change, step=steps.STARTING)
        running = planned.fresh or not planned.paused
        await power.bring_up(context, planned.change.define, paused=not running, loading=loading)
    if planned.fresh:
        await _renew(context, source, planned)
    await context.astore.mark(operation.id, "settled", step=steps.SETTLED)
