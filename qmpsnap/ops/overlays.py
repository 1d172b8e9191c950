"""New layers: made, told by their files, and removed again while nobody has used them."""

import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import anyio
from anyio import to_thread
from msgspec.structs import replace

from qmpsnap.block import place
from qmpsnap.block.image import remove
from qmpsnap.block.qcow2 import Header
from qmpsnap.errors import QmpsnapError, StoreMismatch
from qmpsnap.model.chain import Chain, Layer
from qmpsnap.model.names import LayerId, OperationId, layer_id
from qmpsnap.model.operation import Change, Overlay
from qmpsnap.ops.context import Context

EMPTY_LIMIT = 8 << 20
"""Bytes an image may occupy and still pass for one that no guest has written to: tables of an empty 64 TiB image."""


def overlay_on(chain: Chain, serial: OperationId, folder: str) -> Layer:
    """A new empty layer on top of a chain."""
    identity = layer_id(chain.disk, serial)
    return Layer(
        id=identity,
        path=f"{folder}/{identity}.qcow2",
        format="qcow2",
        backing=chain.active.id,
        virtual_size=chain.active.virtual_size,
    )


async def make_overlays(context: Context, overlays: Sequence[Overlay]) -> dict[LayerId, Header]:
    """Create every overlay, side by side; each removes its own file when it fails."""
    headers: dict[LayerId, Header] = {}

    async def make(overlay: Overlay) -> None:
        headers[overlay.layer.id] = await context.image.create_overlay(
            overlay.part or overlay.layer.path, backing=overlay.backing, virtual_size=overlay.layer.virtual_size
        )
        if overlay.part:
            await place.claim(overlay.part, overlay.layer.path)

    try:
        async with anyio.create_task_group() as group:
            for overlay in overlays:
                group.start_soon(make, overlay)
    except* QmpsnapError as errors:
        raise _first(errors) from errors
    return headers


def _first(errors: BaseExceptionGroup[QmpsnapError]) -> QmpsnapError:
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, QmpsnapError)
    return found


def identified(change: Change, headers: Mapping[LayerId, Header], *, pause_ms: float | None = None) -> Change:
    """The change with the identities of the files that were made, and the pause that was measured."""
    layers = tuple(
        replace(layer, device=headers[layer.id].device, inode=headers[layer.id].inode) if layer.id in headers else layer
        for layer in change.layers
    )
    snapshots = tuple(replace(snapshot, pause_ms=pause_ms) for snapshot in change.snapshots)
    return replace(change, layers=layers, snapshots=snapshots)


async def remove_new(layers: Iterable[Layer]) -> None:
    """Remove images that an operation made and nobody has used; whatever looks used is left and said."""
    for layer in layers:
        if (identity := await to_thread.run_sync(_identity_of_new, layer)) is not None:
            await remove(layer.path, device=identity[0], inode=identity[1])


def _identity_of_new(layer: Layer) -> tuple[int, int] | None:
    try:
        status = Path(layer.path).lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_blocks * 512 > EMPTY_LIMIT:
        raise StoreMismatch(f"{layer.path} should be a new, empty image and is not; it was left as it is")
    return status.st_dev, status.st_ino
