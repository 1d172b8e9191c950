"""``relocate``: accept a home that was moved, copied or restored from a backup, with its names, texts and tree.

Every file is compared with its record first. The recorded file is accepted; another file whose header fits is a
*candidate copy*, accepted only with consent or by its recorded digest. Then the decision is made durable, the headers
are rewritten, each through a descriptor of the very file, and one transaction of the store ends it. If the process is
killed in between, the next command continues.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image import header
from qmpsnap.block.image.backing import set_backing
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.errors import HostCannot, ImageRefused, StateError, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host.files import same_file
from qmpsnap.host.system_errors import translated
from qmpsnap.host.threads import to_read
from qmpsnap.machine import statefile
from qmpsnap.machine.starting import alive
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.names import LayerId
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.model.relocation import HomeRecord, Relocation, carried
from qmpsnap.model.timestamps import moment
from qmpsnap.ops.base import home_location, luks
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.store.lock import machine_lock

Verdict = Literal["recorded", "copy", "proven", "other home's", "differs", "missing"]
"""``recorded``: the recorded file. ``copy``: another one whose header fits. ``proven``: another one with the digest.
``other home's``: the recorded file, which belongs to the home that this one is a copy of."""


_SHOWN = 3
"""Files that a refusal lists."""


class Compared(Struct, frozen=True, kw_only=True):
    """One file and its record; ``text`` says what was compared."""

    path: str
    what: str
    verdict: Verdict
    text: str


class Relocated(Struct, frozen=True, kw_only=True):
    """What was found, and done: where the home was recorded and lies, and which one it is a copy of.

    Attributes:
        rewritten: the images whose headers name their backing at its place now, or would.
        done: it was done; else only looked at, or there was nothing to do.
    """

    old: str
    new: str
    original: str | None
    compared: tuple[Compared, ...]
    rewritten: tuple[str, ...]
    done: bool = False


class Look(Struct, frozen=True):
    """The outcome, and what would be agreed to; ``needed``: there is something to do."""

    outcome: Relocated
    record: HomeRecord
    relocation: Relocation
    needed: bool


async def run(context: Context, *, accept_copies: bool = False, dry_run: bool = False) -> Relocated:
    """Let a home go on at the path where it is, with the files that are there.

    Raises:
        StateError: there are candidate copies and nobody has agreed, or a machine runs; nothing was changed.
        LockHeld: a controller works on a machine.
        HostCannot: a header or the store cannot be written; the next command goes on.
    """
    await context.astore.require_writable()
    if not context.store.is_there:
        raise StoreMismatch(
            f"there is no store {context.home.store}",
            hint="rebuild a lost store: " + call("rebuild"),
        )
    with contextlib.ExitStack() as stack:
        if not dry_run:
            await _locked_go_on(context, stack)
        at = await to_read(look, context)
        if dry_run:
            return at.outcome
        if not at.needed:
            await _keep_records(context)
            return at.outcome
        _require_stopped(context, copied=at.outcome.original is not None)
        copies = [one for one in at.outcome.compared if one.verdict == "copy"]
        if copies and not accept_copies:
            raise StateError(
                f"{len(copies)} file(s) are not the recorded ones, although their headers match:"
                f" {'; '.join(f'{one.path}: {one.text}' for one in copies[:_SHOWN])}"
                f"{' ...' if len(copies) > _SHOWN else ''}",
                hint="if they are complete copies, " + call("relocate", accept_copies=True),
            )
        await blocking(context.store.home.begin, at.record, at.relocation)
        await _end(context, at.relocation)
    return replace(at.outcome, done=True)


async def go_on(context: Context) -> None:
    """End a relocation of this home that was agreed to and interrupted; nothing where there is none."""
    if await blocking(is_open, context):
        with contextlib.ExitStack() as stack:
            await _locked_go_on(context, stack)


def is_open(context: Context) -> bool:
    """Whether there is one."""
    record = context.store.home.record()
    return record is not None and record.moving is not None and record.moving.now == str(context.home.data)


async def _locked_go_on(context: Context, locks: contextlib.ExitStack) -> None:
    for machine in await context.astore.machines():
        path = context.home.lock(machine.name)
        locks.enter_context(machine_lock(path, machine=machine.name, verb="relocate"))
    record = await blocking(context.store.home.record)
    if record and record.moving and record.moving.now == str(context.home.data):
        await _end(context, record.moving)


async def _end(context: Context, relocation: Relocation) -> None:
    try:
        await _carry_out(context, relocation)
    except Exception as error:
        if (told := translated(error)) is None:
            raise
        told.claim("unknown")  # it was begun, and the next command goes on
        if told is error:
            raise
        raise told from error


