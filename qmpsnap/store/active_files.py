"""Which images the owner of an adopted machine has to start next, as ``active.env`` and ``active.json``.

They are written with the machine's record, so whenever an operation has changed where the guest writes.
"""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.places import ACTIVE

if TYPE_CHECKING:
    from qmpsnap.store.records import Record


def contents(record: "Record") -> dict[str, bytes]:
    """The text of each file by its name; pure."""
    layers = {layer.id: layer for layer in record.layers}
    active = [(disk, layers[layer]) for disk, layer in record.active.items()]
    shell, plain = ACTIVE
    return {shell: _shell(record.machine.name, active), plain: _json(record.machine.name, active)}


def _shell(machine: str, active: Sequence[tuple[str, Layer]]) -> bytes:
    lines = [
        f"# qmpsnap writes this file: the images that QEMU of machine {machine} has to be started on.",
        "# An image below one of these must not be started: it belongs to snapshots.",
        f"ACTIVE_DISKS={shlex.quote(' '.join(disk for disk, _ in active))}",
    ]
    for disk, layer in active:
        drive = f"file={layer.path.replace(',', ',,')},format={layer.format}"
        lines += [
            f"ACTIVE_{disk}={shlex.quote(layer.path)}",
            f"ACTIVE_{disk}_FORMAT={layer.format}",
            f"ACTIVE_{disk}_DRIVE={shlex.quote(drive)}",
        ]
    return "".join(f"{line}\n" for line in lines).encode()


def _json(machine: str, active: Sequence[tuple[str, Layer]]) -> bytes:
    disks = [{"disk": disk, "path": layer.path, "format": layer.format} for disk, layer in active]
    document = {"schema": "qmpsnap/1", "machine": machine, "disks": disks}
    return msgspec.json.format(msgspec.json.encode(document)) + b"\n"
