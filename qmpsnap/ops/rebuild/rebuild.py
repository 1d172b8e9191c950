"""``check --rebuild``: a lost or damaged store is made again from what lies on the disks; it is kept aside itself."""

import contextlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.errors import HostCannot, StateError
from qmpsnap.hint import call, option
from qmpsnap.host.files import sync_folder
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine.qemu import monitor
from qmpsnap.machine.starting import process as processes
from qmpsnap.model.home import Home
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change, DefinePlan
from qmpsnap.model.relocation import HomeRecord, carried_all
from qmpsnap.ops.base import relocate
from qmpsnap.ops.base.context import Context, Programs, this_host
from qmpsnap.ops.rebuild.images import Finder
from qmpsnap.ops.rebuild.plan import Image, Rebuilt, Unread, plan
from qmpsnap.qmp import commands
from qmpsnap.store import health
from qmpsnap.store.lock import machine_lock
from qmpsnap.store.records import FOLDER, Records
from qmpsnap.store.sqlite.backend import SqliteStore

_FILES = ("", "-wal", "-shm")


class Made(Struct, frozen=True):
    """A machine that the new store has; ``notes`` is what could not be made again."""

    name: str
    snapshots: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Rebuild(Struct, frozen=True):
    """The new store's machines, those left out and why, and where the old store is kept.

    ``moved_from``: the home that the images' headers still name.
    """

    machines: tuple[Made, ...]
    left_out: tuple[tuple[str, str], ...]
    aside: str | None
    moved_from: str | None = None


class _Found(Struct, frozen=True):
    """A machine with the QEMU that runs it, and what that writes to."""

    machine: Machine
    process: Process | None = None
    active: Mapping[str, LayerId] | None = None


class _Task(Struct, frozen=True, kw_only=True):
    """What a store is made from.

    Attributes:
        place: which home it is, and which folder headers and records name.
        known: the machines of the store that is there, if that can be read.
    """

    home: Home
    place: HomeRecord
    known: frozenset[str]
    machines: Sequence[Machine]
    found: Sequence[_Found]
    images: Sequence[Image]


async def run(home: Home, *, set_aside: bool) -> Rebuild:
    """Make the store again; no image is written to, and what there is of a store is renamed.

    Args:
        home: where.
        set_aside: also when the store is whole: an old copy, for example.

    Raises:
        StateError: the store is whole, or there is nothing to make one from.
        LockHeld: a controller works on a machine.
        StoreTooNew: a newer qmpsnap wrote the store.
        QemuGone: the QEMU of a machine runs and does not say what it writes to.
        DeadlinePassed: likewise.
        HostCannot: a folder cannot be read, or the new store not be written.
    """
    found = await to_read(lambda: health.look(home.store, machines=home.machines))
    if found == "whole" and not set_aside:
        raise StateError(
            f"the store {home.store} is intact",
            hint="if it is an old copy, replace it with " + option("set_aside"),
        )
    known: frozenset[str] = frozenset()
    if found == "whole":
        known = await to_read(_known, home)
    records = Records(home.data / FOLDER)
    place = records.home() or HomeRecord(uuid.uuid4().hex, str(home.data))
    machines = tuple(_here(machine, place, home) for machine in records.machines())
    if not machines:
        raise StateError(
            f"{home.data / FOLDER} describes no machine: there is nothing to rebuild",
            hint="define machines on the images: 'image:' in a spec",
        )
    with contextlib.ExitStack() as stack:
        for machine in machines:
            stack.enter_context(machine_lock(home.lock(machine.name), machine=machine.name, verb="rebuild"))
        finder = Finder(home, records, place)
        images = await to_read(finder.images, machines)
        asked = [await _ask(home, machine) for machine in machines if machine.adopted is None]
        task = _Task(home=home, place=place, known=known, machines=machines, found=asked, images=images)
        return await to_end(_make, task, finder)


async def _ask(home: Home, machine: Machine) -> _Found:
    """What the machine's QEMU writes to, if one runs."""
    process = processes.find(machine, home.run_dir(machine.name)) if machine.host == this_host() else None
    if process is None:
        return _Found(machine)
    async with monitor(machine, home.run_dir(machine.name)) as qemu:
        nodes = {node.node_name for node in await commands.query_nodes(qemu)}
        disks = graph.by_disk(await graph.read(qemu), frozenset(nodes))
        version = await commands.query_version(qemu)
    names = {disk.name for disk in machine.spec.disks}
    active = {disk: LayerId(at.nodes[-1]) for disk, at in disks.items() if disk in names and at.nodes}
    return _Found(machine, replace(process, qemu_version=version), active)


