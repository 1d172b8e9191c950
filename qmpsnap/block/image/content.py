"""Reading what a layer holds, as the guest would see it with that layer as its disk."""

import os

from qmpsnap.block.image import qemu_img as tool
from qmpsnap.errors import HostCannot
from qmpsnap.model.layers.chain import Layer

CHUNK = 1 << 20


async def copy_out(
    layer: Layer, target: str | os.PathLike[str], *, length: int | None = None, qemu_img: str, deadline: float = 600
) -> None:
    """Write a layer's content, its backing included, to a raw file.

    The layer must not be some running guest's active one.
    """
    some = [] if length is None else [f"count={length // CHUNK}"]
    argv = [qemu_img, "dd", "-f", layer.format, "-O", "raw", f"bs={CHUNK}", *some, f"if={layer.path}", f"of={target}"]
    done = await tool.run(argv, deadline=deadline, late=f"reading {layer.path} took longer than {deadline:g} s")
    if done.returncode:
        raise HostCannot(f"{layer.path} cannot be read: {done.stderr.decode(errors='backslashreplace').strip()}")
