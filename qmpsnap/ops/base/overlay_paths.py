"""Layers at paths that a user has chosen: what may be there, and whose file it is if the operation is interrupted.

The file is created under a temporary name beside its path and then has both names until it is certain that the
operation settles. An interrupted operation removes the file at the path only if it is that file.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from qmpsnap.block.image import header, staged
from qmpsnap.errors import HostCannot, ImageRefused, StateError, UsageError
from qmpsnap.host.threads import to_read
from qmpsnap.model.home import Home
from qmpsnap.model.operations.operation import Overlay
from qmpsnap.ops.base.context import Context


async def require_free(context: Context, machine: str, files: Mapping[str, str]) -> None:
    """Make sure that new layers can be made there: plain absolute paths, free, not where qmpsnap names the layers."""
    for disk, path in files.items():
        _require_place(context.home, machine, path)
        if fault := header.backing_fault(path):
            raise ImageRefused(f"no layer can be created at {header.printable(path)}: {fault}")
        if sum(other == path for other in files.values()) > 1:
            raise UsageError(f"{header.printable(path)} is given for {disk} and another disk")
        if known := await context.astore.layer_at(path):
            raise StateError(
                f"{header.printable(path)} is layer {known.id} of this store",
                hint="choose another name",
            )
        await to_read(_require_nothing, path)


def _require_place(home: Home, machine: str, text: str) -> None:
    path = Path(text)
    if not path.is_absolute() or str(path) != text or ".." in path.parts:
        raise UsageError(f"{text!r} is not a plain absolute path")
    own = path.parent == home.machine_dir(machine) and not re.match(r"[a-z0-9]+-\d+\.", path.name)
    if path.is_relative_to(home.machines) and (not own or path == home.variables(machine)):
        raise UsageError(
            f"{header.printable(text)} is in a folder where qmpsnap names the layers",
            hint="choose another folder or name",
            machine=machine,
        )


def _require_nothing(path: str) -> None:
    try:
        if not stat.S_ISDIR(Path(path).parent.stat().st_mode):
            raise NotADirectoryError(20, os.strerror(20))
        Path(path).lstat()
    except FileNotFoundError as error:
        if not Path(path).parent.exists():
            raise _no_folder(path, error) from error
        return
    except OSError as error:
        raise _no_folder(path, error) from error
    raise StateError(f"{header.printable(path)} exists already", hint="choose another name")


def _no_folder(path: str, error: OSError) -> HostCannot:
    folder = header.printable(str(Path(path).parent))
    hint = "create the folder" if isinstance(error, FileNotFoundError) else "choose another folder"
    return HostCannot(f"{folder} cannot be used: {error.strerror}", hint=hint)


async def let_go(overlays: Sequence[Overlay]) -> None:
    """The files keep the names that were chosen for them alone; fine when they do already."""
    for overlay in overlays:
        if overlay.part and (identity := await staged.identity_of(overlay.part)):
            await staged.discard(overlay.part, identity)


async def undo(overlays: Sequence[Overlay]) -> None:
    """Remove the files, and nothing else that may be at their places."""
    for overlay in overlays:
        if overlay.part and (identity := await staged.identity_of(overlay.part)):
            await staged.discard(overlay.layer.path, identity)
            await staged.discard(overlay.part, identity)
