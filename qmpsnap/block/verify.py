"""``qemu-img check`` of one image by itself: what its header names is never opened."""

from typing import Literal

from qmpsnap.block import encrypted, header, tool
from qmpsnap.block.tags import alone
from qmpsnap.errors import Effect, HostCannot
from qmpsnap.model.chain import Layer

Verdict = Literal["whole", "leaks", "damaged", "in use"]

_VERDICTS: dict[int, Verdict] = {0: "whole", 2: "damaged", 3: "leaks"}
"""By qemu-img's exit code; 1 is a check that was not done, and 63 one that the format does not have."""


async def check(
    layer: Layer, *, qemu_img: str, give_back: bool = False, key: int | None = None, deadline: float = 3600
) -> tuple[Verdict, str]:
    """What qemu-img finds in a qcow2 image, and in its own words.

    Args:
        layer: the image; our own reader must have accepted it.
        qemu_img: the qemu-img binary.
        give_back: free leaked clusters; nobody may have the image open.
        key: descriptor of an encrypted image's key.
        deadline: seconds: all of the image's tables are read.

    Raises:
        HostCannot: qemu-img is missing, or could not check the image, of which nothing is known then.
        DeadlinePassed: it took too long.
    """
    some = ["-r", "leaks"] if give_back else []
    argv = [qemu_img, "check", "-q", *some, alone(layer.path)]
    if key is not None:
        argv = [qemu_img, "check", "-q", *some, *encrypted.secret(key), encrypted.alone(layer.path)]
    late = f"checking {layer.path} took longer than {deadline:g} s"
    effect: Effect = "unknown" if give_back else "none"
    done = await tool.run(argv, deadline=deadline, late=late, effect=effect, inherited=[] if key is None else [key])
    said = header.printable(" ".join((done.stdout + done.stderr).decode(errors="replace").split()))
    if "Failed to get " in said and "lock" in said:
        return "in use", said
    if verdict := _VERDICTS.get(done.returncode):
        return verdict, said
    raise HostCannot(f"{qemu_img} check failed: {said}")
