"""Other programs that have a machine's images open: looked for before anything of the machine is changed."""

import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Final, NoReturn, TypeVar

import anyio

from qmpsnap.block.image.header import printable
from qmpsnap.block.usage import users
from qmpsnap.block.usage.users import User
from qmpsnap.errors import ImageInUse
from qmpsnap.host.threads import to_end
from qmpsnap.model.machines.rbd import PREFIX, shown
from qmpsnap.model.operations.operation import Plan
from qmpsnap.model.planning import sharing
from qmpsnap.model.planning.layer_graph import Forest

T = TypeVar("T")

PATIENCE: Final = 1.0
"""Seconds that somebody is given to close an image: one that was killed closes it only when its memory is freed."""


def require_free_now(paths: Iterable[str], *, machine: str, readers: bool = False, ours: Collection[int] = ()) -> None:
    """Refuse where somebody else writes to one of these images, or with ``readers`` has one open; called in a thread.

    The processes ``ours`` may.
    """
    for found in users.look(paths, readers=readers, ours=ours).users.values():
        refuse(found, machine)


async def require_free(
    paths: Sequence[str], *, machine: str, readers: bool = False, ours: Collection[int] = ()
) -> None:
    """The same, once whoever has one open was given :data:`PATIENCE` to close it."""
    await retrying(lambda: to_end(lambda: require_free_now(paths, machine=machine, readers=readers, ours=ours)))


async def retrying(call: Callable[[], Awaitable[T]]) -> T:
    """Do what refuses because somebody has an image open, until nobody has or :data:`PATIENCE` is over."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return await call()
        except ImageInUse:
            if time.monotonic() > end:
                raise
        await anyio.sleep(0.05)


def require_unread(plan: Plan, forest: Forest, *, machine: str) -> None:
    """Refuse a plan that would write to or remove an image that somebody else reads; no QEMU has it open."""
    changes = sharing.uses(plan, forest).changes
    paths = [layer.path for layer in forest.layers.values() if layer.id in changes]
    require_free_now(paths, machine=machine, readers=True)


def refuse(found: User, machine: str) -> NoReturn:
    """Say who is in the way."""
    raise ImageInUse(
        f"{printable(shown(found.path))}, an image of machine {machine}, {found.does} {found.who}",
        hint=_remedy(found)
        if found.by
        else f"it may be the QEMU of {machine}: end it where it was started, or try again there",
        machine=machine,
    )


def _remedy(found: User) -> str:
    if all(process.pid for process in found.by):
        return "end that process, then try again"
    if found.path.startswith(PREFIX):
        return "end that client, then try again; the cluster forgets one that was killed within a minute"
    return "end that use of it (umount, swapoff, losetup -d, dmsetup remove), then try again"
