"""``undefine``: a machine is forgotten; its images stay or go, as was said."""

import shutil
from typing import Literal

from anyio import to_thread

from qmpsnap.block.image import remove
from qmpsnap.errors import StateError, StoreMismatch
from qmpsnap.model.chain import Layer
from qmpsnap.model.vmstate import Vmstate
from qmpsnap.ops.context import Context, blocking
from qmpsnap.ops.recover import remove_folder
from qmpsnap.ops.tagging import forget_variables
from qmpsnap.ops.work import working

Fate = Literal["keep", "remove"]
"""What becomes of the images that only this machine used."""


async def run(context: Context, name: str, *, disks: Fate | None) -> list[str]:
    """Forget a machine and its snapshots.

    Args:
        context: where.
        name: the machine.
        disks: ``keep`` leaves its images as files, ``remove`` deletes those that qmpsnap made and nobody else
            reads; None refuses when anything would be lost.

    Returns:
        Paths of the images and state files that are left (``keep``) or were removed (``remove``); a file that
        somebody has put in the place of one of them is left alone.

    Raises:
        StateError: it runs, or something would be lost and ``disks`` is None.
    """
    async with working(context, name, "undefine", removes=disks == "remove") as work:
        # An adopted machine is given back as it runs; only what it has open must stay.
        if work.qemu and not (work.machine.adopted and disks != "remove"):
            raise StateError(
                f"machine {name} runs; nothing was changed",
                hint=f"qmpsnap stop {name} first{', or undefine it with --keep-disks' if work.machine.adopted else ''}",
                machine=name,
            )
        if disks is None:
            await _refuse_loss(context, name)
        snapshots = await blocking(context.store.snapshots, name)
        states = [found.vmstate for found in snapshots if found.vmstate]
        variables = [found.variables for found in snapshots if found.variables]
        layers = await blocking(context.store.forget, name)
        files: list[Layer | Vmstate] = [*(layer for layer in layers if layer.owned), *states]
        if disks == "remove":
            files = [file for file in files if await _remove(file)]
            for kept in variables:
                await to_thread.run_sync(forget_variables, kept)
            await to_thread.run_sync(remove_folder, context.home, name)
        # The lock goes last, while we hold it: whoever waits for it looks again at what it locked.
        await to_thread.run_sync(lambda: shutil.rmtree(context.home.run_dir(name), ignore_errors=True))
    return [file.path for file in files]


async def _remove(file: Layer | Vmstate) -> bool:
    """Remove a file that is gone for the store; False for one that somebody has put in its place: that stays."""
    try:
        await remove(file.path, device=file.device, inode=file.inode)
    except StoreMismatch:
        return False
    return True


async def _refuse_loss(context: Context, name: str) -> None:
    forest = await blocking(context.store.forest)
    owned = sorted(at.path for at in forest.layers.values() if at.owned and forest.machines_above(at.id) == {name})
    snapshots = [snapshot.name for snapshot in await blocking(context.store.snapshots, name)]
    if owned or snapshots:
        raise StateError(
            f"machine {name} has {len(snapshots)} snapshot(s) ({', '.join(snapshots) or 'none'}) and"
            f" {len(owned)} image(s) of its own ({', '.join(owned)}); nothing was changed",
            hint=f"qmpsnap undefine {name} --keep-disks leaves the images as files, --remove-disks deletes them",
            machine=name,
        )
