"""The image from which cloud-init in the guest learns what it is to do: the seed of its data source NoCloud.

It is made anew for each QEMU, in memory, and QEMU inherits it open: no file of it is left anywhere, and a change of the
files that it is made of counts from the next start on.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.host.files import opened
from qmpsnap.model.machines.spec import CloudInit, MachineSpec

LABEL: Final = "cidata"
"""By which cloud-init knows its volume."""
LARGEST: Final = 1 << 20
"""Bytes of one file; what clouds take is far less."""


def content(spec: MachineSpec, uuid: str) -> bytes:
    """The image of a machine, empty for one that has none.

    Raises:
        ImageRefused: a file is not there, or is none, or too large.
        HostCannot: one cannot be read.
    """
    if spec.cloud_init is None:
        return b""
    from qmpsnap.machine.starting import iso9660  # few machines need it

    files = {name: _read(name, Path(path)) for name, path in _sources(spec.cloud_init).items()}
    own = f"instance-id: {uuid}\nlocal-hostname: {json.dumps(spec.name)}\n"
    return iso9660.image({"meta-data": own.encode()} | files, label=LABEL)


@contextlib.contextmanager
def inherited(image: bytes) -> Iterator[int | None]:
    """A descriptor of the image for a QEMU to inherit; None where there is none."""
    if not image:
        yield None
        return
    descriptor = os.memfd_create(LABEL, os.MFD_CLOEXEC)
    try:
        os.write(descriptor, image)
        yield descriptor
    finally:
        os.close(descriptor)


def _sources(told: CloudInit) -> dict[str, str]:
    """The paths of the files, by their names in the image."""
    files = {"user-data": told.user_data, "meta-data": told.meta_data, "network-config": told.network}
    return {name: path for name, path in files.items() if path}


def _read(name: str, path: Path) -> bytes:
    what = f"{name} {path}"
    try:
        real = path.resolve(strict=True)
        if not real.is_file():
            raise ImageRefused(f"the {what} is not a file")
        with opened(real) as descriptor:
            found = os.fdopen(descriptor, "rb", closefd=False).read(LARGEST + 1)
    except FileNotFoundError as error:
        raise ImageRefused(f"there is no {what}", hint="name its file under 'cloud-init'") from error
    except OSError as error:
        raise HostCannot(f"the {what} cannot be read: {error.strerror}") from error
    if len(found) > LARGEST:
        raise ImageRefused(f"the {what} is larger than {LARGEST >> 20} MiB")
    return found
