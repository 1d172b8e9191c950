"""Network cards of a QEMU's command line: ``-netdev`` and devices, ``-nic``, ``-net``, and the default one."""

import re
from collections.abc import Iterable, Sequence
from typing import Final, Literal, get_args

from qmpsnap.imports.argv_words import Given
from qmpsnap.model.machines.spec import Forward, NicModel, NicSpec

OPTIONS: Final = frozenset({"netdev", "nic", "net"})

_FORWARD: Final = re.compile(r"(?:(tcp|udp)?:)?([0-9.]*):([0-9]{1,5})-([0-9.]*):([0-9]{1,5})")
_FIRST_MAC: Final = 0x56
"""Last byte of the address that QEMU gives to the first card without one of its own: ``52:54:00:12:34:56``."""

_Told = list[tuple[str, str]]


def read(given: Sequence[Given], machine: str) -> tuple[tuple[NicSpec, ...], list[str]]:
    """The cards in the order in which QEMU makes them, and what of them is otherwise."""
    backends = {dict(one.pairs).get("id", ""): one.pairs for one in given if one.option == "netdev"}
    hub = [one.pairs for one in given if one.option == "net" and dict(one.pairs).get("type") not in ("nic", "none")]
    found: list[tuple[str, str, _Told]] = []
    for one in given:
        told = one.parameters
        if one.option == "nic" and told.get("model") != "none":
            # its first word is the backend's type
            pairs = [
                ("type", value) if key == "model" and number == 0 else (key, value)
                for number, (key, value) in enumerate(one.pairs)
            ]
            found.append((dict(pairs).get("model", _usual(machine)), told.get("mac", ""), pairs))
        elif one.option == "net" and told.get("type") == "nic":
            found.append((told.get("model", _usual(machine)), told.get("macaddr", ""), hub[0] if hub else []))
        elif one.option == "device" and "netdev" in told:
            found.append((told.get("driver", ""), told.get("mac", ""), backends.get(told["netdev"], [])))
    options = {one.option for one in given}
    if not options & {*OPTIONS, "nodefaults"}:
        found.append((_usual(machine), "", [("type", "user")]))
    taken = {address.lower() for _, address, _ in found if address}
    cards: list[NicSpec] = []
    changed: list[str] = []
    for model, address, pairs in found:
        mac = address.lower() or _free(taken)
        taken.add(mac)
        card, sentences = _card(model, mac, pairs)
        cards.append(card)
        changed += [f"network card {mac} {sentence}" for sentence in sentences]
    return tuple(cards), changed


def _usual(machine: str) -> NicModel:
    """What a machine has where no model is given."""
    return "e1000e" if machine == "q35" or machine.startswith("pc-q35-") else "e1000"


def _free(taken: Iterable[str]) -> str:
    return next(mac for last in range(_FIRST_MAC, 1 << 8) if (mac := f"52:54:00:12:34:{last:02x}") not in taken)


def _card(model: str, mac: str, pairs: _Told) -> tuple[NicSpec, list[str]]:
    sentences: list[str] = []
    plain = "virtio" if model.startswith("virtio") else "e1000" if model.startswith("e1000-") else model
    known: NicModel | None = next((one for one in get_args(NicModel) if one == plain), None)
    if known is None:
        sentences.append(f"is virtio; it was {model or 'of no model'}")
    told = dict(pairs)
    kind, base = told.get("type", ""), NicSpec(mac=mac, model=known or "virtio")
    match kind:
        case "tap" if told.get("ifname"):
            if told.get("script", "no") != "no" or told.get("downscript", "no") != "no":
                sentences.append("has no script that QEMU runs")
            return NicSpec(kind="tap", ifname=told["ifname"], mac=mac, model=base.model), sentences
        case "bridge":
            return NicSpec(kind="bridge", bridge=told.get("br", "br0"), mac=mac, model=base.model), sentences
        case "user":
            forwards, left = _forwards(pairs)
            sentences += left
            return NicSpec(mac=mac, model=base.model, forwards=forwards), sentences
        case _:
            sentences.append(f"is on a user network; it was of type {kind or 'none'}")
            return base, sentences


def _forwards(pairs: _Told) -> tuple[tuple[Forward, ...], list[str]]:
    forwards: list[Forward] = []
    left: list[str] = []
    for key, value in pairs:
        if key == "hostfwd" or re.fullmatch(r"hostfwd\.[0-9]+\.str", key):
            found = _FORWARD.fullmatch(value)
            if found is None or found[4] not in ("", "10.0.2.15"):
                left.append("lacks a forward that is none to the guest's first address")
                continue
            protocol: Literal["tcp", "udp"] = "udp" if found[1] == "udp" else "tcp"
            forwards.append(
                Forward(host=int(found[3]), guest=int(found[5]), protocol=protocol, address=found[2] or "0.0.0.0")  # noqa: S104
            )
        elif key not in ("type", "id", "mac", "model", "macaddr"):
            left.append(f"has not its option {key.split('.')[0]}")
    return tuple(forwards), left
