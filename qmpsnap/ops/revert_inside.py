"""Going back to a snapshot inside images: in the QEMU that runs, where its layers are still the active ones.

Else its content is taken out into a new layer; an image that a guest writes to gets a layer on top first.
"""

from qmpsnap.block import graph
from qmpsnap.errors import QemuGone, StateError
from qmpsnap.model.names import OperationId
from qmpsnap.model.operation import Operation, RevertPlan
from qmpsnap.model.situation import Situation
from qmpsnap.model.snapshot import Snapshot
from qmpsnap.ops import asked, create, internal
from qmpsnap.ops.context import Context, blocking
from qmpsnap.ops.create import CreateRequest
from qmpsnap.ops.internal import InternalRequest
from qmpsnap.ops.loading import require_same_hardware
from qmpsnap.ops.power import LoadingInside
from qmpsnap.ops.tagging import job_of
from qmpsnap.ops.work import working


async def can_load(context: Context, name: str, target: str) -> bool:
    """Whether the QEMU that runs can go back by itself: memory and disks inside the layers that its guest writes to."""
    machine = await blocking(context.store.machine, name)
    snapshot = next((s for s in await blocking(context.store.snapshots, name) if s.name == target), None)
    chains = await blocking(context.store.chains, name)
    running = context.process(machine) is not None
    return running and snapshot is not None and snapshot.state == "ok" and internal.in_place(snapshot, chains)


async def load(
    context: Context, name: str, target: str, *, discard: bool, paused: bool
) -> tuple[Snapshot, Snapshot | None]:
    """Go back in the QEMU that runs.

    Args:
        context: where.
        name: the machine.
        target: the snapshot's name.
        discard: do not keep what was written since.
        paused: the guest's vCPUs stay stopped afterwards.

    Returns:
        The snapshot, and the automatic one of what was before; None when that went.

    Raises:
        QmpError: QEMU could not: it has been ended, and the disks stand at the snapshot.
    """
    machine = await blocking(context.store.machine, name)
    found = next(s for s in await blocking(context.store.snapshots, name) if s.name == target)
    await require_same_hardware(context, machine, found)
    kept = None
    if not discard:
        at = await blocking(context.store.snapshots, name)
        serial = OperationId(await blocking(context.store.next_serial))
        kept = await internal.create(
            context,
            name,
            InternalRequest(
                name=asked.automatic_name({found.name for found in at}, serial),
                description=f"before the revert to {target}",
            ),
        )
    async with working(context, name, "snapshot revert") as work:
        chains = await blocking(context.store.chains, name)
        if work.qemu is None:
            raise QemuGone(f"QEMU of machine {name} has ended; nothing was changed", machine=name)
        await graph.require_agreement(work.qemu, chains, machine=name)
        snapshot = next(s for s in await blocking(context.store.snapshots, name) if s.name == target)
        await internal.load(context, work, snapshot, chains, paused=paused)
    return snapshot, kept


async def freeze(context: Context, name: str, target: str) -> None:
    """Put a layer on top of the one a running guest writes to, where the snapshot is inside that: it is read first."""
    machine = await blocking(context.store.machine, name)
    snapshot = next((s for s in await blocking(context.store.snapshots, name) if s.name == target), None)
    if snapshot is None or snapshot.state == "consumed" or not context.process(machine):
        return
    active = {chain.disk: chain.active.id for chain in await blocking(context.store.chains, name)}
    if busy := tuple(p.disk for p in snapshot.points if p.tag and active.get(p.disk) == p.layer):
        await create.add_layers(context, name, CreateRequest(disks=busy))


def require_frozen(at: Situation, snapshot: Snapshot) -> None:
    """Make sure that no guest writes to an image that is to be copied.

    Raises:
        StateError: one does, as another command has come in between.
    """
    active = {chain.active.id for chain in at.live.values()} if at.running else set()
    if busy := [point.layer for point in snapshot.points if point.tag and point.layer in active]:
        raise StateError(
            f"the guest of machine {at.machine} writes to {', '.join(busy)} again, where snapshot {snapshot.name} is"
            " inside; nothing was changed",
            hint="another command has come in between: try again",
            machine=at.machine,
        )


def memory_in(planned: RevertPlan, operation: Operation) -> LoadingInside | None:
    """The memory inside a layer that a revert makes, for the QEMU that is started on it; None if there is none."""
    if planned.inside is None:
        return None
    layers = {copy.disk: copy.layer for copy in planned.copies}
    return LoadingInside(job_of(operation.id), planned.copies[0].tag, layers, planned.inside)
