"""``adopt``: a QEMU that something else launched becomes a machine, its images layers that qmpsnap never writes to."""

import os
import re
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import foreign, graph
from qmpsnap.block.foreign import ForeignDisk
from qmpsnap.block.image.header import FoundLayer
from qmpsnap.errors import DeadlinePassed, HostCannot, QemuGone, QmpError, StateError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine import adopted
from qmpsnap.machine.adopted import Seen
from qmpsnap.model.home import Home
from qmpsnap.model.machines.adoption import Adoption
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import Cache, DiskSpec, MachineSpec, Opened
from qmpsnap.model.names import DISK_NAME, LayerId, NodeName, OperationId, check_name
from qmpsnap.model.operations.operation import DefinePlan
from qmpsnap.model.text import printable
from qmpsnap.ops.adoption import adopt_files
from qmpsnap.ops.base.context import Context, forget_places, locked
from qmpsnap.ops.lifecycle import define, disk_sources
from qmpsnap.ops.lifecycle.disk_sources import DiskSource
from qmpsnap.ops.session.session import require_settled
from qmpsnap.qmp import commands, session
from qmpsnap.qmp.commands import DEVICE, Backend
from qmpsnap.qmp.session import Monitor, Session

NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
"""What a QEMU without ``-uuid`` answers."""

