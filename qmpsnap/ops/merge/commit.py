"""``commit`` and ``stream``: layers of the live chain become one, downwards or upwards."""

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import OperationPending, StateError
from qmpsnap.hint import call, option
from qmpsnap.host.threads import to_read
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.names import job_id
from qmpsnap.model.operations.operation import Change, Merge, MergePlan
from qmpsnap.model.planning import merging as rules
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.merge import job
from qmpsnap.ops.merge.preflight import require_possible
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.planning_state import look, require_space, resolve
from qmpsnap.ops.session.session import begin, inputs, looking, working
from qmpsnap.qmp.jobs import Report, unreported


class CommitRequest(Struct, frozen=True, kw_only=True):
    """Merge the layers above ``base`` up to ``top`` into ``base``.

    Attributes:
        base: layer id or snapshot name; None is the lowest layer.
        top: layer id or snapshot name; None is the active layer.
        consume: agree that snapshots below ``top`` become unreadable.
        bandwidth: bytes per second that the job copies at most; 0 is without limit.
    """

    disk: str
    base: str | None = None
    top: str | None = None
    consume: bool = False
    bandwidth: int = 0


class StreamRequest(Struct, frozen=True, kw_only=True):
    """Let the active layer absorb what lies between it and ``base``; None absorbs everything."""

    disk: str
    base: str | None = None
    bandwidth: int = 0


Request = CommitRequest | StreamRequest


def plan(at: Situation, chain: Chain, request: Request) -> MergePlan:
    """What will be done; pure.

    Raises:
        StateError: base is above top, others read what would change, or snapshots would be consumed unasked.
        NotFoundError: the chain has no such layer.
    """
    if isinstance(request, CommitRequest):
        return _plan_commit(at, chain, request)
    base = resolve(at, chain, request.base) if request.base else None
    step = rules.stream(at, chain, into=chain.active.id, base=base)
    return MergePlan(
        verb="stream",
        machine=at.machine,
        opening=Change(),
        undo=Change(),
        steps=(step,),
        bandwidth=request.bandwidth,
    )


def _plan_commit(at: Situation, chain: Chain, request: CommitRequest) -> MergePlan:
    base = resolve(at, chain, request.base) if request.base else chain.base.id
    top = resolve(at, chain, request.top) if request.top else chain.active.id
    lost = rules.consumed_by_commit(at, chain.disk, chain, base=base, top=top)
    opening = Change(snapshots=tuple(replace(snapshot, state="consumed") for snapshot in lost))
    step = rules.commit(at.after(opening), chain, base=base, top=top)
    if lost and not request.consume:
        raise StateError(
            f"a commit of {top} into {base} invalidates these snapshots of machine {at.machine}:"
            f" {', '.join(snapshot.name for snapshot in lost)}",
            hint="keep them: " + call("stream", at.machine, chain.disk) + "; or accept that with " + option("consume"),
            machine=at.machine,
        )
    return MergePlan(
        verb="commit",
        machine=at.machine,
        opening=opening,
        undo=Change(snapshots=lost),
        steps=(step,),
        bandwidth=request.bandwidth,
    )


async def preview(context: Context, name: str, request: Request) -> tuple[MergePlan, tuple[str, dict[str, object]]]:
    """The plan that :func:`run` would follow now and the command that starts its job; locks and changes nothing."""
    async with looking(context, name, removes=True) as session:
        at, made = await _plan(session, request)
        await to_read(require_space, at, made.steps, context.home.data)
        await require_possible(session, at, made.steps)
        serial = (await inputs(session, at.basis)).serial
        step = made.steps[0]
        assert isinstance(step, Merge)
        root = await job.root_of(session.qemu, step) if session.qemu and step.live else None
        command, arguments = job.start_command(job_id(serial, step.disk), step, root=root, limit=made.bandwidth)
        return made, (command, session.machine.sent(arguments))


async def run(context: Context, name: str, request: Request, *, report: Report = unreported) -> MergePlan:
    """Merge; returns what was done once store, QEMU and headers agree on it.

    Raises:
        QmpsnapError: see :func:`plan`; besides, the job's own failure, after which the chain is as before.
    """
    verb = "commit" if isinstance(request, CommitRequest) else "stream"
    async with working(context, name, verb, removes=True) as session:
        at, made = await _plan(session, request)
        await to_read(require_space, at, made.steps, context.home.data)
        await require_possible(session, at, made.steps)
        return await carry_out(session, at.basis, made, report=report)


async def _plan(session: MachineSession, request: Request) -> tuple[Situation, MergePlan]:
    session.machine.require_disk(request.disk)
    at = await look(session, disks=(request.disk,))
    return at, plan(at, at.live[request.disk], request)


async def carry_out(
    session: MachineSession, basis: Basis, plan: MergePlan, *, report: Report, patience: float | None = None
) -> MergePlan:
    """Journal a plan, run its steps, and end it one way or the other when that fails.

    After ``patience`` seconds its job is left to its work, with ``OperationPending``.
    """
    operation = await begin(session, basis, lambda _: plan)
    async with recovery.attempting(session, operation):
        with anyio.move_on_after(patience) as scope:
            await job.run(session, operation, report=report)
        if scope.cancelled_caught:
            name = session.machine.name
            raise OperationPending(
                f"the {plan.verb} of machine {name} is not complete after {patience:g} s",
                hint=call("wait", name) + ", or " + call("cancel", name),
                machine=name,
            )
    return plan
