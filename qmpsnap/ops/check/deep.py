"""What only reading everything can tell: every image's tables, what headers say beside that, state files' content."""

from collections.abc import Iterator
from typing import Literal

from qmpsnap.block.image import verify
from qmpsnap.block.image.verify import Verdict
from qmpsnap.errors import DeadlinePassed, HostCannot, StoreMismatch
from qmpsnap.host.threads import to_read
from qmpsnap.machine import statefile, templates
from qmpsnap.model.finding import Finding
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.ops.base import luks
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.check import ancestry
from qmpsnap.ops.check.facts import Facts

_CODES: dict[Verdict | Literal["unread"], str] = {
    "damaged": "image-damaged",
    "leaks": "image-leaks",
    "lost": "table-lost",
    "in use": "image-in-use",
    "unread": "image-unread",
}


async def look(context: Context, at: Facts) -> list[Finding]:
    """Check each of qmpsnap's qcow2 layers that no guest writes to, and read each state file."""
    found = [*_formats(at), *ancestry.look(at, str(context.home.machine_dir(at.record.machine.name)))]
    found += [finding for layer in _layers(context, at) if (finding := await _image(context, at, layer))]
    for snapshot in at.record.snapshots:
        state = snapshot.vmstate
        if state and at.states[state.path] is None and (wrong := await to_read(_digest, state)):
            code, said = wrong
            text = f"snapshot {snapshot.name}: {said}"
            found.append(at.finding(code, text, file=state.path))
    return found + await to_read(lambda: list(_templates(context, at)))


def _templates(context: Context, at: Facts) -> Iterator[Finding]:
    """The templates of the machine's snapshots."""
    states = {snapshot.vmstate.digest for snapshot in at.record.snapshots if snapshot.vmstate}
    for shelf in templates.shelves(context.home):
        for template in shelf.all():
            if template.state in states and (wrong := templates.damage(shelf, template)):
                yield at.finding("template-damaged", wrong, file=str(shelf.of(template.key)), repairable=True)


def _formats(at: Facts) -> Iterator[Finding]:
    layers = at.record.forest.layers
    for identity, header in at.headers.items():
        layer = layers[identity]
        below = layers.get(layer.backing) if layer.backing else None
        if isinstance(header, str) or below is None or layer.format != "qcow2" or not layer.owned:
            continue
        if header.backing_format != below.format:
            said = header.backing_format or "none"
            text = f"the header of {layer.path} names {said} as its backing format, recorded is {below.format}"
            yield at.finding("backing-format-differs", text, layer=layer)


def _layers(context: Context, at: Facts) -> list[Layer]:
    runs = context.process(at.record.machine) is not None
    written = {chain.active.id for chain in at.record.chains} if runs else set()
    layers = (at.record.forest.layers[identity] for identity, found in at.headers.items() if not isinstance(found, str))
    return [layer for layer in layers if layer.owned and layer.format == "qcow2" and layer.id not in written]


async def _image(context: Context, at: Facts, layer: Layer) -> Finding | None:
    verdict: Verdict | Literal["unread"]
    try:
        async with luks.for_layer(context, at.record.machine, layer) as key:
            verdict, said = await verify.check(layer, qemu_img=context.image.binary, key=key)
    except (HostCannot, DeadlinePassed) as error:  # which says nothing of the image
        verdict, said = "unread", error.message
    if verdict == "whole":
        return None
    return at.finding(_CODES[verdict], f"{layer.path}: {said}", layer=layer, repairable=verdict == "leaks")


def _digest(state: Vmstate) -> tuple[str, str] | None:
    """What is wrong with a state file, as (code, sentence)."""
    try:
        with statefile.verified(state):
            return None
    except StoreMismatch as error:
        return "state-file-damaged", error.message
    except HostCannot as error:
        return "state-file-unread", error.message
