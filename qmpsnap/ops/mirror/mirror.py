"""``mirror``: a disk is copied while the guest runs, to go on with the copy or to have one."""

import os
import re
import stat
from pathlib import Path
from typing import Literal

from msgspec import Struct

from qmpsnap.block import nbd
from qmpsnap.block.image import header, measure, staged
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.block.usage import access
from qmpsnap.errors import HostCannot, ImageRefused, StateError, UsageError
from qmpsnap.hint import option
from qmpsnap.host.files import inode_of
from qmpsnap.host.threads import to_read
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.nbd import NbdExport, is_uri, parse
from qmpsnap.model.machines.spec import Format
from qmpsnap.model.names import OperationId, job_id, layer_id
from qmpsnap.model.operations.by import MirrorBy
from qmpsnap.model.operations.operation import Change, MirrorPlan
from qmpsnap.model.planning.merging import unneeded
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base import free_space
from qmpsnap.ops.base.context import Context, require_spec
from qmpsnap.ops.base.free_space import Need
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.mirror import job
from qmpsnap.ops.session import file_nodes, recovery
from qmpsnap.ops.session.planning_state import look
from qmpsnap.ops.session.session import begin, inputs, looking, working
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.store.store import Store

Mode = Literal["pivot", "finish"]


class MirrorRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        target: absolute path of the copy, or an NBD export's URI.
        mode: ``pivot``: the guest goes on with the copy. ``finish``: it stays where it is.
        shallow: copy the active layer only; the copy has the same backing.
        reuse: overwrite the image that is at ``target``.
        format: of the target; None is qcow2 for a new image and what its header says for one that is there.
        write_blocking: the guest's writes wait for the copy, so that it cannot be outrun.
        bandwidth: bytes per second that the job copies at most; 0 is without limit.
        by: the QMP command; with ``drive-mirror`` QEMU opens the copy itself.
    """

    disk: str
    target: str
    mode: Mode
    shallow: bool = False
    reuse: bool = False
    format: Format | None = None
    write_blocking: bool = False
    bandwidth: int = 0
    by: MirrorBy = "blockdev-mirror"


class Found(Struct, frozen=True):
    """The image that is at the target already, and whether anything was ever written to it."""

    header: Header
    empty: bool


def plan(
    at: Situation, chain: Chain, request: MirrorRequest, *, serial: OperationId, found: Found | None = None
) -> MirrorPlan:
    """What will be done; pure."""
    active, export = chain.active, parse(request.target) if is_uri(request.target) else None
    below = chain.layers[-2] if request.shallow and len(chain.layers) > 1 else None
    image_format = request.format or (found.header.format if found else "raw" if export else "qcow2")
    _require_possible(request, export, below, image_format)
    if found:
        _require_fit(request, chain, below, found)
    target = Layer(
        id=layer_id(chain.disk, serial),
        path=request.target,
        format=image_format,
        backing=below.id if below else None,
        virtual_size=active.virtual_size,
        device=found.header.device if found else 0,
        inode=found.header.inode if found else 0,
        birth=found.header.birth if found else 0,
        owned=found is None and export is None,
    )
    change = Change()
    removed: tuple[Layer, ...] = ()
    if request.mode == "pivot":
        change = Change(layers=(target,), active={chain.disk: target.id})
        left = reversed(chain.layers[-1:] if below else chain.layers)
        removed = unneeded(at.forest.apply(at.machine, change), left)
        change = Change(
            layers=(target,),
            active={chain.disk: target.id},
            removed_layers=tuple(layer.id for layer in removed),
        )
    copied = chain.layers[-1:] if below else chain.layers
    return MirrorPlan(
        machine=at.machine,
        disk=chain.disk,
        mode=request.mode,
        target=target,
        made=target.owned,
        shallow=below is not None,
        write_blocking=request.write_blocking,
        live=at.running,
        chain=chain.layers,
        moves=at.moves(copied, target),
        removed=removed,
        nbd=export,
        change=change,
        bandwidth=request.bandwidth,
        by=request.by,
    )


def _require_possible(request: MirrorRequest, export: NbdExport | None, below: Layer | None, kind: Format) -> None:
    problem = ""
    if export and request.mode == "pivot":
        problem = "a disk cannot pivot to an NBD export: the next start could not open it"
    elif export and below:
        problem = "an NBD export has no backing file, which a shallow copy needs"
    elif export and kind != "raw":
        problem = "an NBD export holds raw data only"
    elif below and request.by == "drive-mirror":
        problem = "drive-mirror would open the backing file of a shallow copy a second time"
    elif below and kind == "raw":
        problem = "a raw image has no backing file, which a shallow copy needs"
    if problem:
        raise UsageError(problem)


def _require_fit(request: MirrorRequest, chain: Chain, below: Layer | None, found: Found) -> None:
    """Refuse an image whose content or size would not be the disk's afterwards."""
    at, wanted = found.header, chain.active.virtual_size
    path, hint = header.printable(request.target), ""
    problem = ""
    if at.virtual_size != wanted:
        # QEMU: "Source and target image have different sizes".
        problem = f"has {at.virtual_size} bytes, but disk {chain.disk} has {wanted}"
        hint = f"qemu-img resize {path} {wanted}"
    elif at.internal_snapshots or at.dirty or at.corrupt or at.encrypted:
        problem = "has internal snapshots, is encrypted, or was not closed cleanly"
    elif at.backing != (below.path if below else None) or (below and at.backing_format != below.format):
        names = header.printable(at.backing) if at.backing else "nothing"
        problem = f"names {names} as its backing file instead of {below.path if below else 'nothing'}"
        hint = (
            f"create it with that backing file: qemu-img create -f qcow2 -F {below.format} -b {below.path}"
            if below
            else "create it without a backing file, or use " + option("shallow")
        )
    elif below and not found.empty:
        problem = "already holds data, which would hide the disk's own"
        hint = "create it again, empty"
    if problem:
        raise ImageRefused(f"{path} {problem}", hint=hint)


