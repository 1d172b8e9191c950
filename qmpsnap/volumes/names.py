"""The names that volumes of ours have: machine and operation are told from the name alone, by every storage.

A name has only ``[a-z0-9-]``, begins with a letter, so that no program takes it for an option, and has at most 73
characters: LVM allows 127, and doubles each hyphen in the device mapper's names.
"""

import re
from typing import Final, Literal, Self

from msgspec import Struct

from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.names import SERIAL, OperationId

Role = Literal["snapshot", "clone"]
"""``snapshot``: keeps what its origin held, and nobody writes to it. ``clone``: a guest will write to it."""

PREFIX: Final[dict[Role, str]] = {"snapshot": "qs", "clone": "qc"}
_NAME: Final = re.compile(rf"(qs|qc)-([0-9a-f]{{32}})-({SERIAL})-([a-z][a-z0-9]{{0,15}})\Z")


class VolumeName(Struct, frozen=True, order=True):
    """Whose volume it is: ``qs-UUID-17-vda`` is the snapshot that operation 17 of that machine took of its disk vda.

    ``machine`` is the machine's uuid, as 32 hexadecimal digits.
    """

    machine: str
    operation: OperationId
    disk: str
    role: Role = "snapshot"

    @property
    def text(self) -> str:
        """The name itself, without an ending."""
        return f"{PREFIX[self.role]}-{self.machine}-{self.operation}-{self.disk}"

    @classmethod
    def of(cls, uuid: str, operation: OperationId, disk: str, role: Role = "snapshot") -> Self:
        """The name for a machine with that uuid, hyphens or not."""
        return cls(uuid.replace("-", "").lower(), operation, disk, role)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What a name says; None where it is not of our form, so that the volume is somebody else's."""
        found = _NAME.match(text)
        if found is None:
            return None
        role: Role = "snapshot" if found[1] == PREFIX["snapshot"] else "clone"
        return cls(found[2], OperationId(int(found[3])), found[4], role)


def of_path(path: str) -> VolumeName | None:
    """What the name in a volume's path says, be it a file, an LV, or an RBD image or a snapshot of one."""
    if image := RbdImage.parse(path):
        return VolumeName.parse(image.snapshot or image.image)
    last = path.rpartition("/")[2].rpartition("@")[2]
    return VolumeName.parse(last.partition(".")[0])