_UNSETTLED: Final = ("inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "colo")
"""Run states in which the images are not, or not only, this QEMU's."""


class AdoptedDisk(Struct, frozen=True, kw_only=True):
    """A disk as it was found: our name of it, QEMU's, and its nodes and files.

    Attributes:
        read_only: the guest cannot write to it.
        opened: everything that new layers of it are to be opened with.
        untold: why not all of that is known; empty when it is.
    """

    name: str
    backend: str
    found: ForeignDisk
    read_only: bool
    cache: Cache
    opened: Opened = Opened()
    untold: str = ""


class Survey(Struct, frozen=True, kw_only=True):
    """What a QEMU has told: a machine without disks and layers, its disks, and the drives that stay out of it."""

    machine: Machine
    adoption: Adoption
    disks: tuple[AdoptedDisk, ...]
    left_out: tuple[str, ...]


class Adopted(Struct, frozen=True):
    """A new machine, and how its disks are called in its QEMU."""

    machine: Machine
    disks: tuple[AdoptedDisk, ...]
    left_out: tuple[str, ...]


def choose(backends: Sequence[Backend]) -> tuple[list[Backend], list[str]]:
    """The drives that are disks, and why others are not; pure."""
    disks, left_out = [], []
    for backend in backends:
        if backend.removable:
            left_out.append(f"{backend.name}: its medium is removable")
        elif backend.inserted is None:
            left_out.append(f"{backend.name}: it is empty")
        elif backend.is_flash:
            left_out.append(f"{backend.name}: it is firmware")
        elif not backend.qdev:
            left_out.append(f"{backend.name}: no device uses it")
        else:
            disks.append(backend)
    return disks, left_out


def names(backends: Sequence[Backend]) -> list[str]:
    """A disk name for each drive: its device's id, or the drive's, or the next free of ``vda``, ``vdb`` ...; pure."""
    wanted = [_own_name(backend) for backend in backends]
    taken = {name for name in wanted if name}
    spare = (name for name in map(_letters, range(len(backends) * 2)) if name not in taken)
    given: list[str] = []
    for name in wanted:
        given.append(name if name and name not in given else next(spare))
    return given


def _own_name(backend: Backend) -> str | None:
    device = DEVICE.match(backend.qdev or "")
    candidates = (device[1] if device else "", backend.device)
    return next((name for name in candidates if DISK_NAME.match(name)), None)


def _letters(number: int) -> str:
    first, second = divmod(number, 26)
    return f"vd{chr(ord('a') + first - 1) if first else ''}{chr(ord('a') + second)}"


def plan(survey: Survey, sources: Mapping[str, DiskSource], *, serial: OperationId, home: Home) -> DefinePlan:
    """What will be recorded; pure. Nothing is created: every layer is somebody else's file."""
    planned = define.plan(survey.machine, sources, serial=serial, home=home, variables=False)
    by_path = {layer.path: layer.id for layer in planned.change.layers}
    nodes: dict[LayerId, NodeName] = {}
    for disk in survey.disks:
        source = sources[disk.name]
        for layer, found, known in zip(disk.found.layers, source.found, source.known, strict=True):
            identity = known.id if known else by_path[found.path]
            if nodes.setdefault(identity, layer.node) != layer.node:
                raise StateError(
                    f"disk {disk.name} and another one both read {printable(found.path)}, through separate nodes",
                    hint="launch it with a separate base for every disk",
                )
    machine = replace(survey.machine, adopted=replace(survey.adoption, nodes=nodes))
    return replace(planned, change=replace(planned.change, define=machine))


async def run(context: Context, name: str, socket: Path, *, own: bool = False) -> Adopted:
    """Take over the QEMU that listens on a monitor; it does not notice.

    ``own``: the images that its guest writes to are qmpsnap's from now on.

    Raises:
        NameTaken: there is a machine of that name.
        QemuGone: nobody listens there, or no QEMU does.
        DeadlinePassed: somebody listens and is silent: mostly because another client holds the monitor.
        StateError: the machine is known already, a job runs, or an image cannot be taken over.
        StoreMismatch: an image on disk is not what QEMU says it is.
        HostCannot: QEMU is another user's.
    """
    check_name(name, "machine")
    socket = socket.absolute()
    async with locked(context, name, "adopt"):
        await define.end_earlier(context, name, adopts=True)
        try:
            return await _adopt(context, name, socket, own=own)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await to_end(forget_places, context.home, name)
            raise


async def preview(context: Context, name: str, socket: Path, *, own: bool = False) -> tuple[Survey, DefinePlan]:
    """What :func:`run` would find and record now; refused as that would be, and nothing is changed."""
    check_name(name, "machine")
    await require_settled(context, name)
    await define.require_new(context, name, adopts=True)
    survey, sources = await _look(context, name, socket.absolute(), own=own)
    serial = OperationId(await context.astore.next_serial())
    planned = plan(survey, sources, serial=serial, home=context.home)
    return replace(survey, disks=_placed(survey, sources)), planned


async def _adopt(context: Context, name: str, socket: Path, *, own: bool) -> Adopted:
    basis = await context.astore.basis(name)
    survey, sources = await _look(context, name, socket, own=own)
    machine = await define.record(
        context,
        survey.machine,
        basis,
        lambda at: plan(survey, sources, serial=at.serial, home=at.home),
        serials=define.serials_needed(survey.machine.spec, sources),
    )
    return Adopted(machine, _placed(survey, sources), survey.left_out)


async def _look(context: Context, name: str, socket: Path, *, own: bool) -> tuple[Survey, dict[str, DiskSource]]:
    """What the QEMU tells, and the files of its disks, once they can be taken over."""
    try:
        async with session.connect(socket, machine=name) as qemu:
            seen = await to_read(adopted.look, qemu.peer)
            survey = await _survey(qemu, name, socket, seen, host=context.host)
    except QemuGone as error:
        error.message = f"{printable(str(socket))} is not the QMP socket of a running QEMU"
        error.hint = "launch QEMU with -qmp unix:PATH,server=on,wait=off"
        raise
    except DeadlinePassed as error:
        if await to_read(adopted.is_libvirts, socket):
            raise _libvirts("") from error
        error.hint = "QEMU hangs or is stopped by a signal, or another client is connected to this monitor"
        raise
    await _refuse_known(context, survey)
    sources: dict[str, DiskSource] = {}
    for disk in survey.disks:
        files = await to_read(adopt_files.files, disk.name, disk.backend, disk.found, seen)
        known = [await context.astore.layer_at(found.path) for found in files]
        sources[disk.name] = DiskSource(tuple(files), tuple(known))
    disks = tuple(_spec_of(disk, sources[disk.name].found[-1], own=own) for disk in survey.disks)
    for wanted in disks:
        disk_sources.require_ownable(wanted, sources[wanted.name].found)
    spec = replace(survey.machine.spec, disks=disks)
    survey = replace(survey, machine=replace(survey.machine, spec=spec))
    writers, readers = await disk_sources.users(context)
    disk_sources.require_unshared(spec, sources, writers=writers, readers=readers)
    await disk_sources.require_unwritten(context, name, sources, ours=[seen.process.pid])
    return survey, sources


def _spec_of(disk: AdoptedDisk, active: FoundLayer, *, own: bool) -> DiskSpec:
    return DiskSpec(
        name=disk.name,
        image=active.path if active.storage == "file" else None,
        device=active.path if active.storage == "host_device" else None,
        rbd=RbdImage.parse(active.path),
        format=active.format,
        cache=disk.cache,
        read_only=disk.read_only,
        own=own and active.storage == "file" and not disk.read_only,
        opened=disk.opened,
    )


def _placed(survey: Survey, sources: Mapping[str, DiskSource]) -> tuple[AdoptedDisk, ...]:
    """The disks with the paths of their files, of which QEMU may have only relative ones."""

    def placed(disk: AdoptedDisk) -> AdoptedDisk:
        files = sources[disk.name].found
        layers = (replace(layer, path=file.path) for layer, file in zip(disk.found.layers, files, strict=True))
        return replace(disk, found=replace(disk.found, layers=tuple(layers)))

    return tuple(map(placed, survey.disks))


async def _survey(qemu: Session, name: str, socket: Path, seen: Seen, *, host: str) -> Survey:
    try:
        status = await commands.query_status(qemu)
        qemu_uuid = await commands.query_uuid(qemu)
        kvm = await commands.query_kvm(qemu)
        spec = MachineSpec(
            name=name,
            machine=await commands.machine_type(qemu),
            accel="kvm" if kvm else "tcg",
            cpus=await commands.query_cpus(qemu),
            memory=await commands.query_memory(qemu),
            agent=False,
        )
    except QmpError as error:
        raise StateError(
            f"the QMP server on {printable(str(socket))} runs no guest: {error.message}",
            hint="use the monitor of a qemu-system-* process",
        ) from error
    if status.status in _UNSETTLED:
        raise StateError(f"that QEMU is in state {status.status}", hint="wait until it runs")
    if running := await commands.query_jobs(qemu):
        shown = ", ".join(f"{job.id} ({job.type}, {job.status})" for job in running)
        raise StateError(f"that QEMU has jobs: {printable(shown)}", hint="end and dismiss them, then adopt it")
    _require_reachable(seen)
    disks, left_out, others = await _disks(qemu, seen)
    if not disks:
        raise StateError(
            f"that QEMU has no disk that snapshots could include ({'; '.join(left_out) or 'no drive at all'})"
        )
    version = await commands.query_version(qemu)
    machine = Machine(
        name=name,
        # Without a UUID of its own the process alone, by pid, start time and boot, tells the machine again.
        uuid=str(uuid.uuid4()) if qemu_uuid == NO_UUID else qemu_uuid,
        host=host,
        spec=spec,
        created=time.time(),
        process=replace(seen.process, accel=spec.accel, qemu_version=version),
    )
    names = {disk.name: disk.backend for disk in disks}
    adoption = Adoption(socket=str(socket), uuid=qemu_uuid, disks=names, nodes={}, left_out=others)
    return Survey(machine=machine, adoption=adoption, disks=tuple(disks), left_out=tuple(left_out))


def _libvirts(domain: str) -> StateError:
    shown = printable(domain)
    return StateError(
        f"that QEMU is {f'domain {shown} of libvirt' if domain else 'one of libvirt'}, which expects to be the only one"
        " that changes its block graph",
        hint=f"shut it down, virsh dumpxml {shlex.quote(shown) if domain else 'DOMAIN'} > dom.xml, then "
        + call("import_libvirt", "", "dom.xml"),
    )


def _require_reachable(seen: Seen) -> None:
    if (domain := adopted.libvirt_domain(seen.arguments)) is not None:
        raise _libvirts(domain)
    if seen.user not in (os.geteuid(), 0):
        raise HostCannot(
            f"that QEMU runs as user {seen.user}, who cannot open layers that this user creates",
            hint="try again as that user",
        )
    if any(re.search(r"(^|,)copy-on-read=on(,|$)", argument) for argument in seen.arguments):
        # It is a flag of the image's node, not a filter: QEMU would go on writing to a layer that is frozen.
        raise StateError(
            "that QEMU was launched with -drive ...,copy-on-read=on, which writes to layers below a snapshot",
            hint="launch it with a copy-on-read filter instead: -blockdev driver=copy-on-read,file=NODE",
        )


async def _disks(qemu: Monitor, seen: Seen) -> tuple[list[AdoptedDisk], list[str], tuple[str, ...]]:
    backends = await commands.query_block(qemu)
    chosen, left_out = choose(backends)
    # The graph last: a node that only the first of two answers has would otherwise be missed.
    nodes = await commands.query_nodes(qemu)
    found = await graph.read(qemu)
    disks = []
    for name, backend in zip(names(chosen), chosen, strict=True):
        assert backend.inserted is not None  # else it was not chosen
        image = foreign.read_disk(backend, found, nodes)
        opened, untold = adopt_files.opened(backend.name, image, nodes, seen.arguments)
        cache = next(node.cache for node in nodes if node.node_name == image.layers[-1].node)
        disks.append(
            AdoptedDisk(
                name=name,
                backend=backend.name,
                found=image,
                read_only=backend.inserted.ro,
                cache="none" if cache.direct else "unsafe" if cache.no_flush else "writeback",
                opened=opened,
                untold=untold,
            )
        )
    return disks, left_out, tuple(backend.shown for backend in backends if backend not in chosen)


async def _refuse_known(context: Context, survey: Survey) -> None:
    mine = survey.machine.process
    for other in await context.astore.machines():
        same = other.process and mine and _place(other.process) == _place(mine)
        if same or other.uuid == survey.machine.uuid:
            raise StateError(
                f"that QEMU is machine {other.name} already (UUID {other.uuid})",
                hint=call("state", other.name) + " shows it",
                machine=other.name,
            )


def _place(process: object) -> tuple[object, ...]:
    return tuple(getattr(process, field) for field in ("pid", "start_ticks", "boot_id"))
