"""What ``define`` and ``undefine`` would do now (``--dry-run``): nothing is made or changed."""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from qmpsnap.host.threads import to_read
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations.operation import DefinePlan
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.overlays import require_free
from qmpsnap.ops.lifecycle import define, undefine
from qmpsnap.ops.session.session import looking, require_settled


class Forgotten(Struct, frozen=True):
    """What ``undefine`` would leave as files, or delete."""

    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


async def defined(
    context: Context,
    spec: MachineSpec,
    *,
    folders: Sequence[Path] = (),
    allow_extra: bool = False,
    amend: define.Amend = define.as_it_is,
) -> DefinePlan:
    """The plan that :func:`qmpsnap.ops.lifecycle.define.run` would follow now; refused as that would be."""
    spec, firmware = await define.complete(context, define.with_ports(spec), allow_extra=allow_extra, keep=False)
    await require_settled(context, spec.name)
    await define.require_new(context, spec.name)
    machine, sources = await define.survey(context, spec, (context.home.data, *context.home.images, *folders))
    serial = OperationId(await context.astore.next_serial())
    planned = define.plan(machine, sources, serial=serial, home=context.home, variables=firmware is not None)
    planned = await to_read(amend, planned, sources, serial)
    await to_read(require_free, [*(layer.path for layer in planned.created), *filter(None, [planned.variables])])
    return planned


async def forgotten(context: Context, name: str, *, disks: undefine.Fate | None) -> Forgotten:
    """The files that :func:`qmpsnap.ops.lifecycle.undefine.run` would keep or remove now; refused as that would be."""
    async with looking(context, name, removes=disks == "remove") as session:
        await undefine.require_possible(session, disks)
    images = await undefine.images_alone(context, name)
    states = [found.vmstate.path for found in await context.astore.snapshots(name) if found.vmstate]
    files = (*images, *states)
    return Forgotten(removed=files) if disks == "remove" else Forgotten(kept=files)
