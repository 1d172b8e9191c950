"""Encrypted images for qemu-img: its arguments for them; it reads the key from a descriptor that it inherits."""

import json
from typing import Final

from qmpsnap.block.image import qemu_img as tool
from qmpsnap.block.image.header import printable
from qmpsnap.errors import HostCannot, StateError
from qmpsnap.model.machines.secret import ENCRYPT

_ID: Final = "key"

NEW: Final = f",encrypt.format={ENCRYPT},encrypt.key-secret={_ID},encrypt.iter-time=10"
"""What ``-o`` says of a new image. QEMU's own 2000 ms of key derivation would be spent with each layer it opens, and
while it opens one for a snapshot the guest waits; keys are long enough not to need it."""

NO_CLOCK: Final = "Unable to get accurate CPU usage"
"""What qemu-img says when the time that it measured is no time."""


def secret(key: int | None) -> list[str]:
    """The arguments that let qemu-img read its key, if there is one, from an inherited descriptor."""
    return [] if key is None else ["--object", f"secret,id={_ID},file=/proc/self/fd/{key}"]


def alone(path: str, key: int | None = None) -> str:
    """The image as qemu-img is to open it: as qcow2, with a key or none, not following what its header names."""
    encrypt = {} if key is None else {"encrypt": {"format": ENCRYPT, "key-secret": _ID}}
    file = {"driver": "file", "filename": path}
    return "json:" + json.dumps({"driver": "qcow2", **encrypt, "file": file, "backing": None})


async def require_key(path: str, key: int, *, qemu_img: str, deadline: float = 60) -> None:
    """Make sure that a key opens an image, which a guest may write to meanwhile."""
    # "info" opens an image without a look at its key.
    argv = [qemu_img, "map", "-U", "--output=json", "--max-length=65536", *secret(key), alone(path, key)]
    late = f"opening {printable(path)} took longer than {deadline:g} s"
    done = await tool.run(argv, deadline=deadline, late=late, inherited=[key])
    if done.returncode == 0:
        return
    said = done.stderr.decode(errors="backslashreplace").strip()
    if "Invalid password" in said:
        raise StateError(
            f"the secret does not open {printable(path)}",
            hint="use the secret that the disk was defined with",
        )
    raise HostCannot(f"{printable(path)} cannot be opened: {printable(said)}")
