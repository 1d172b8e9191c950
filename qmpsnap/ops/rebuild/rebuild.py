"""``check --rebuild``: a lost or damaged store is made again from the machines' records; it is kept aside itself.

Names, texts, marks and the tree come back as they were. Which file is a layer's is what was recorded: copies are taken
over by ``relocate``, as in a store that was not lost. A machine whose images or QEMU know more than its record is left
out, as nobody can say then what it would overwrite.
"""

import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.errors import HostCannot, ImageRefused, QmpsnapError, StateError
from qmpsnap.hint import call, option
from qmpsnap.host import ceph
from qmpsnap.host.files import sync_folder
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine.qemu import monitor
from qmpsnap.machine.starting import process as processes
from qmpsnap.model.home import Home
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.record import Process
from qmpsnap.model.names import LayerId, layer_disk, layer_id
from qmpsnap.model.relocation import HomeRecord, carried_all
from qmpsnap.ops.base import relocate, volumes
from qmpsnap.ops.base.context import Context, Programs, this_host
from qmpsnap.ops.session import file_nodes, stale_store
from qmpsnap.qmp import commands
from qmpsnap.store import health, owner
from qmpsnap.store.lock import machine_lock
from qmpsnap.store.records import Record, Records
from qmpsnap.store.sqlite.backend import SqliteStore

_FILES = ("", "-wal", "-shm")


class Made(Struct, frozen=True):
    """A machine that the new store has; ``notes`` says which of its files are not there."""

    name: str
    snapshots: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Rebuild(Struct, frozen=True):
    """The new store's machines, those left out and why, and where the old store is kept.

    ``moved_from``: the home that the records, and so the images' headers, name.
    """

    machines: tuple[Made, ...]
    left_out: tuple[tuple[str, str], ...]
    aside: str | None
    moved_from: str | None = None


class _Found(Struct, frozen=True):
    """A machine's record, the QEMU that runs it, and why it is left out; empty where it is not."""

    record: Record
    process: Process | None = None
    why_not: str = ""

    @property
    def name(self) -> str:
        return self.record.machine.name


async def run(home: Home, *, set_aside: bool) -> Rebuild:
    """Make the store again; no image is written to, and what there is of a store is renamed.

    Raises:
        StateError: the store is whole, or there is nothing to make one from.
        LockHeld: a controller works on a machine.
        QemuGone: the QEMU of a machine runs and does not say what it writes to; so too ``DeadlinePassed``.
    """
    health_found = await to_read(lambda: health.look(home.store, machines=home.machines))
    if health_found == "whole" and not set_aside:
        raise StateError(
            f"the store {home.store} is intact",
            hint="if it is an old copy, replace it with " + option("set_aside"),
        )
    known: frozenset[str] = frozenset()
    if health_found == "whole":
        known = await to_read(_known, home)
    records = await to_read(Records(home.machines).all)
    if not records:
        raise StateError(
            f"no machine in {home.machines} has a record: there is nothing to rebuild",
            hint="define machines on the images: 'image:' in a spec",
        )
    with contextlib.ExitStack() as stack:
        for record in records:
            name = record.machine.name
            stack.enter_context(machine_lock(home.lock(name), machine=name, verb="rebuild"))
        # Again, now that nobody else can change them.
        records = await to_read(Records(home.machines).all)
        found = [await _look(home, _here(record, home)) for record in records]
        with contextlib.suppress(QmpsnapError):  # told with what is not there
            await volumes.activate([layer for record in records for layer in record.layers])
        return await to_end(_make, home, _place(home, records), found, known)


def _here(record: Record, home: Home) -> Record:
    """The record with what it names of the home where that is now."""
    if record.home is None:
        return record
    text = msgspec.json.decode(msgspec.json.encode(record))
    return msgspec.convert(carried_all(text, (record.home.path,), str(home.data)), Record)


def _place(home: Home, records: Sequence[Record]) -> HomeRecord:
    """Which home it is, and which folder the headers may name: another than its own as long as one record does."""
    here = str(home.data)
    named = sorted((of for record in records if (of := record.home)), key=lambda of: of.path == here)
    return named[0] if named else HomeRecord(uuid.uuid4().hex, here)


