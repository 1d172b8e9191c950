"""What the header of a layer says once that is on the disk; writing another backing string into it."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qmpsnap.block.image import encrypted, header
from qmpsnap.block.image import qemu_img as tool
from qmpsnap.block.image.header import Header, printable
from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host.files import opened, same_file
from qmpsnap.host.threads import runs_to_end, to_end
from qmpsnap.model.layers.chain import Layer


async def set_backing(
    layer: Layer, backing: Layer | None, *, qemu_img: str, key: int | None = None, deadline: float = 60
) -> None:
    """Let ``layer`` name ``backing`` as its backing (``qemu-img rebase -u``); fine if it does already.

    No data moves: only for a new backing that reads like the old one. ``key``: descriptor of an encrypted layer's key.
    """
    wanted = (backing.path if backing else None, backing.format if backing else None)
    with contextlib.ExitStack() as stack:
        descriptor = await to_end(stack.enter_context, _opened(layer))
        if await to_end(_backing_of, descriptor, layer) == wanted:
            return
        target = ["-b", backing.path, "-F", backing.format] if backing else ["-b", ""]
        # The very file that was looked at, whatever its name leads to by now.
        itself = f"/proc/self/fd/{descriptor}"
        argv = [qemu_img, "rebase", "-u", "-f", layer.format, *target, itself]
        if key is not None:
            argv = [qemu_img, "rebase", *encrypted.secret(key), "-u", *target, encrypted.alone(itself, key)]
        inherited = [descriptor] if key is None else [descriptor, key]
        late = f"{qemu_img} did not end within {deadline:g} s"
        done = await tool.run(argv, deadline=deadline, late=late, effect="unknown", inherited=inherited)
        said = printable(done.stderr.decode(errors="backslashreplace").strip())
        if done.returncode or await to_end(_backing_of, descriptor, layer) != wanted:
            raise HostCannot(f"the backing file of {layer.path} was not changed: {said or 'no reason given'}")


@runs_to_end
def require_backing(layer: Layer, backing: Layer | None) -> None:
    """Make sure that the header of ``layer``, which a QEMU may have open, names ``backing``."""
    with _opened(layer) as descriptor:
        found = _header(descriptor, layer).backing
    if found != (backing.path if backing else None):
        raise StoreMismatch(
            f"the header of {printable(layer.shown)} names {printable(found) if found else 'nothing'} as its backing"
            f" file, instead of {printable(backing.path) if backing else 'nothing'}"
        )


def require_size(layer: Layer, found: Header | None = None) -> None:
    """Make sure that the image of a layer, whose header may have been ``found`` already, has its recorded size."""
    found = found or header.read(layer.path, format=layer.format, block_device=True)
    if found.virtual_size != layer.virtual_size:
        raise StoreMismatch(
            f"{printable(layer.shown)} has a virtual size of {found.virtual_size} bytes, the store has"
            f" {layer.virtual_size}: another program resized it",
            hint=call("check", "VM", repair=True)
            + " records the size of a disk that has grown; to undo the resize, set"
            + f" {layer.virtual_size} bytes again (block_resize, or qemu-img resize of a stopped machine)",
        )


def durable_size(layer: Layer) -> int:
    """Bytes for the guest by the file of ``layer``, which a QEMU may have open, once they are on the disk."""
    if layer.storage == "rbd":
        return header.read(layer.path).virtual_size
    with _opened(layer) as descriptor:
        return _synced(descriptor, layer).virtual_size


@contextmanager
def _opened(layer: Layer) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(opened(layer.path, os.O_RDONLY))
        except OSError as error:
            what = f"{printable(layer.shown)} cannot be opened: {error.strerror}; it was not changed"
            raise HostCannot(what) from error
        yield descriptor


def _backing_of(descriptor: int, layer: Layer) -> tuple[str | None, str | None]:
    """What the header says, once that is on the disk."""
    found = _synced(descriptor, layer)
    return found.backing, found.backing_format


def _synced(descriptor: int, layer: Layer) -> Header:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise HostCannot(f"{printable(layer.shown)} cannot be synced: {error.strerror}") from error
    return _header(descriptor, layer)


def _header(descriptor: int, layer: Layer) -> Header:
    found = header.inspect(descriptor, path=layer.path, format=layer.format)
    if not same_file(layer, found):
        raise StoreMismatch(f"{printable(layer.shown)} is not the recorded file; it was not touched")
    return found
