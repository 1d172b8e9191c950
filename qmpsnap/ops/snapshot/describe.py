"""``snapshot describe``: another description and other tags, in one SQL transaction."""

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import NotFoundError, UsageError
from qmpsnap.hint import call
from qmpsnap.model.layers.snapshot import Snapshot, require_snapshot
from qmpsnap.model.names import check_description
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.tags import check_tags
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.session.session import looking, working


class DescribeRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        name: of the snapshot.
        description: None leaves what there is.
        tags: added, or replaced where there is one of that key.
        untag: keys of tags to remove.
    """

    name: str
    description: str | None = None
    tags: Mapping[str, str] = {}
    untag: tuple[str, ...] = ()


def plan(before: Snapshot, request: DescribeRequest, *, machine: str) -> Snapshot:
    """The snapshot as it is described then; pure.

    Raises:
        UsageError: nothing is asked for, or such a description or tag cannot be.
        NotFoundError: a tag to remove is not there.
    """
    if request.description is None and not request.tags and not request.untag:
        raise UsageError(f"nothing is said of snapshot {before.name}", hint="give a description, tags, or both")
    for key in request.untag:
        if key in request.tags:
            raise UsageError(f"tag {key} is both set and removed")
        if key not in before.tags:
            raise NotFoundError(
                f"snapshot {before.name} has no tag {key!r}",
                hint=call("snapshots", machine) + " lists the tags",
                machine=machine,
            )
    kept = {key: value for key, value in before.tags.items() if key not in request.untag}
    tags = check_tags({**kept, **request.tags})
    description = before.description if request.description is None else check_description(request.description)
    return replace(before, description=description, tags=tags)


async def preview(context: Context, name: str, request: DescribeRequest) -> Snapshot:
    """The snapshot as :func:`run` would leave it now; changes nothing."""
    async with looking(context, name) as session:
        return await _plan(session, request)


async def run(context: Context, name: str, request: DescribeRequest) -> Snapshot:
    """Describe a snapshot otherwise; returns it as it is now."""
    async with working(context, name, "snapshot describe") as session:
        after = await _plan(session, request)
        await context.astore.apply(name, Change(snapshots=(after,)))
        return after


async def _plan(session: MachineSession, request: DescribeRequest) -> Snapshot:
    machine = session.machine.name
    before = require_snapshot(await session.context.astore.snapshots(machine), request.name, machine=machine)
    return plan(before, request, machine=machine)
