"""Where two specs of a machine differ."""

import re
from collections.abc import Iterator

import msgspec

from qmpsnap.model.machines.spec import MachineSpec

_FAMILIES = {"pc-q35": "q35", "pc-i440fx": "pc"}
"""Machine types by what QEMU calls their newest version."""


def changes(old: MachineSpec, new: MachineSpec) -> Iterator[tuple[str, object, object]]:
    """Each key whose values differ, with both; None where a key has its default. Pure."""
    before, after = _flat(old), _flat(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield key, before.get(key), after.get(key)


def differences(recorded: MachineSpec, wanted: MachineSpec) -> tuple[str, ...]:
    """Where a spec differs from the one a machine was defined with, in words; pure.

    An alias such as ``q35`` is no difference: which version it stood for is recorded.
    """
    return tuple(
        f"{key} (recorded: {_told(before)}, now: {_told(now)})"
        for key, before, now in changes(recorded, wanted)
        if (key != "machine" or not _same_type(recorded.machine, wanted.machine))
        and not (key == "root-ports" and now is None)  # which leaves it to define
    )


def _told(value: object) -> object:
    return "default" if value is None else value


def _flat(spec: MachineSpec) -> dict[str, object]:
    plain = msgspec.to_builtins(spec.unplugged())
    plain.pop("tcg_cpu", None)  # which nobody writes, as where the disks are
    parts = {disk["name"]: disk for disk in plain.pop("disks", ())} | {"cloud-init": plain.pop("cloud_init", {})}
    found = {key.replace("_", "-"): value for key, value in plain.items()}
    return found | {
        f"{name}.{key.replace('_', '-')}": value for name, part in parts.items() for key, value in part.items()
    }


def _same_type(recorded: str, wanted: str) -> bool:
    family = re.sub(r"-\d+\.\d+$", "", recorded)
    return wanted in (recorded, _FAMILIES.get(family, family))
