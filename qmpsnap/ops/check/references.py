"""Which of the files in a folder are in use: device and inode show which file a name leads to.

The same file may be named through a link, or by another name of its folder, so names are followed and never compared.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from qmpsnap.host.files import Inode, inode_of
from qmpsnap.machine.config import firmware_files
from qmpsnap.model.home import WITH_TPM, Home
from qmpsnap.store.store import Store

_LINKS = 40
"""Links on the way of one name; Linux follows no more."""

_WITHIN = re.compile(r'/(?:[^,"]|,,)*')
"""A path within an argument for QEMU, whose commas it doubles."""


def by_store(store: Store, home: Home) -> frozenset[str]:
    """Every path that the store has of any machine: of layers, state files, specs, variable stores, open plans."""
    machines = store.machines()
    names = {layer.path for layer in store.forest().layers.values()}
    for machine in machines:
        names.update(_paths(machine))
        if machine.own.spec.firmware == "uefi":
            names.add(str(home.variables(machine.name)))
            names.add(str(home.tpm(machine.name)))
        for snapshot in store.snapshots(machine.name):
            names.update(_paths(snapshot))
        for operation in store.operations(machine.name, only_open=True):
            names.update(_paths(operation.plan))
    names |= {each for name in names if name.endswith(f"{WITH_TPM}.fd") for each in firmware_files.copies(name)}
    return frozenset(names)


def _paths(value: object) -> Iterator[str]:
    pending = [msgspec.to_builtins(value)]
    while pending:
        match pending.pop():
            case dict() as fields:
                pending += fields.values()
            case list() | tuple() as items:
                pending += items
            case str() as text if "/" in text:
                yield text
                yield from (found.replace(",,", ",") for found in _WITHIN.findall(text))


def ways(paths: Iterable[str]) -> frozenset[Inode]:
    """Every folder, link and file by which these absolute paths lead to what they name, and that itself."""
    looked: dict[str, os.stat_result | None] = {}
    return frozenset(identity for path in paths if path.startswith("/") for identity in _way(path, looked))


def _way(path: str, looked: dict[str, os.stat_result | None]) -> Iterator[Inode]:
    at, links, pending = "", 0, path.split("/")[::-1]
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            at = at.rpartition("/")[0]
            continue
        step = f"{at}/{part}"
        if step not in looked:
            looked[step] = _status(step)
        if (status := looked[step]) is None:
            return
        yield inode_of(status)
        if not stat.S_ISLNK(status.st_mode):
            at = step
            continue
        links += 1
        try:
            target = str(Path(step).readlink())
        except OSError:
            return
        if links > _LINKS:
            return
        at = "" if target.startswith("/") else at
        pending += target.split("/")[::-1]


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (OSError, ValueError):  # a text that is no name at all
        return None
