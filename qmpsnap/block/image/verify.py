"""``qemu-img check`` of one image by itself: what its header names is never opened."""

from typing import Literal

from qmpsnap.block.image import encrypted, header, leaks
from qmpsnap.block.image import qemu_img as tool
from qmpsnap.effect import Effect
from qmpsnap.errors import HostCannot, StateError
from qmpsnap.host.threads import to_end
from qmpsnap.model.layers.chain import Layer

Verdict = Literal["whole", "leaks", "lost", "damaged", "in use"]
"""``lost``: clusters are leaked as well, and a table looks lost that may have named them."""

_VERDICTS: dict[int, Verdict] = {0: "whole", 2: "damaged", 3: "leaks"}
"""By qemu-img's exit code; 1 is a check that was not done, and 63 one that the format does not have."""


async def check(layer: Layer, *, qemu_img: str, key: int | None = None, deadline: float = 3600) -> tuple[Verdict, str]:
    """What qemu-img finds in a qcow2 image, in its own words; nothing is known of one that it could not check."""
    verdict, output = await _run(layer, [], qemu_img=qemu_img, key=key, deadline=deadline, effect="none")
    said = _line(output)
    if verdict == "leaks" and (doubt := await to_end(leaks.doubt, layer, leaks.leaked(output))):
        return "lost", f"{doubt}; {said}"
    return verdict, said


async def give_back(layer: Layer, *, qemu_img: str, key: int | None = None, deadline: float = 3600) -> None:
    """Free the leaked clusters of an image, after another look at it: nobody may have it open."""
    verdict, said = await check(layer, qemu_img=qemu_img, key=key, deadline=deadline)
    if verdict == "leaks":
        await _run(layer, ["-r", "leaks"], qemu_img=qemu_img, key=key, deadline=deadline, effect="unknown")
    elif verdict != "whole":
        raise StateError(f"the leaked clusters of {layer.path} were not reclaimed: {said}")


async def _run(
    layer: Layer, some: list[str], *, qemu_img: str, key: int | None, deadline: float, effect: Effect
) -> tuple[Verdict, bytes]:
    argv = [qemu_img, "check", "-q", *some, *encrypted.secret(key), encrypted.alone(layer.path, key)]
    late = f"checking {layer.path} took longer than {deadline:g} s"
    done = await tool.run(argv, deadline=deadline, late=late, effect=effect, inherited=[] if key is None else [key])
    output = done.stdout + done.stderr
    if b"Failed to get " in output and b"lock" in output:
        return "in use", output
    if verdict := _VERDICTS.get(done.returncode):
        return verdict, output
    raise HostCannot(f"{qemu_img} check failed: {_line(output)}")


def _line(output: bytes) -> str:
    return header.printable(" ".join(output.decode(errors="replace").split()))
