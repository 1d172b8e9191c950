"""Noticing that the store is an old copy, or lacks a machine, before anything is started or written by what it has.

A machine's record beside its images tells, where that is newer. It may be an old copy as well, put back together with
the store: so the images are asked, too. Every layer's number is above those of the layers it was made on. So what an
old store does not know about bears a higher number than the layer it believes to be active, and reads a layer that the
store knows. Only such files are looked at: mostly none, and then this costs one look at the folder. A tag inside an
image bears its operation's number.

A machine that has a record and that the store does not have may read any layer, so none is merged or removed.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from qmpsnap.block.image import header, snapshot_table
from qmpsnap.block.image.header import printable
from qmpsnap.errors import HostCannot, ImageRefused, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.model.home import ACTIVE, RECORD
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.names import SERIAL, tag_number
from qmpsnap.model.operations.operation import MergePlan, MirrorPlan, Operation, RevertPlan
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.text import is_text
from qmpsnap.ops.base.context import Context
from qmpsnap.store.records import Records
from qmpsnap.volumes.names import PREFIX, of_path

LAYER_FILE = re.compile(rf"([a-z][a-z0-9]{{0,15}})-({SERIAL})\.(qcow2|raw)")
"""The name of a layer's file in its machine's folder."""

AHEAD = 100_000
"""Operations that a store may have missed; a higher number is none: a copy may have a date as its name."""

_OTHERS = re.compile(
    rf"{PREFIX['snapshot']}-[0-9a-f]{{32}}-.*|vars(-{SERIAL})?\.fd|.*\.vmstate|.*\.part"
    rf"|{'|'.join(map(re.escape, (RECORD, *ACTIVE)))}"
)


def require_fit(context: Context, at: Basis, pending: Iterable[Operation], *, removes: bool) -> None:
    """Refuse to work with a store that is older than the disks or, where layers may go, lacks a machine.

    Called in a thread, with what the store says of the machine and the operations of it that are open.
    """
    if found := sign(context, at.name, at.chains):
        raise StoreMismatch(
            f"the store is an old copy for machine {at.name}: {found}",
            hint="put the newer store back, or rebuild it: " + call("rebuild", set_aside=True),
            machine=at.name,
        )
    removes = removes or any(isinstance(one.plan, MergePlan | MirrorPlan | RevertPlan) for one in pending)
    if removes and (lost := context.store.records.lost()):  # of which nobody knows what they read
        files = " ".join(str(Records(context.home.machines).file(name)) for name in lost)
        raise StoreMismatch(
            f"the store lacks {', '.join(lost)}, defined before, which may read layers of machine {at.name}: none"
            " can be merged or removed",
            hint="put the newer store back, or rebuild it: "
            + call("rebuild", set_aside=True)
            + f"; adopt an adopted machine again; if its images are lost for good, rm {files}",
            machine=at.name,
        )


def sign(context: Context, machine: str, chains: Sequence[Chain]) -> str | None:
    """Why the store must be an old copy; None when nothing says so."""
    if context.store.records.behind(machine):
        return f"{context.home.record(machine)} was written by a later operation than the store knows"
    active = {chain.active.path for chain in chains}
    newest = {chain.disk: _number(chain.active.id) for chain in chains}
    if (tagged := _tagged_later(context, chains)) is not None:
        return tagged
    unknown = [path for path in _candidates(context, machine, newest) if context.store.layer_at(path) is None]
    if not unknown:
        return None
    pending = context.store.operations(machine, only_open=True)
    plans = "\n".join(msgspec.json.encode(operation.plan).decode() for operation in pending)
    for path in unknown:
        if is_text(path) and msgspec.json.encode(path).decode() in plans:  # an interrupted operation's own
            continue
        name, number = printable(path), _serial(path)
        if number is not None and number >= (following := context.store.next_serial()):
            if number < following + AHEAD:
                return f"{name} has a number that the store has not assigned yet"
            number = None
        if (backing := _backing(path)) is not None:
            below = context.store.layer_at(backing)
            # A file that reads a layer we write to is in danger. One that reads another layer may be a copy that was
            # made for somebody, unless its name says that it was a layer.
            if backing in active or (number is not None and below and below.owned):
                return f"{name} reads {printable(backing)}, but the store lacks it"
    return None


def _tagged_later(context: Context, chains: Sequence[Chain]) -> str | None:
    """An active image with a tag that the store has not assigned; other images may have another store's tags."""
    for layer in (chain.active for chain in chains if chain.active.owned):
        try:
            numbers = [number for tag in snapshot_table.names(layer) or () if (number := tag_number(tag)) is not None]
        except (ImageRefused, HostCannot):
            continue
        if numbers and max(numbers) >= context.store.next_serial():
            return f"{printable(layer.path)} has a tag with a number that the store has not assigned yet"
    return None


def _candidates(context: Context, machine: str, newest: Mapping[str, int]) -> Iterator[str]:
    folder = context.home.machine_dir(machine)
    try:
        names = os.listdir(folder)  # noqa: PTH208 - as text
    except OSError:
        names = []
    for name in names:
        if (numbered := _numbered(name)) is None:
            if not _OTHERS.fullmatch(name):
                yield f"{folder}/{name}"
        elif numbered[1] > newest.get(numbered[0], 0):
            yield f"{folder}/{name}"


def _backing(path: str) -> str | None:
    try:
        return header.read(path).backing
    except (ImageRefused, HostCannot):
        return None


def _serial(path: str) -> int | None:
    found = _numbered(Path(path).name)
    return found[1] if found else None


def _numbered(name: str) -> tuple[str, int] | None:
    """The disk and the number that the name of a layer's file tells: of one that we or the storage has made."""
    if found := LAYER_FILE.fullmatch(name):
        return found[1], int(found[2])
    volume = None if name.endswith(".part") else of_path(name)  # what was in the making is nobody's layer
    return (volume.disk, volume.operation) if volume and volume.role == "clone" else None


def _number(layer: str) -> int:
    return int(layer.rpartition("-")[2])
