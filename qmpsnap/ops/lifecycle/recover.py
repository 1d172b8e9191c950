"""Recovery of an interrupted ``define`` or ``undefine``, and removing the files of an undefined machine."""

import contextlib
import shutil
from collections.abc import Awaitable

from qmpsnap.block.image.create import remove, sync_folders
from qmpsnap.errors import HostCannot, StateError, StoreMismatch
from qmpsnap.host.threads import to_end
from qmpsnap.machine.config.firmware_files import forget_variables, remove_tpm
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.operations.operation import DefinePlan
from qmpsnap.model.operations.undefine import UndefinePlan
from qmpsnap.ops.base import volumes
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.overlays import remove_new
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.qmp.session import Monitor


async def end(broken: Broken[DefinePlan], _: Monitor | None) -> Direction:
    """Undo a definition that did not settle: it has no machine yet, and nobody can have used its images."""
    plan = broken.operation.plan
    await remove_new([*plan.images, *plan.overlays])
    await _remove_brought(broken.context, plan)
    if plan.change.define:
        await blocking(broken.context.store.records.take_back, plan.change.define)
    made = plan.variables is not None  # a file that was there before it was planned has prevented the plan
    await to_end(lambda: remove_folder(broken.context.home, plan.machine, variables=made))
    await broken.mark_failed()
    return "back"


async def _remove_brought(context: Context, plan: DefinePlan) -> None:
    """Remove what came out of a bundle: unlike the files that a definition makes, it was known before.

    What was known before, too, are images of others that would have become ours; those stay.
    """
    disks = plan.change.define.spec.disks if plan.change.define else ()
    given = {disk.existing for disk in disks if disk.own}
    brought: list[Layer | Vmstate] = [
        layer for layer in plan.change.layers if layer.owned and layer.inode and layer.path not in given
    ]
    brought += [snapshot.vmstate for snapshot in plan.change.snapshots if snapshot.vmstate]
    for file in brought:
        with contextlib.suppress(StoreMismatch):  # somebody else's by now
            await remove(file.path, device=file.device, inode=file.inode, birth=file.birth)
    for snapshot in plan.change.snapshots:
        if snapshot.variables:
            await to_end(forget_variables, snapshot.variables)
    await to_end(lambda: shutil.rmtree(context.home.unpacked(plan.machine), ignore_errors=True))


async def end_undefine(broken: Broken[UndefinePlan], _: Monitor | None) -> Direction:
    """Remove what is left of a machine that was forgotten."""
    stuck = (await remove_files(broken.context, broken.operation.plan))[1]
    await broken.mark_settled(error="; ".join(stuck) or None)
    return "forward"


async def remove_files(context: Context, plan: UndefinePlan) -> tuple[list[str], list[str]]:
    """Remove the files of a machine that is forgotten.

    Returns the paths of images and state files that are gone, and what keeps another where it is, a sentence for each.
    """
    stuck: list[str] = []
    files: list[Layer | Vmstate] = [*volumes.latest_first(plan.layers), *plan.states]
    gone = [file.path for file in files if await is_done(stuck, _remove(file, plan))]
    places = [file.path for file in files if not isinstance(file, Layer) or file.storage == "file"]
    await is_done(stuck, sync_folders(places))  # once for all: there may be thousands
    for kept in plan.variables:
        await is_done(stuck, to_end(forget_variables, kept))
    await is_done(stuck, to_end(remove_folder, context.home, plan.machine))
    return gone, stuck


async def is_done(stuck: list[str], removal: Awaitable[bool | None]) -> bool:
    """Whether something is removed; what keeps it is noted, and does not keep what comes after it."""
    try:
        return await removal is not False
    except (HostCannot, StateError, OSError) as error:
        stuck.append(str(error) if isinstance(error, OSError) else error.message)
        return False


async def _remove(file: Layer | Vmstate, plan: UndefinePlan) -> bool:
    """Remove a file that is gone for the store; False for one that somebody has put in its place: that stays."""
    try:
        if isinstance(file, Layer):
            await volumes.remove(file, size=plan.sizes.get(file.id), durably=False)
        else:
            await remove(file.path, device=file.device, inode=file.inode, birth=file.birth, durably=False)
    except StoreMismatch:
        return False
    return True


def remove_folder(home: Home, machine: str, *, variables: bool = True) -> None:
    """Remove a machine's folder, unless somebody has put other files there; with ``variables`` its variable store."""
    folder = home.machine_dir(machine)
    if folder.is_symlink():
        return  # what it leads to is not ours
    if variables:
        home.variables(machine).unlink(missing_ok=True)
        remove_tpm(home.tpm(machine))
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