def _known(home: Home) -> frozenset[str]:
    """The machines of a store that is whole, where nothing keeps their names and texts better than a new one.

    Raises:
        StateError: the home was moved, or its files are copies, which ``relocate`` puts right.
    """
    with SqliteStore(home.store, machines=home.machines) as store:
        image = Programs.from_environment(os.environ).image
        context = Context(home=home, store=store, qemu="", image=image, host=this_host())
        if relocate.look(context).needed:
            raise StateError(
                f"the store {home.store} is intact, but its home was moved or its files are copies: rebuilding it"
                " would lose names and descriptions",
                hint="keep them: " + call("relocate"),
            )
        return frozenset(machine.name for machine in store.machines())


def _here(machine: Machine, place: HomeRecord, home: Home) -> Machine:
    """The machine with what it names of the home where that is now."""
    text = msgspec.json.decode(msgspec.json.encode(machine))
    return msgspec.convert(carried_all(text, (place.path,), str(home.data)), Machine)


def _make(task: _Task, finder: Finder) -> Rebuild:
    home, place, images = task.home, task.place, task.images
    left_out = [(m.name, "it was adopted: adopt it again") for m in task.machines if m.adopted]
    planned: list[tuple[_Found, Rebuilt]] = []
    for at in task.found:
        copies, taken = finder.variables(at.machine), finder.variables(at.machine, taken=True)
        unread = finder.unread(images)
        rebuilt = plan(
            at.machine, images, finder.states(at.machine), at.active, unread=unread, variables=copies, taken=taken
        )
        if rebuilt.unread:
            left_out.append((at.machine.name, _doubt(rebuilt.unread)))
        elif rebuilt.missing:
            left_out.append((at.machine.name, f"no image of disk {', '.join(rebuilt.missing)} was found"))
        else:
            planned.append((at, rebuilt))
    _require_all(home, task.known, left_out)
    if place.path == str(home.data) and finder.elsewhere:
        place = HomeRecord(place.id, min(finder.elsewhere))
    fresh = home.store.with_name(f"{home.store.name}.{os.getpid()}.part")
    try:
        _unlink(fresh)
        with SqliteStore(fresh, machines=home.machines) as store:
            serials = max(1, finder.last_number)
            for at, rebuilt in planned:
                _record(store, at, rebuilt, serials=serials)
                serials = 1
            store.home.note(place)
        aside = _swap(home, fresh)
    finally:
        _unlink(fresh)
    made = [
        Made(at.machine.name, tuple(snapshot.name for snapshot in rebuilt.change.snapshots), _notes(rebuilt))
        for at, rebuilt in planned
    ]
    left_out += [("(images)", problem) for problem in finder.problems]
    return Rebuild(tuple(made), tuple(left_out), aside, place.path if place.path != str(home.data) else None)


def _require_all(home: Home, known: frozenset[str], left_out: Sequence[tuple[str, str]]) -> None:
    """Never put a store aside that can be read, to leave out a machine that it knows.

    Raises:
        StateError: that would happen; nothing was changed.
    """
    for name, why in left_out:
        if name in known:
            raise StateError(
                f"the store {home.store} is readable and has machine {name}, which a rebuild would lose: {why}",
                hint=call("check", name) + " shows what to do; to continue without it, move the store away first",
                machine=name,
            )


def _doubt(unread: Sequence[Unread]) -> str:
    """Why a machine is better left out: an older layer in the newest one's place is one that others read."""
    files = "; ".join(f"{layer.path} (or continue without it: {layer.remedy})" for layer in unread)
    disks = ", ".join(sorted({layer.disk for layer in unread}))
    return (
        f"the active layer of disk {disks} is unknown, as newer layers cannot be read: make them readable and rebuild"
        f" again: {files}"
    )


def _notes(rebuilt: Rebuilt) -> tuple[str, ...]:
    paths = {layer.id: layer.path for layer in rebuilt.change.layers}
    guesses = (
        f"disk {disk}: several images could be active; {paths[layer]}, with the highest number, was chosen:"
        " check it before you start the machine"
        for disk, layer in rebuilt.guessed.items()
    )
    states = (f"{state.vmstate.path}: its layers are unknown" for state in rebuilt.unused)
    return (*guesses, *states)


def _record(store: SqliteStore, at: _Found, rebuilt: Rebuilt, *, serials: int) -> None:
    name = at.machine.name
    change = replace(rebuilt.change, define=replace(at.machine, process=None, current=None))

    def make(_: OperationId) -> DefinePlan:
        # Without its layers: whatever was found is recorded, also what two machines should not have shared.
        return DefinePlan(machine=name, images=(), overlays=(), change=Change(define=change.define))

    # Layers that two machines read are put twice, the same both times.
    operation = store.open_operation(name, make, serials=serials)
    store.settle(operation.id, name, change)
    store.set_process(name, at.process)


def _swap(home: Home, fresh: Path) -> str | None:
    """The new file in the store's place, what was there beside it; a crash between leaves no store, never half of one.

    Raises:
        HostCannot: no right.
    """
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
