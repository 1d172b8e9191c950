"""The end of a volume snapshot: the overlays that shielded the images are committed back, so that no chain grows.

It is an operation of its own, an ordinary commit with the recovery of one. If it does not happen, or is interrupted,
the overlay is an ordinary layer that the guest writes to: the next volume snapshot or ``recover`` takes it up again.
"""

from typing import Final

from qmpsnap.effect import Effect
from qmpsnap.errors import OperationPending, QmpsnapError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_read
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.operations.operation import Change, Merge, MergePlan
from qmpsnap.model.planning import merging as rules
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.merge import commit
from qmpsnap.ops.merge.preflight import require_possible
from qmpsnap.ops.session.planning_state import look, require_space
from qmpsnap.qmp.jobs import Report, unreported

PATIENCE: Final = 120.0
"""Seconds that the commits may take: a guest that writes faster than the storage can follow never lets one end."""


def plan(at: Situation) -> MergePlan | None:
    """A commit of each shield that nobody else has begun to read; None where there is none. Pure."""
    steps: list[Merge] = []
    for chain in at.live.values():
        if chain.disk not in at.unplugged and _is_free(at, chain):
            steps.append(rules.commit(at, chain, base=chain.layers[-2].id, top=chain.active.id))
            at = at.after(steps[-1].change)
    if not steps:
        return None
    return MergePlan(verb="commit", machine=at.machine, opening=Change(), undo=Change(), steps=tuple(steps))


def _is_free(at: Situation, chain: Chain) -> bool:
    below = chain.shielded
    if below is None or at.forest.references_to(chain.active.id) or at.forest.children(chain.active.id):
        return False
    return not at.forest.readers(below.id, but_layer=chain.active.id)


async def run(session: MachineSession, *, report: Report = unreported) -> None:
    """Commit every shield of the machine back.

    Raises:
        OperationPending: that takes longer than :data:`PATIENCE`; the job goes on.
        QmpsnapError: as a commit; the overlay stays what it is.
    """
    chains = await session.context.astore.chains(session.machine.name)
    if not any(chain.shielded for chain in chains):
        return
    at = await look(session, disks=(), counted=False)
    if (made := plan(at)) is None:
        return
    await to_read(require_space, at, made.steps, session.context.home.data)
    await require_possible(session, at, made.steps)
    await commit.carry_out(session, at.basis, made, report=report, patience=PATIENCE)


async def after(session: MachineSession, snapshot: str, *, report: Report) -> None:
    """The same once a snapshot is taken: what goes wrong now does not undo that, and says so."""
    try:
        await run(session, report=report)
    except QmpsnapError as error:
        said = f"snapshot {snapshot} is taken, but an overlay of machine {session.machine.name} is not committed back"
        if isinstance(error, OperationPending) and error.effect == "unknown":  # its job goes on
            error.message = f"{said}: {error.message}"
            raise
        raise OperationPending(
            f"{said}: {error.message}",
            hint=call("recover", session.machine.name) + " commits it, and so does the next volume snapshot",
            effect=await _now(session),
            machine=session.machine.name,
            operation=error.operation,
        ) from error


async def _now(session: MachineSession) -> Effect:
    """What is known of the machine: a commit that was never begun has changed nothing, whatever it died of."""
    try:
        is_open = await session.context.astore.operations(session.machine.name, only_open=True)
    except QmpsnapError:
        return "unknown"
    return "unknown" if is_open else "applied"