async def _carry_out(context: Context, relocation: Relocation) -> None:
    forest = await context.astore.forest()
    copies = {layer.id: layer for layer in relocation.layers}
    layers = {layer.id: _carried(copies.get(layer.id, layer), relocation) for layer in forest.layers.values()}
    machines = {machine.name: machine for machine in await context.astore.machines()}
    layers = await to_read(_with_planned, context, layers, relocation)
    for layer, backing in await to_read(_stale_headers, layers, relocation):
        readers = sorted(forest.machines_above(layer.id) & machines.keys())
        if not readers:
            await set_backing(layer, backing, qemu_img=context.image.binary)
            continue
        async with luks.for_layer(context, machines[readers[0]], layer) as key:
            await set_backing(layer, backing, qemu_img=context.image.binary, key=key)
    await blocking(context.store.home.finish, relocation)
    await _keep_records(context)


async def _keep_records(context: Context) -> None:
    for machine in await context.astore.machines():
        await blocking(context.store.records.keep, machine.name)


def look(context: Context) -> Look:
    """Compare every file with its record; nothing is changed. May block for long: state files are read whole."""
    import uuid

    store, home = context.store, context.home
    record = home_location.recorded(home, store)
    now = str(home.data)
    past = {record.path, *(record.moving.before if record.moving else ())}
    past |= {record.moving.now} if record.moving else set()
    before = tuple(sorted(past - {now}, key=len, reverse=True))
    other = home_location.original(record, home)
    plain = Relocation(
        id=uuid.uuid4().hex if other else record.id, before=before, now=now, foreign_process=record.path != now
    )
    forest = store.forest()
    busy = {machine.name for machine in store.machines() if store.operations(machine.name, only_open=True)}
    compared, layers, states = [], [], []
    for layer in forest.layers.values():
        one, new = _layer(layer, forest, plain, other, busy=bool(busy & forest.machines_above(layer.id)))
        compared.append(one)
        layers += [new] if new else []
    for machine in store.machines():
        for snapshot in store.snapshots(machine.name):
            if snapshot.vmstate:
                told, state = _state(snapshot.vmstate, f"memory of snapshot {snapshot.name} of {machine.name}", plain)
                compared.append(told)
                states += [state] if state else []
    relocation = replace(plain, layers=tuple(layers), states=tuple(states))
    after = {layer.id: layer for layer in layers}
    carried_layers = {one.id: _carried(after.get(one.id, one), plain) for one in forest.layers.values()}
    stale = [layer.path for layer, _ in _stale_headers(_with_planned(context, carried_layers, plain), relocation)]
    taken = any(one.verdict in ("copy", "proven", "other home's") for one in compared)
    needed = bool(record.path != now or record.moving or taken or stale)
    return Look(
        Relocated(old=record.path, new=now, original=other, compared=tuple(compared), rewritten=tuple(stale)),
        record,
        relocation,
        needed,
    )


def _layer(
    layer: Layer, forest: Forest, to: Relocation, other: str | None, *, busy: bool
) -> tuple[Compared, Layer | None]:
    """A layer's file beside its record, and what is recorded of it from now on where that is something new.

    ``busy``: an operation is open, which may have left its header between two states.
    """
    here = _carried(layer, to)

    def said(verdict: Verdict, text: str) -> Compared:
        return Compared(path=here.path, what=f"layer {layer.id}", verdict=verdict, text=text)

    try:
        found = header.read(here.path, format=here.format, block_device=True)
    except (ImageRefused, HostCannot) as error:
        return said("missing", error.message), None
    if same_file(here, found):
        if other and layer.owned and not here.path.startswith(f"{to.now}/"):
            # Never to be written to or removed from here: no file has this identity.
            nobody = replace(layer, device=0, inode=0, birth=0)
            return said("other home's", f"it is outside the home and belongs to {other}"), nobody
        news = replace(layer, birth=found.birth) if found.birth != layer.birth and found.birth else None
        return said("recorded", "device, inode and birth"), news
    active = any(writer.layer == layer.id for writer in forest.writers)
    if problem := _unlike(here, forest, found, to, active=active, busy=busy):
        return said("differs", problem), None
    copy = replace(layer, device=found.device, inode=found.inode, birth=found.birth, virtual_size=found.virtual_size)
    return said("copy", _likeness(here, found)), copy


def _likeness(layer: Layer, found: Header) -> str:
    written = moment(Path(layer.path).stat().st_mtime)
    what = f"format {found.format}, virtual size {found.virtual_size}"
    what += f", backing {header.printable(found.backing)}" if found.backing else ""
    return f"compared were {what}; no digest is recorded; last written {written}"


