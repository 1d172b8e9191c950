"""Which machine a test wants: by the options of the session, and by its marker."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml
from msgspec.structs import replace

from qmpsnap.errors import SpecError
from qmpsnap.machine.config import specfile
from qmpsnap.machine.config.launch_dir import launch_dir
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.text import nearest

_KEYS = ("spec", "memory", "disks")


class Wanted(NamedTuple):
    """A machine to be booted; ``key`` is of all that its spec says, ``folders`` may have its images."""

    spec: MachineSpec
    folders: tuple[Path, ...]
    key: str


class Marked(NamedTuple):
    """What a marker says."""

    spec: str | os.PathLike[str] | None = None
    memory: str | int | None = None
    disks: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, item: pytest.Item) -> "Marked":
        """The nearest marker of a test; a further one adds what that does not say."""
        said: dict[str, Any] = {}
        for mark in item.iter_markers("qmpsnap"):
            for unknown in (key for key in mark.kwargs if key not in _KEYS):
                raise pytest.UsageError(f"marker qmpsnap has no argument {unknown!r}{nearest(unknown, _KEYS)}")
            if mark.args:
                raise pytest.UsageError(f"marker qmpsnap takes keywords alone: {', '.join(_KEYS)}")
            said = {**mark.kwargs, **said}
        return cls(**said)


def of_session(config: pytest.Config, guest: Path) -> Wanted:
    """The machine of the options, else the small guest, whose folder is ``guest``."""
    return _wanted(_file(config), Marked(), guest, is_default=True)


def of_test(item: pytest.Item, guest: Path) -> Wanted:
    """The machine of a test. A marker's file is named as seen from the test's."""
    marked = Marked.of(item)
    file = item.path.parent / marked.spec if marked.spec is not None else _file(item.config)
    return _wanted(file, marked, guest, is_default=marked == Marked())


def _file(config: pytest.Config) -> Path:
    if said := config.getoption("qmpsnap_spec"):
        return config.invocation_params.dir / str(said)
    if said := config.getini("qmpsnap_spec"):
        return (config.inipath.parent if config.inipath else config.rootpath) / str(said)
    return launch_dir() / "profiles" / "guest.yaml"


def _wanted(file: Path, marked: Marked, guest: Path, *, is_default: bool) -> Wanted:
    profiles = launch_dir() / "profiles"
    spec = specfile.read(file, guest_dir=guest, profile_dir=profiles)
    if marked.memory is not None or marked.disks:
        document = {"name": spec.name, "memory": marked.memory or f"{spec.memory >> 20}M"}
        text = yaml.safe_dump({**document, "disks": [dict(disk) for disk in marked.disks]})
        try:
            other = specfile.parse(text, "marker", folder=file.parent, guest_dir=guest, profile_dir=profiles)
        except SpecError as error:
            raise pytest.UsageError(f"marker qmpsnap: {error.message}") from error
        spec = replace(spec, memory=other.memory, disks=_merged(spec.disks, other.disks))
    key = hashlib.sha256(msgspec.json.encode(spec, enc_hook=os.fspath)).hexdigest()[:12]
    if not is_default:
        spec = replace(spec, name=f"{spec.name[:40]}-{key[:6]}")
    return Wanted(spec, (file.absolute().parent,), key)


def _merged(disks: tuple[DiskSpec, ...], others: tuple[DiskSpec, ...]) -> tuple[DiskSpec, ...]:
    """All disks, those of equal name as the second say."""
    return tuple({disk.name: disk for disk in (*disks, *others)}.values())
