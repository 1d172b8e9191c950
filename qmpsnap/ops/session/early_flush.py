"""What QEMU begins a snapshot with, done shortly before it, while the guest goes on: to flush the active images."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping

from qmpsnap.host.threads import to_read
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import MachineSpec

_SOON = 0.01
_TRIES = 3
"""A flush that took longer than ``_SOON`` seconds is repeated, since the guest went on writing: so often at most."""


async def flush(spec: MachineSpec, active: Mapping[str, Layer]) -> None:
    """Have the host write out what the guest has written to the active layers, which are given by disk.

    QEMU flushes them within the transaction, while the guest's I/O waits, and when it stops a guest. What little is
    left then takes a millisecond instead of seconds. No error is reported: the same flush tells it to QEMU. A disk with
    ``cache: unsafe`` is left out, as QEMU never flushes it.

    Raises ``StorageHangs`` if the storage does not answer.
    """
    unsafe = {disk.name for disk in spec.disks if disk.cache == "unsafe"}
    paths = [layer.path for disk, layer in active.items() if disk not in unsafe and layer.storage != "rbd"]
    for _ in range(_TRIES):
        since = time.monotonic()
        await to_read(_flush, paths)
        if time.monotonic() - since < _SOON:
            return


def _flush(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            image = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.fdatasync(image)
            finally:
                os.close(image)
