"""A reflink on any file system: where the kernel cannot share blocks they are copied, so that faults run everywhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qmpsnap.volumes import reflink

_share = reflink.share
_PIECE = 1 << 20


def _share_or_copy(source: int, target: int) -> None:
    try:
        _share(source, target)
    except OSError as error:
        if error.errno not in reflink._CANNOT:
            raise
        os.ftruncate(target, os.fstat(source).st_size)
        at = 0
        while data := os.pread(source, _PIECE, at):
            if data.strip(b"\0"):
                os.pwrite(target, data, at)
            at += len(data)


@contextmanager
def everywhere() -> Iterator[None]:
    """For the block every file system can make snapshots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reflink, "share", _share_or_copy)
        patch.setattr(reflink, "_able", {})
        yield
