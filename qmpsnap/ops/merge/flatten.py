"""``flatten``: a clone in a Ceph cluster gets a copy of what it reads of its parent, and depends on it no more.

The cluster copies, below QEMU, whose guest goes on reading and writing. No record changes: a clone that is copied in
part reads as before, and another flatten copies the rest.
"""

from collections.abc import Sequence

from qmpsnap.errors import StateError
from qmpsnap.hint import call
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.names import job_id, layer_disk
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.flatten import Clone, FlattenPlan
from qmpsnap.model.operations.operation import Change, Operation
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.ops.base import volumes
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.ops.session.session import begin, looking, working
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor


async def preview(context: Context, name: str, disk: str) -> FlattenPlan:
    """The plan that :func:`run` would follow now; locks and changes nothing."""
    async with looking(context, name) as session:
        return await _plan(session, session.basis, disk)


async def run(context: Context, name: str, disk: str, *, report: Report = unreported) -> FlattenPlan:
    """Flatten the clone that a disk lies on; returns what was done, which is nothing where it has no parent.

    Raises:
        NotFoundError: the machine has no such disk, or its image is gone.
        StateError: the disk lies on no image of a cluster, or snapshots of the image would keep the tie.
        StoreMismatch: the image is another one than the recorded one.
        StorageHangs: the cluster does not answer any more.
        HostCannot: ``rbd`` has failed, or is missing.
    """
    async with working(context, name, "flatten") as session:
        made = await _plan(session, session.basis, disk)
        await carry_out(session, session.basis, made, report=report)
        return made


def choose(machine: str, chain: Chain) -> Layer:
    """The layer of a disk that may be a clone: only the lowest one can be an image of a cluster. Pure."""
    if chain.base.storage == "rbd" and not volumes.is_snapshot(chain.base):
        return chain.base
    below = len(chain.layers) > 1
    raise StateError(
        f"disk {chain.disk} of machine {machine} lies on no clone in a Ceph cluster",
        hint=call("stream", machine, chain.disk) + " copies what the layers below its active one hold"
        if below
        else "there is nothing to flatten: its image reads from no other one",
        machine=machine,
    )


async def clones_of(layers: Sequence[Layer]) -> tuple[Clone, ...]:
    """Those of the layers that have a parent."""
    found = [(layer, await volumes.tie(layer)) for layer in layers]
    return tuple(
        Clone(disk=layer_disk(layer.id) or layer.id, layer=layer, parent=tie[0], moves=tie[1])
        for layer, tie in found
        if tie
    )


async def _plan(session: MachineSession, basis: Basis, disk: str) -> FlattenPlan:
    machine = session.machine
    machine.require_disk(disk)
    chain = next(chain for chain in basis.chains if chain.disk == disk)
    layer = choose(machine.name, chain)
    return FlattenPlan(machine=machine.name, clones=await clones_of([layer]))


async def carry_out(session: MachineSession, basis: Basis, made: FlattenPlan, *, report: Report) -> None:
    """Journal a plan and flatten one clone after the other; what is interrupted can be done again."""
    if not made.clones:
        return
    operation = await begin(session, basis, lambda _: made, jobs=False)
    async with recovery.attempting(session, operation):
        await session.context.astore.mark(operation.id, "running", step=steps.COPYING)
        for clone in made.clones:
            await volumes.flatten(clone.layer, told=_progress(operation, clone, report))
        await session.context.astore.settle(operation.id, session.machine.name, Change())


def _progress(operation: Operation[FlattenPlan], clone: Clone, report: Report) -> volumes.Percent:
    def told(percent: int) -> None:
        report(
            JobInfo(
                id=job_id(operation.id, clone.disk),
                type="flatten",
                status="concluded" if percent == 100 else "running",  # noqa: PLR2004
                current_progress=clone.moves * percent // 100,
                total_progress=clone.moves,
            )
        )

    return told


async def end(broken: Broken[FlattenPlan], _: Monitor | None) -> Direction:
    """End an interrupted flatten by what the cluster says: it is not gone on with, as that may take hours."""
    if broken.operation.step == steps.PLANNED or any(
        [await volumes.is_tied(clone.layer) for clone in broken.operation.plan.clones]
    ):
        await broken.mark_failed()
        return "back"
    await broken.context.astore.settle(broken.operation.id, broken.machine.name, Change())
    return "forward"
