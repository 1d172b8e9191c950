"""What can be refused of a merge is asked before its operation is opened, with which names go and marks are made."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from qmpsnap.block.image import backing
from qmpsnap.block.image.header import printable
from qmpsnap.block.usage import access
from qmpsnap.errors import HostCannot, QmpsnapError
from qmpsnap.host.threads import to_read
from qmpsnap.machine.open_files import require_recorded
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.operations.operation import Merge, Removal
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base import volumes
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.merge.job import rewritten
from qmpsnap.ops.outside import other_programs


async def require_possible(
    session: MachineSession, at: Situation, steps: Sequence[Merge | Removal], *, flattened: Collection[Layer] = ()
) -> None:
    """Refuse before anything begins what QEMU or the host would refuse.

    A QEMU that has the images open is not asked for their locks, which are its own: it refuses by itself, and as its
    job stays to be seen, that is undone. ``flattened``: clones that will depend on nothing by then.

    Raises:
        StoreMismatch: the name of a layer that a merge reads or writes to leads to another file.
        QmpsnapError: as :func:`access.require_writable` and :func:`access.require_readable`.
    """
    try:
        await to_read(_look, at, steps)
        removed = [layer for step in steps for layer in step.removed]
        await volumes.require_independent(removed, flattened=flattened)
        if closed := volumes.logical_snapshots(removed):
            await other_programs.require_free(closed, machine=session.machine.name, readers=True)
    except QmpsnapError as error:
        error.machine = session.machine.name
        raise


def _look(at: Situation, steps: Sequence[Merge | Removal]) -> None:
    for step in steps:
        if isinstance(step, Merge):
            # QEMU opens the one that it is to write to anew, by its name.
            require_recorded((*step.chain, *step.rebased), machine=at.machine)
            _look_at_merge(step)
        else:
            for _, inside, _ in step.tags:
                access.require_writable(at.forest.layer(inside), ours=not at.running, shared=at.running)
        for layer in step.removed:
            if layer.storage == "file":
                _require_removable(layer.path)


def _look_at_merge(step: Merge) -> None:
    for layer in () if step.live else step.chain:
        backing.require_size(layer)
    access.require_writable(
        step.into,
        size=max(step.into.virtual_size, step.top.virtual_size) if step.kind == "commit" else 0,
        ours=not step.live,
        shared=step.live,
    )
    in_qemu, by_us = rewritten(step)
    for layer in in_qemu:
        access.require_writable(layer, ours=not step.live, shared=step.live)
    for layer in by_us:
        access.require_writable(layer)
    if not step.live:
        for layer in step.chain:
            access.require_readable(layer)


def _require_removable(path: str) -> None:
    """The folder lets go of a name, and the file too; one that is gone already is fine."""
    folder = Path(path).parent
    if os.path.lexists(path) and not (os.access(folder, os.W_OK) and access.may_go(path)):
        raise HostCannot(
            f"{printable(path)} is to be removed, but its folder or the file does not permit that",
            hint=f"check the permissions of {printable(str(folder))}, and lsattr of both",
        )