async def preview(
    context: Context, name: str, request: MirrorRequest
) -> tuple[MirrorPlan, list[tuple[str, dict[str, object]]]]:
    """The plan that :func:`run` would follow now and the commands that start its job; locks and changes nothing."""
    async with looking(context, name, removes=request.mode == "pivot") as session:
        at, found = await _survey(session, request)
        serial = (await inputs(session, at.basis)).serial
        made = plan(at, at.live[request.disk], request, serial=serial, found=found)
        await _require_space(context, made, found)
        root = await job.root_of(session.qemu, made) if session.qemu else None
        job.require_no_filter(made, root)
        commands = job.qmp_commands(made, session.machine, job_id(serial, request.disk), root=root)
        return made, [(command, session.machine.sent(arguments)) for command, arguments in commands]


async def run(context: Context, name: str, request: MirrorRequest, *, report: Report = unreported) -> MirrorPlan:
    """Copy; returns what was done once store, QEMU and files agree on it."""
    async with working(context, name, "mirror", removes=request.mode == "pivot") as session:
        at, found = await _survey(session, request)
        chain = at.live[request.disk]
        made = plan(at, chain, request, serial=OperationId(0), found=found)
        await _require_space(context, made, found)
        if made.nbd:
            await nbd.require_server(made.nbd)
        operation = await begin(
            session, at.basis, lambda inputs: plan(at, chain, request, serial=inputs.serial, found=found)
        )
        async with recovery.attempting(session, operation):
            await job.run(session, operation, report=report)
        return operation.plan


