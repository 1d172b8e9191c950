"""How a QEMU was told to open a disk, from its command line: what no QMP command tells of a node; pure.

``query-named-block-nodes`` has cache mode and detect-zeroes. Discard, aio, locking and the sizes of qcow2's caches are
only in the arguments: ``-blockdev`` in JSON or with dots, ``-drive``, ``-hda``.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from msgspec import Struct

_Kind = Literal["word", "flag", "size"]

_FORMAT: Final[dict[str, _Kind]] = {
    "discard": "word",
    "overlap-check": "word",
    "lazy-refcounts": "flag",
    "pass-discard-request": "flag",
    "pass-discard-snapshot": "flag",
    "pass-discard-other": "flag",
    "discard-no-unref": "flag",
    "cache-size": "size",
    "l2-cache-size": "size",
    "l2-cache-entry-size": "size",
    "refcount-cache-size": "size",
    "cache-clean-interval": "size",
}
_FILE: Final[dict[str, _Kind]] = {
    "discard": "word",
    "aio": "word",
    "locking": "word",
    "drop-cache": "flag",
    "aio-max-batch": "size",
}
_DISCARD: Final = {"on": "unmap", "off": "ignore"}
_SIZE: Final = re.compile(r"(\d+)([kKMGT]?)B?")
_DRIVES: Final = ("hda", "hdb", "hdc", "hdd")


class Told(Struct, frozen=True):
    """Options of the node of an image and of the one below it that reads the file, under QAPI's names."""

    format: dict[str, Any]
    file: dict[str, Any]


def options_of(arguments: Sequence[str], *, node: str, file: str, drive: str, path: str) -> Told | None:
    """How a disk's active image was opened; None where the command line does not tell, as of one attached later."""
    nodes: dict[str, dict[str, Any]] = {}
    for option, value in _pairs(arguments):
        if option == "blockdev":
            _gather(_parsed(value), nodes)
    if found := nodes.get(node):
        below = found.get("file", {} if node != file else found)
        separate = nodes.get(below) if isinstance(below, str) else None
        # A node's own child is told to discard whatever its parent does, a node by itself is not.
        told = _chosen(separate, _FILE) if separate else {"discard": "unmap"} | _chosen(below, _FILE)
        return Told({"discard": "ignore"} | _chosen(found, _FORMAT), {"discard": "ignore"} | told)
    for option, value in _pairs(arguments):
        given = {"file": {"filename": value}} if option in _DRIVES else _parsed(value) if option == "drive" else {}
        below = given.get("file")
        if below is not None and (given.get("id") == drive or _names(below, path)):
            inside = below if isinstance(below, dict) else {}
            aio = {"aio": given["aio"]} if "aio" in given else {}
            return Told(
                {"discard": "ignore"} | _chosen(given, _FORMAT), {"discard": "unmap"} | _chosen(aio | inside, _FILE)
            )
    return None


def is_temporary(arguments: Sequence[str]) -> bool:
    """Whether QEMU was told to let guests write to temporary files alone, as ``-snapshot`` and ``snapshot=on`` do."""
    pairs = list(_pairs(arguments))
    drives = [_parsed(value) for option, value in pairs if option == "drive"]
    return any(option == "snapshot" for option, _ in pairs) or any(drive.get("snapshot") == "on" for drive in drives)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for option, value in zip(arguments, (*arguments[1:], ""), strict=False):
        if option.startswith("-"):
            yield option.removeprefix("-").removeprefix("-"), value


def _parsed(value: str) -> dict[str, Any]:
    """Options written as JSON, or as ``key=value,key.below=value`` in which a comma is doubled."""
    if value.startswith("{"):
        try:
            found = json.loads(value)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}
    tree: dict[str, Any] = {}
    for part in value.replace(",,", "\0").split(","):
        key, _, text = part.replace("\0", ",").partition("=")
        *above, last = key.split(".")
        at = tree
        for name in above:
            below = at.get(name)
            at[name] = below if isinstance(below, dict) else {} if below is None else {"filename": below}
            at = at[name]
        if isinstance(at.get(last), dict):
            at[last]["filename"] = text
        else:
            at[last] = text
    return tree


def _gather(options: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    if isinstance(name := options.get("node-name"), str):
        nodes[name] = options
    for below in options.values():
        if isinstance(below, dict):
            _gather(below, nodes)


def _names(file: Any, path: str) -> bool:
    named = file.get("filename") if isinstance(file, dict) else file
    return isinstance(named, str) and named.removeprefix("file:") == path


def _chosen(options: Any, kinds: dict[str, _Kind]) -> dict[str, Any]:
    """Those options that are carried over, as QMP wants them."""
    found = {}
    for key, kind in kinds.items():
        if not isinstance(options, dict) or (value := options.get(key)) is None:
            continue
        if (typed := _typed(value, kind)) is not None:
            found[key] = _DISCARD.get(typed, typed) if key == "discard" else typed
    return found


def _typed(value: Any, kind: _Kind) -> Any:
    """The value in the type that QAPI has for it; None for what is of none."""
    match kind:
        case "word":
            return value if isinstance(value, str) else None
        case "flag":
            return value if isinstance(value, bool) else {"on": True, "off": False}.get(str(value))
        case "size":
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            size = _SIZE.fullmatch(str(value))
            return int(size[1]) << 10 * " kMGT".index((size[2] or " ").replace("K", "k")) if size else None