async def _look(home: Home, record: Record) -> _Found:
    """Whether a machine can be made again, as far as its record and its QEMU tell."""
    machine = record.machine
    if machine.adopted:
        return _Found(record, why_not="it was adopted: adopt it again")
    if record.generation < 0:
        return _Found(record, why_not="its record is of an earlier release: rebuild the store with that release")
    if flaw := next(owner.of_folder(home.machine_dir(machine.name)), None):
        return _Found(record, why_not=f"another user can replace its record: {flaw.text}; {flaw.remedy}")
    process = processes.find(machine, home.run_dir(machine.name)) if machine.host == this_host() else None
    if process is None:
        return _Found(record)
    async with monitor(machine, home.run_dir(machine.name)) as qemu:
        nodes = {node.node_name for node in await commands.query_nodes(qemu)}
        read = await graph.read(qemu)
        disks = graph.by_disk(read, frozenset(nodes))
        version, named = await commands.query_version(qemu), file_nodes.foreign(read, record.layers)
        process = replace(process, qemu_version=version, nodes=named)
    for disk, active in record.active.items():
        if disk in disks and disks[disk].nodes[-1:] != (active,):
            writes = disks[disk].nodes[-1] if disks[disk].nodes else "another node"
            return _Found(record, why_not=f"its QEMU writes to {writes}, its record says {active}")
    return _Found(record, process)


def _known(home: Home) -> frozenset[str]:
    """The machines of a store that is intact, unless it is for ``relocate``: it was moved, or its files are copies."""
    with SqliteStore(home.store, machines=home.machines) as store:
        if relocate.look(_context(home, store)).needed:
            raise StateError(
                f"the store {home.store} is intact, but its home was moved or its files are copies: rebuilding it"
                " would lose its journal",
                hint="keep it: " + call("relocate"),
            )
        return frozenset(machine.name for machine in store.machines())


def _context(home: Home, store: SqliteStore) -> Context:
    return Context(home=home, store=store, qemu="", image=Programs.from_environment(os.environ).image, host=this_host())


def _make(home: Home, place: HomeRecord, found: Sequence[_Found], known: frozenset[str]) -> Rebuild:
    fresh = home.store.with_name(f"{home.store.name}.{os.getpid()}.part")
    left_out = {at.name: at.why_not for at in found if at.why_not}
    # Unless it was undefined since, as an old copy of the store does not know.
    left_out |= {name: "it has no record" for name in known - {at.name for at in found} if _has_files(home, name)}
    try:
        while True:
            made = [at for at in found if at.name not in left_out]
            _unlink(fresh)
            with SqliteStore(fresh, machines=home.machines) as store:
                store.home.note(place)
                doubts = _restore(home, store, made)
            if not doubts:
                break
            left_out |= doubts  # and once more without: its layers are known to nobody
        _require_all(home, known, left_out)
        aside = _swap(home, fresh)
    finally:
        _unlink(fresh)
    return Rebuild(
        tuple(
            Made(at.name, tuple(snapshot.name for snapshot in at.record.snapshots), _notes(at.record)) for at in made
        ),
        tuple(sorted(left_out.items())),
        aside,
        place.path if place.path != str(home.data) else None,
    )


def _restore(home: Home, store: SqliteStore, found: Sequence[_Found]) -> dict[str, str]:
    """Put machines into a store; the names of those whose images know more than their records, and why."""
    doubts: dict[str, str] = {}
    paths: dict[str, LayerId] = {}
    numbers = itertools.count(max((at.record.serial for at in found), default=0) + 1)
    # First what runs, as its nodes have the layers' ids. Of a layer that two machines read, the later record counts.
    for at in sorted(found, key=lambda at: (at.process is None, at.record.serial)):
        record = _fitted(at.record, paths, numbers)
        try:
            if at.process and record != at.record:
                raise StateError(
                    "its layers have other ids in the records of other machines, and its QEMU is running: stop it first"
                )
            store.restore(record, at.process)
        except QmpsnapError as error:
            doubts[at.name] = error.message
    for at in found:
        if at.name not in doubts:
            newer = stale_store.sign(_context(home, store), at.name, store.chains(at.name))
            if newer:
                doubts[at.name] = _doubt(home, at.name, newer)
    return doubts


