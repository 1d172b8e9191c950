"""``template``: which templates there are, who maps them, and removing those that are not in use."""

import contextlib
import os

from msgspec import Struct

from qmpsnap.errors import StateError
from qmpsnap.machine import templates
from qmpsnap.machine.templates import Shelf, Template
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, in_thread
from qmpsnap.ops.fork import bake


class Shelved(Struct, frozen=True, kw_only=True):
    """A template and where it lies.

    Attributes:
        template: its ``source`` is the snapshot that it was made of first, as ``web@warm``; ``created`` is a time.
        folder: path of its folder.
        bytes: of memory or disk that its files occupy.
        forks: names of this store's machines that map it.
        used: when it was last needed, in seconds since the epoch.
        in_memory: its file system is memory: QEMU can save the memory of its forks while they run.
    """

    template: Template
    folder: str
    bytes: int
    forks: tuple[str, ...]
    used: float
    in_memory: bool


class Pruned(Struct, frozen=True, kw_only=True):
    """What was removed, and what running forks keep.

    Attributes:
        removed: templates that nothing uses.
        kept: templates that running forks map.
    """

    removed: tuple[Shelved, ...]
    kept: tuple[Shelved, ...]


async def listed(context: Context) -> tuple[Shelved, ...]:
    """Every template that can be used, by folder; the one that is removed first, first."""

    def look() -> tuple[Shelved, ...]:
        users = _users(context)
        return tuple(
            _shelved(shelf, template, users) for shelf in templates.shelves(context.home) for template in shelf.all()
        )

    return await blocking(look)


def _users(context: Context) -> dict[tuple[int, int], list[str]]:
    found: dict[tuple[int, int], list[str]] = {}
    folders = [shelf.folder for shelf in templates.shelves(context.home)]
    for machine in context.store.machines():
        process = context.process(machine) if machine.origin else None
        for file in templates.mapped([process.pid], folders) if process else ():
            found.setdefault(file, []).append(machine.name)
    return found


def _shelved(shelf: Shelf, template: Template, users: dict[tuple[int, int], list[str]]) -> Shelved:
    folder = shelf.of(template.key)
    size = 0
    with contextlib.suppress(OSError):
        size = sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))
    return Shelved(
        template=template,
        folder=str(folder),
        bytes=size,
        forks=tuple(users.get((template.ram.device, template.ram.inode), ())),
        used=shelf.used(template.key),
        in_memory=templates.is_memory(shelf.folder),
    )


async def prune(context: Context, *, all: bool = False, look: bool = False) -> Pruned:  # noqa: A002 - as it is typed
    """Remove the templates that no running fork maps, and what dead processes have left; with ``all`` the others, too.

    Forks that run keep what they map. With ``look`` nothing is removed.

    Raises:
        StateError: another process makes a template.
    """
    found = await listed(context)
    kept = () if all else tuple(one for one in found if one.forks)
    removed = tuple(one for one in found if one not in kept)
    for shelf in () if look else templates.shelves(context.home):
        try:
            async with in_thread(shelf.locked()):
                await bake.clean(shelf)
                for name in await blocking(shelf.names):
                    if str(shelf.of(name)) not in {one.folder for one in kept}:
                        await blocking(shelf.remove, name)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            raise StateError(
                f"another process is at work in {shelf.folder}", hint="try again when it has made its template"
            ) from None
    return Pruned(removed=removed, kept=kept)