async def _survey(session: MachineSession, request: MirrorRequest) -> tuple[Situation, Found | None]:
    """The situation, and the image that is to be reused; refuses a place that is not free or not for this."""
    if session.machine.require_disk(request.disk).read_only:
        raise StateError(
            f"disk {request.disk} of machine {session.machine.name} is read-only and never changes",
            hint="qemu-img convert copies its image",
            machine=session.machine.name,
        )
    if session.machine.require_disk(request.disk).encryption and (
        request.reuse or is_uri(request.target) or request.format == "raw"
    ):
        raise StateError(
            f"disk {request.disk} of machine {session.machine.name} is encrypted and can only be copied to a new qcow2"
            " image with the same secret",
            hint="name a new file, without " + option("reuse") + " or a format",
            machine=session.machine.name,
        )
    if request.by == "drive-mirror":
        file_nodes.require_inherited(session.machine, [request.disk], command="drive-mirror", default="blockdev-mirror")
    if request.mode == "pivot" and not session.qemu:
        require_spec(session.machine, "make it start on the copy")
    at = await look(session, disks=(request.disk,))
    if is_uri(request.target):
        if request.reuse:
            raise UsageError("an NBD export is always overwritten: only images can be reused")
        return at, None
    _require_place(session.context.home, session.machine.name, request)
    return at, await to_read(_look_at_target, session.context.store, request)


def _require_place(home: Home, machine: str, request: MirrorRequest) -> None:
    path = Path(request.target)
    if not path.is_absolute() or ".." in path.parts or request.target.endswith("/"):
        raise UsageError(f"target {request.target!r} is not the absolute path of a file")
    # Its name becomes a backing string one day; a worker need not come up to learn that it cannot.
    if fault := header.backing_fault(request.target):
        raise ImageRefused(f"no copy can be created at {header.printable(request.target)}: {fault}")
    if not path.is_relative_to(home.machines):
        return
    if request.mode == "finish" or path.parent != home.machine_dir(machine) or re.match(r"[a-z0-9]+-\d+\.", path.name):
        raise UsageError(
            f"{header.printable(request.target)} is in a folder where qmpsnap names the layers",
            hint="choose another folder or name",
            machine=machine,
        )


def _look_at_target(store: Store, request: MirrorRequest) -> Found | None:
    path = request.target
    if layer := store.layer_at(path):
        raise _is_layer(path, layer)
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        if request.reuse:
            raise ImageRefused(
                f"there is no image {header.printable(path)} to reuse", hint="omit " + option("reuse")
            ) from None
        return None
    except OSError as error:
        raise HostCannot(f"{header.printable(path)} cannot be read: {error.strerror}") from error
    if not request.reuse:
        raise staged.taken(path)
    if stat.S_ISREG(status.st_mode):
        for layer in store.layers_of_file(*inode_of(status)):
            raise _is_layer(path, layer)
    kind = request.format or header.read(path).format
    found = header.require(path, format=kind)
    probe = Layer(id=layer_id("probe", 0), path=path, format=kind, backing=None, virtual_size=found.virtual_size)
    return Found(found, header.is_empty(probe))


def _is_layer(path: str, layer: Layer) -> StateError:
    return StateError(f"{header.printable(path)} is layer {layer.id} of this store", hint="choose another target")


async def _require_space(context: Context, made: MirrorPlan, found: Found | None) -> None:
    """Refuse before anything begins when the copy could run out of space.

    What the layers occupy together is more than the copy takes where they hold the same places: if that does not fit,
    QEMU's own tool is asked before the answer is no.
    """
    if made.nbd:
        return
    if found:  # it is overwritten, by a process that opens it anew
        await to_read(lambda: access.require_writable(made.target, ours=not made.live))
    folder = str(Path(made.target.path).parent)
    there = found.header.allocated if found else 0

    def require(needed: int) -> None:
        store = Need(str(context.home.data), free_space.STORE, "the store")
        copy = Need(folder, max(0, needed - there), "the copy")
        free_space.require([copy, store], machine=made.machine, hint="free some space there, or choose another folder")

    bound = made.moves if made.target.format == "raw" else free_space.of_image(made.target.virtual_size, made.moves)
    try:
        await to_read(require, bound)
    except HostCannot:
        if made.shallow:
            raise
        less = await measure.needed(made.chain[-1], into=made.target.format, qemu_img=context.image.binary)
        if less is None or less >= bound:
            raise
        await to_read(require, less)
