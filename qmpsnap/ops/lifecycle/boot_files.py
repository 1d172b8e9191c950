"""The files besides disks that a machine starts with, looked at before QEMU: kernel, initrd, CD image, cloud-init's."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from qmpsnap.block.image import header
from qmpsnap.block.image.header import printable
from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.host.files import opened
from qmpsnap.machine.starting import seed
from qmpsnap.model.home import Home
from qmpsnap.model.machines.spec import MachineSpec


def require(spec: MachineSpec, home: Home, *, allowed: Sequence[Path] | None = None) -> None:
    """Make sure that they are there, and a CD image in one of the folders ``allowed``.

    Raises:
        ImageRefused: one is not there or no plain file, the CD image is no raw one, or one of cloud-init's too large.
        HostCannot: one cannot be read, or the small guest is not built.
    """
    for what, path in (("kernel", spec.kernel), ("initrd", spec.initrd)):
        if path:
            _require_file(what, Path(path), home)
    if spec.cdrom:
        header.require(spec.cdrom, format="raw", allowed=allowed)
    seed.content(spec, "")


def _require_file(what: str, path: Path, home: Home) -> None:
    try:
        real = path.resolve(strict=True)  # a kernel is often a link to the present one
        with opened(real):
            pass
    except FileNotFoundError as error:
        if path.is_relative_to(home.guest):
            from qmpsnap.machine.config.launch_dir import launch_dir  # loads subprocess, which a start does without

            build = shlex.join([str(launch_dir() / "guest" / "build"), str(home.guest)])
            raise HostCannot(f"the small guest is not built: there is no {what} {path}", hint=build) from error
        raise ImageRefused(f"there is no {what} {printable(str(path))}") from error
    except OSError as error:
        raise HostCannot(f"the {what} {printable(str(path))} cannot be read: {error.strerror}") from error
    if not real.is_file():
        raise ImageRefused(f"the {what} {printable(str(path))} is not a file")
