"""What the owner of an adopted machine may have done with its images since the QEMU that we know of has ended.

Its owner may launch another QEMU on them at any time, and nobody tells us. QEMU's image locks tell of one that runs,
the files' times of one that wrote and has ended. Machines of our own are left out: ``start`` ends what is open first.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import anyio

from qmpsnap.block.image import header
from qmpsnap.block.image.header import printable
from qmpsnap.block.usage import image_locks
from qmpsnap.errors import HostCannot, ImageRefused, OperationPending
from qmpsnap.hint import call
from qmpsnap.host.threads import to_end
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.ops.session.pending import Broken

PATIENCE: Final = 5.0
"""Seconds that a QEMU which was killed is given to let go of its images: that comes after freeing its memory."""


async def open_elsewhere(machine: Machine, layers: Sequence[Layer]) -> str | None:
    """The path of a layer of an adopted machine without a QEMU that another process has open; None if there is none."""
    held = None
    with anyio.move_on_after(PATIENCE):
        while machine.adopted and (held := await to_end(_locked, layers)):
            await anyio.sleep(0.05)
    return held


async def require_unused(broken: Broken, layers: Sequence[Layer]) -> None:
    """Make sure that no QEMU but ours uses, or has used since the last step, layers that are to be removed."""
    await _require_closed(broken, layers)
    if broken.machine.adopted and await to_end(_last_write, layers) > broken.operation.updated:
        raise _unclear(broken, f"{_names(layers)} is to be removed but may have been written to since")


async def new_counts(broken: Broken, *, old: Sequence[Layer], new: Sequence[Layer], fresh: bool = False) -> bool:
    """Whether the new side of an operation counts, whose QEMU has ended after both were equal.

    The owner of an adopted machine goes on with the old side, as the store has not said otherwise; what was written to
    the new one was so before. All other machines go on with the new side. ``fresh``: the new layers lie on the old ones
    and were empty at the operation's step, at which the guest still wrote to the old. ``OperationPending``: another
    process has one of them open, or both may have been written to.
    """
    if not broken.machine.adopted:
        return True
    await _require_closed(broken, (*old, *new))
    before, after = await to_end(_last_write, old), await to_end(_last_write, new)
    since = broken.operation.updated
    # Where what they hold can be told, no clock is asked whether anything would be lost.
    if await to_end(_all_empty, [layer for layer in new if os.path.lexists(layer.path)]) if fresh else after <= since:
        return False
    if before <= since or (fresh and before <= after):
        return True
    raise _unclear(broken, f"both {_names(old)} and {_names(new)} may have been written to by its owner's QEMUs")


async def _require_closed(broken: Broken, layers: Sequence[Layer]) -> None:
    if held := await open_elsewhere(broken.machine, layers):
        name = broken.machine.name
        error = broken.pending(f"another process has {printable(held)} open")
        error.hint = "end that process, then " + call("recover", name) + "; if it is the machine's own QEMU, "
        error.hint += _adopted_again(name)
        raise error


def _unclear(broken: Broken, why: str) -> OperationPending:
    """Nobody but the owner knows which files are the guest's disk."""
    error, name = broken.pending(why), broken.machine.name
    error.hint = "launch its QEMU on the right files, then " + _adopted_again(name)
    return error


def _locked(layers: Iterable[Layer]) -> str | None:
    return next((layer.path for layer in layers if image_locks.is_locked(layer.path)), None)


def _last_write(layers: Iterable[Layer]) -> float:
    """When one of them was written to last, in seconds since the epoch; of a block device its node does not tell."""
    return max((_written(layer.path) for layer in layers), default=0)


def _written(path: str) -> float:
    try:
        status = Path(path).lstat()
    except FileNotFoundError:
        return 0
    except OSError:
        return float("inf")
    return status.st_mtime if stat.S_ISREG(status.st_mode) else float("inf")


def _all_empty(layers: Iterable[Layer]) -> bool:
    """Whether nothing was written to any of them; what cannot be read may have been."""
    try:
        return all(header.is_empty(layer) for layer in layers)
    except (ImageRefused, HostCannot):
        return False


def _names(layers: Iterable[Layer]) -> str:
    return ", ".join(printable(layer.path) for layer in layers)


def _adopted_again(name: str) -> str:
    return call("undefine", name, disks="keep") + " and " + call("adopt", name, socket="SOCKET")
