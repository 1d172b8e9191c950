"""Names people type and ids we make, kept apart by type."""

import re
from typing import NewType

from qmpsnap.errors import NameRefused, UsageError

LayerId = NewType("LayerId", str)
"""A layer's id in the store, unique over all machines, and its node name in QEMU: ``vda-17``."""

NodeName = NewType("NodeName", str)
"""A block node's name in QEMU: at most 31 characters."""

JobId = NewType("JobId", str)
"""A block job's id in QEMU: ``qs.<operation>.<disk>``."""

OperationId = NewType("OperationId", int)
"""An operation's number in the journal; its new layers carry the same number."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
SNAPSHOT_OF = re.compile(r"([a-z0-9][a-z0-9._-]{0,62})@([a-z0-9][a-z0-9._-]{0,62})\Z")
"""``VM@SNAPSHOT``."""
DISK_NAME = re.compile(r"[a-z][a-z0-9]{0,15}\Z")

MAX_DESCRIPTION = 16 << 10
"""Bytes; every listing prints it."""


SERIAL = r"[1-9][0-9]{0,17}"
"""An operation's number in a file's name; one with more digits none ever has, and no store could keep it."""

_LAYER = re.compile(rf"([a-z][a-z0-9]{{0,15}})-{SERIAL}\Z")
_TAG = re.compile(rf"qs-({SERIAL})-")


def check_name(name: str, what: str) -> str:
    """Return ``name`` when a machine or snapshot may bear it."""
    if NAME.match(name):
        return name
    raise NameRefused(
        f"{what} name {name!r} is not allowed",
        hint="use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit",
    )


def check_description(text: str) -> str:
    """Return ``text`` when a snapshot may be described by it."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError("the description is not UTF-8 text") from error
    if length > MAX_DESCRIPTION:
        raise UsageError(
            f"the description has {length} bytes, above the limit of {MAX_DESCRIPTION}",
            hint="shorten it, or name a file with the text",
        )
    return text


def check_disk_name(name: str) -> str:
    """Return ``name`` when a disk may bear it: short, as node names are made from it."""
    if DISK_NAME.match(name):
        return name
    raise NameRefused(
        f"disk name {name!r} is not allowed",
        hint="use a lower-case letter and at most 15 more letters or digits, as in 'vda' or 'data1'",
    )


def layer_id(disk: str, serial: int) -> LayerId:
    """The id of the layer of ``disk`` that the store's serial number ``serial`` stands for."""
    return LayerId(f"{disk}-{serial}")


def layer_disk(name: str) -> str | None:
    """The disk of the layer that a name of the form ``vda-17`` may stand for; None when it is not of our form."""
    found = _LAYER.match(name)
    return found[1] if found else None


def job_id(operation: OperationId, disk: str) -> JobId:
    """The deterministic id of an operation's job on one disk, so that a later process finds it."""
    return JobId(f"qs.{operation}.{disk}")


def tag_number(tag: str) -> OperationId | None:
    """The number of the operation that made a tag inside an image; None when it is not of our form."""
    found = _TAG.match(tag)
    return OperationId(int(found[1])) if found else None