def _fitted(record: Record, paths: dict[str, LayerId], numbers: Iterator[int]) -> Record:
    """The record with ids of its layers that are no other's: an old store has given numbers once more."""
    taken = set(paths.values())
    fitted: dict[LayerId, LayerId] = {}
    for layer in record.layers:
        if layer.path not in paths:
            last = layer_id(layer_disk(layer.id) or "", next(numbers)) if layer.id in taken else layer.id
            paths[layer.path] = last
        fitted[layer.id] = paths[layer.path]
    if all(old == new for old, new in fitted.items()):
        return record

    def of_snapshot(snapshot: Snapshot) -> Snapshot:
        points = tuple(replace(point, layer=fitted[point.layer]) for point in snapshot.points)
        inside = snapshot.inside and replace(snapshot.inside, layer=fitted[snapshot.inside.layer])
        return replace(snapshot, points=points, inside=inside)

    return replace(
        record,
        generation=record.generation + 1,  # so the record is written again
        serial=max(record.serial, *(int(layer.rpartition("-")[2]) for layer in fitted.values())),
        active={disk: fitted[layer] for disk, layer in record.active.items()},
        layers=tuple(
            replace(layer, id=fitted[layer.id], backing=fitted[layer.backing] if layer.backing else None)
            for layer in record.layers
        ),
        snapshots=tuple(map(of_snapshot, record.snapshots)),
    )


def _doubt(home: Home, name: str, newer: str) -> str:
    """Why a machine is better left out: an older layer in the newest one's place is one that others read."""
    return (
        f"its images are newer than its record: {newer}; put a newer record back, or move that file out of its folder"
        f" to continue without it, or rm {home.record(name)} and define a machine on the images: 'image:' in a spec"
    )


def _require_all(home: Home, known: frozenset[str], left_out: dict[str, str]) -> None:
    """Never put a store aside that can be read, to leave out a machine that it knows."""
    for name, why in left_out.items():
        if name in known:
            raise StateError(
                f"the store {home.store} is readable and has machine {name}, which a rebuild would lose: {why}",
                hint=call("check", name) + " shows what to do; to continue without it, move the store away first",
                machine=name,
            )


def _has_files(home: Home, name: str) -> bool:
    folder = home.machine_dir(name)
    return folder.is_dir() and any(folder.iterdir())


def _notes(record: Record) -> tuple[str, ...]:
    states = (snapshot.vmstate.path for snapshot in record.snapshots if snapshot.vmstate)
    files = [*(layer.path for layer in record.layers if layer.storage != "rbd"), *states]
    gone = [f"{path} does not exist" for path in files if not os.path.lexists(path)]
    return (*gone, *_gone_from_clusters(record))


def _gone_from_clusters(record: Record) -> Iterator[str]:
    for layer in record.layers:
        if image := RbdImage.parse(layer.path):
            try:
                ceph.info(image)
            except ImageRefused:
                yield f"{layer.shown} does not exist"
            except QmpsnapError as error:
                yield f"images in a cluster were not looked for: {error.message}"
                return


def _swap(home: Home, fresh: Path) -> str | None:
    """Put the new file in the store's place, the old one beside it; a crash in between leaves no store, no half one."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    aside = home.store.with_name(f"{home.store.name}.aside-{stamp}-{os.getpid()}")
    try:
        for suffix in _FILES:
            with contextlib.suppress(FileNotFoundError):
                Path(f"{home.store}{suffix}").rename(f"{aside}{suffix}")
        fresh.rename(home.store)
        sync_folder(home.data)
    except OSError as error:
        raise HostCannot(f"{home.store} cannot be replaced: {error.strerror}", effect="unknown") from error
    return str(aside) if aside.exists() else None


def _unlink(path: Path) -> None:
    for suffix in _FILES:
        Path(f"{path}{suffix}").unlink(missing_ok=True)
