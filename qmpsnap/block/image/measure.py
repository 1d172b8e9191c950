"""How large a copy becomes (``qemu-img measure``), found out without writing one."""

import json

from qmpsnap.block.image import qemu_img as tool
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import Format

DEADLINE = 60.0
"""Seconds that looking at all tables of a chain may take."""


async def needed(layer: Layer, *, into: Format, qemu_img: str) -> int | None:
    """Bytes that a copy of a layer and all below it takes, also while a guest writes to it; None if nobody can tell."""
    argv = [qemu_img, "measure", "-U", "--output=json", "-f", layer.format, "-O", into, layer.path]
    done = await tool.run(argv, deadline=DEADLINE, late=f"measuring {layer.path} took longer than {DEADLINE:g} s")
    try:
        return int(json.loads(done.stdout)["required"]) if done.returncode == 0 else None
    except (ValueError, KeyError, TypeError):
        return None
