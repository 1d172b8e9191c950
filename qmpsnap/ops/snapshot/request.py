"""What a snapshot is asked for, by its kind: a wish that this kind would not heed is refused, not left unsaid."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, cast, get_args

from qmpsnap.errors import UsageError
from qmpsnap.hint import option
from qmpsnap.model.layers.snapshot import Quiesce
from qmpsnap.model.layers.vmstate import Compression
from qmpsnap.model.operations.by import By, SaveBy
from qmpsnap.ops.base import requests
from qmpsnap.ops.internal.create import InternalRequest
from qmpsnap.ops.memory.strategy import MemoryRequest
from qmpsnap.ops.session.quiesce import FREEZE_WINDOW, QuiesceRequest
from qmpsnap.ops.snapshot.plan import CreateRequest

Kind = Literal["disk", "full", "internal", "volume"]

Files = Mapping[str, str | os.PathLike[str]]
"""Disk to a path for its new layer; a relative one begins at the working directory."""


class _Options(TypedDict, total=False):
    description: str
    tags: Mapping[str, str]
    disks: Sequence[str] | None
    quiesce: Quiesce
    freeze_window: float


class _LayerOptions(_Options, total=False):
    files: Files | None


class _MemoryOptions(_LayerOptions, total=False):
    max_pause_ms: float | None
    compression: Compression
    degrade: bool
    volume: bool
    mixed: bool
    lvm_size: str | None


class _InternalOptions(_Options, total=False):
    memory: bool | None


class DiskOptions(_LayerOptions, total=False):
    """The options of :meth:`qmpsnap.MachineHandle.snapshot`, which describes them, of a snapshot of the disks."""

    by: By | None


class FullOptions(_MemoryOptions, total=False):
    """Those of one with the guest's memory."""

    by: By | None


class VolumeOptions(_Options, total=False):
    """Those of one by the storage of each disk."""

    mixed: bool
    lvm_size: str | None


class InternalOptions(_InternalOptions, total=False):
    """Those of one inside the images."""

    by: SaveBy | None


class SnapshotOptions(_MemoryOptions, _InternalOptions, total=False):
    """Those of any kind."""

    by: By | SaveBy | None


def requested(kind: Kind, name: str | None, options: SnapshotOptions) -> CreateRequest | InternalRequest:
    """The request for a snapshot of that kind; pure. Refused where it does not heed an option."""
    _require_heeded(kind, options)
    _require_by(kind, options)
    freeze = QuiesceRequest(wish=options.get("quiesce", "skip"), window=options.get("freeze_window", FREEZE_WINDOW))
    description, tags = options.get("description", ""), options.get("tags", {})
    disks = names_of(options.get("disks"))
    if kind == "internal":
        inside = InternalRequest(
            name=name,
            description=description,
            tags=tags,
            disks=disks,
            memory=options.get("memory"),
            quiesce=freeze,
            by=cast("SaveBy", options.get("by") or "snapshot-save"),
        )
        return requests.well_typed(inside)
    wanted = None
    if kind == "full":
        wanted = MemoryRequest(
            max_pause_ms=options.get("max_pause_ms"),
            compression=options.get("compression", "none"),
            degrade=options.get("degrade", False),
        )
    if size := options.get("lvm_size"):
        from qmpsnap.volumes import lvm_report  # seldom needed

        lvm_report.require_setting(size)
    files = paths_of(options.get("files"))
    request = CreateRequest(
        name=name,
        description=description,
        tags=tags,
        disks=disks,
        files=files,
        memory=wanted,
        quiesce=freeze,
        volumes=_by_volume(kind, options),
        mixed=options.get("mixed", False),
        by=cast("By", options.get("by") or "blockdev-snapshot"),
        lvm_size=options.get("lvm_size") or "",
    )
    return requests.well_typed(request)


def _by_volume(kind: Kind, options: SnapshotOptions) -> bool:
    return kind == "volume" or bool(options.get("volume"))


def names_of(names: Sequence[str] | None, what: str = "disks") -> tuple[str, ...] | None:
    """The disks as a request has them, or ``what`` else; one name would be taken for a name per letter."""
    if isinstance(names, str):
        raise UsageError(f"{what} is a list of names, not {names!r}", hint=f"write {what}=[{names!r}]")
    return None if names is None else tuple(names)


def paths_of(files: Files | None) -> dict[str, str]:
    """The places as a request has them: absolute."""
    return {disk: str(Path(path).absolute()) for disk, path in (files or {}).items()}


def _require_by(kind: Kind, options: SnapshotOptions) -> None:
    known = get_args(SaveBy if kind == "internal" else By) if not _by_volume(kind, options) else ()
    if (by := options.get("by")) and by not in known:
        hint = "use one of " + ", ".join(known) if known else "omit " + option("by", by)
        raise UsageError(f"snapshots of kind {kind} are not taken by {by}", hint=hint)


def _require_heeded(kind: Kind, options: SnapshotOptions) -> None:
    problem, hint = "", f"the kinds are {', '.join(get_args(Kind))}"
    about_memory = options.get("max_pause_ms") is not None or options.get("degrade")
    if kind not in get_args(Kind):
        problem = f"there is no kind of snapshot {kind!r}"
    elif kind != "full" and (about_memory or options.get("compression", "none") != "none"):
        problem = "a pause limit, compression and degrading need a full snapshot"
        hint = "use " + option("kind", "full")
    elif kind != "internal" and options.get("memory") is not None:
        problem = "only internal snapshots can omit or include memory"
        hint = "use " + option("kind", "internal")
    elif kind == "internal" and options.get("files"):
        problem = "an internal snapshot creates no layers and takes no files for them"
        hint = "omit the files"
    elif options.get("volume") and kind not in ("full", "volume"):
        problem = "only the disks of a full snapshot can be left to their storage"
        hint = "use " + option("kind", "volume") + ", or with memory " + option("kind", "full")
    elif options.get("volume") and options.get("degrade"):
        problem = "a snapshot whose disks are left to their storage cannot be kept without its memory"
        hint = "omit " + option("degrade") + ", or take the disks alone: " + option("kind", "volume")
    elif (options.get("mixed") or options.get("lvm_size")) and not _by_volume(kind, options):
        problem = "only snapshots by the storage can be mixed with ordinary layers, or have a size on LVM"
        hint = "use " + option("kind", "volume")
    elif options.get("files") and _by_volume(kind, options):
        problem = "the overlays of a volume snapshot are committed back and take no files"
        hint = "omit the files"
    if problem:
        raise UsageError(problem, hint=hint)
