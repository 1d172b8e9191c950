"""The ``-blockdev`` / ``blockdev-add`` options of layers: one recipe for the start and for every later overlay.

Every layer is spelled out with its driver and the lowest one (and every new overlay) says ``"backing": null``, so
QEMU never follows a string from a header. The file name given here must be the very string in the header of the
layer above: if it differs, QEMU treats the backing as overridden and its answers grow with the square of the depth.
"""

from typing import Any

from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.secret import ENCRYPT, secret_id
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.names import NodeName


def node_name(layer: Layer) -> NodeName:
    """The format node's name in QEMU; the protocol node below it is ``<name>.file``."""
    return NodeName(layer.id)


def layer_options(layer: Layer, disk: DiskSpec, *, backing: NodeName | None, read_only: bool) -> dict[str, Any]:
    """Options of one layer's nodes (QAPI ``BlockdevOptions``), JSON-ready; ``backing`` is the node of the layer below.

    Cache and discard modes come from ``disk``, of an adopted one whatever its owner has set.
    """
    discard = "unmap" if disk.discard and not read_only else "ignore"
    cache = {"direct": disk.cache in ("none", "directsync"), "no-flush": disk.cache == "unsafe"}
    options: dict[str, Any] = {
        "node-name": node_name(layer),
        "driver": layer.format,
        "read-only": read_only,
        "discard": discard,
        "cache": cache,
        "file": _place(layer) | {"node-name": f"{node_name(layer)}.file", "discard": discard, "cache": cache},
    }
    if disk.opened:
        options |= _allowed(disk.opened.format, read_only=read_only)
        options["file"] |= _allowed(disk.opened.file, read_only=read_only)
    if layer.format == "qcow2":
        options["backing"] = backing
    if disk.encryption:
        options["encrypt"] = {"format": ENCRYPT, "key-secret": secret_id(disk.name)}
    return options


def _place(layer: Layer) -> dict[str, Any]:
    """Where its data are."""
    if image := RbdImage.parse(layer.path):
        return image.options
    return {"driver": layer.storage, "filename": layer.path}


def _allowed(options: dict[str, Any], *, read_only: bool) -> dict[str, Any]:
    """The options that a node can have: a read-only node has none about writes."""
    return {key: value for key, value in options.items() if not read_only or key not in ("discard", "detect-zeroes")}


def blank_options(layer: Layer, disk: DiskSpec) -> dict[str, Any]:
    """Options of a node of that name and size that has no image."""
    return {
        "node-name": node_name(layer),
        "driver": "null-co",
        "size": layer.virtual_size,
        "read-zeroes": True,
        "read-only": disk.read_only,
    }


def chain_options(chain: Chain, disk: DiskSpec) -> list[dict[str, Any]]:
    """Options of a whole chain, base first: each entry names the one before it as its backing."""
    return [
        layer_options(
            layer,
            disk,
            backing=node_name(below) if below else None,
            read_only=layer is not chain.active or disk.read_only,
        )
        for below, layer in zip((None, *chain.layers), chain.layers, strict=False)
    ]