def _unlike(layer: Layer, forest: Forest, found: Header, to: Relocation, *, active: bool, busy: bool) -> str | None:
    """In what a file cannot be a copy of the recorded one."""
    if found.virtual_size != layer.virtual_size and not active:
        return f"its virtual size is {found.virtual_size}, recorded is {layer.virtual_size}"
    if not layer.owned or layer.format != "qcow2" or busy:
        return None  # a foreign image may name its backing as it likes; an operation may have renamed it
    below = _carried(forest.layers[layer.backing], to) if layer.backing else None
    named = _wanted(found.backing, below, to) if found.backing else None
    if named != (below.path if below else None):
        return f"its header names {header.printable(found.backing or 'nothing')} as its backing file"
    return None


def _state(state: Vmstate, what: str, to: Relocation) -> tuple[Compared, Vmstate | None]:
    here = replace(state, path=carried(state.path, to.before, to.now))

    def said(verdict: Verdict, text: str) -> Compared:
        return Compared(path=here.path, what=what, verdict=verdict, text=text)

    try:
        found, _ = statefile.find(here.path)
        if same_file(here, found):
            return said("recorded", "device, inode and birth"), None
        copy = replace(here, device=found.device, inode=found.inode, birth=found.birth)
        with statefile.verified(copy):
            return said("proven", f"its digest is the recorded {state.digest[:12]}..."), copy
    except HostCannot as error:
        return said("missing", error.message), None
    except StoreMismatch as error:
        return said("differs", error.message), None


def _carried(layer: Layer, to: Relocation) -> Layer:
    return replace(layer, path=carried(layer.path, to.before, to.now))


def _wanted(said: str, below: Layer | None, to: Relocation) -> str:
    """What a header that says this should say; the home's earlier paths may be unknown, its folders are not."""
    if (new := carried(said, to.before, to.now)) != said or below is None:
        return new
    inside = below.path.removeprefix(to.now)
    return below.path if inside.startswith("/machines/") and home_location.root_of(said, inside) else said


def _with_planned(context: Context, layers: dict[LayerId, Layer], to: Relocation) -> dict[LayerId, Layer]:
    """Beside the recorded layers those that an open operation has made and the store does not have yet.

    They are known by their place, which the plan names, and by the header that the plan has asked for.
    """
    found = dict(layers)
    for machine in context.store.machines():
        for operation in context.store.operations(machine.name, only_open=True):
            for new in getattr(operation.plan, "overlays", ()):
                below = _carried(new.backing, to)
                for path in (new.layer.path, *([new.part] if new.part else [])):
                    here = replace(new.layer, path=carried(path, to.before, to.now))
                    with contextlib.suppress(ImageRefused, HostCannot):
                        seen = header.read(here.path, format=here.format)
                        if seen.backing and _wanted(seen.backing, below, to) == below.path and here.id not in layers:
                            ours = replace(here, device=seen.device, inode=seen.inode, birth=seen.birth)
                            found.setdefault(here.id, ours)
    return found


def _stale_headers(layers: dict[LayerId, Layer], to: Relocation) -> Sequence[tuple[Layer, Layer]]:
    """The layers whose header names their backing at another path of this home, each with that backing as it is."""
    by_path = {layer.path: layer for layer in layers.values()}
    found: list[tuple[Layer, Layer]] = []
    for layer in layers.values():
        if not layer.owned or layer.format != "qcow2":
            continue
        try:
            seen = header.read(layer.path, format="qcow2")
        except (ImageRefused, HostCannot):
            continue  # missing: told as that
        if seen.backing is None or not same_file(layer, seen):
            continue
        below = layers.get(layer.backing) if layer.backing else None
        wanted = _wanted(seen.backing, below, to)
        if wanted != seen.backing:
            # In the middle of a merge a header may name a layer that is not the recorded backing.
            named = by_path.get(wanted) or Layer(
                id=layer.id, path=wanted, format="raw" if seen.backing_format == "raw" else "qcow2", backing=None,
                virtual_size=seen.virtual_size,
            )  # fmt: skip
            found.append((layer, named))
    return found


def _require_stopped(context: Context, *, copied: bool) -> None:
    for machine in context.store.machines():
        # Where an adopted QEMU runs, its images are open by their old names; of a copy it is the original's.
        theirs = machine.adopted and machine.process and not copied and alive.is_alive(machine.process)
        if theirs or context.process(machine):
            raise StateError(
                f"machine {machine.name} runs with its images open under their old names",
                hint=call("stop", machine.name) + ", then " + call("relocate"),
                machine=machine.name,
            )
