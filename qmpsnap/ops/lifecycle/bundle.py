"""``machine export`` and ``import bundle``: a stopped machine with all its snapshots in one file, and back."""

import contextlib
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image import header
from qmpsnap.block.image.backing import set_backing
from qmpsnap.errors import HostCannot, StateError, StoreMismatch, UsageError
from qmpsnap.hint import call, option
from qmpsnap.host import files
from qmpsnap.host.files import FileId, sync_folder
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine import bundle
from qmpsnap.machine.bundle import Source, Unpacked
from qmpsnap.machine.config import firmware_files
from qmpsnap.model.home import TPM, Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import LayerId, OperationId, check_name, layer_disk, layer_id, tag_number
from qmpsnap.model.operations.operation import Change, DefinePlan, Operation
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.ops.base import free_space, luks, vmgenid
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, forget_places, locked, require_folder, require_spec
from qmpsnap.ops.base.free_space import Need
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import require_free
from qmpsnap.ops.lifecycle import define
from qmpsnap.ops.outside import other_programs
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.session import begin, require_settled, working
from qmpsnap.store.records import Record


class Contents(Struct, frozen=True, kw_only=True):
    """What a bundle says: the machine's record as it was, and which of its files come in which order.

    ``files``: as the record names them; an empty name is the UEFI variable store of the machine itself.
    """

    record: Record
    files: tuple[str, ...]


class Told(Struct, frozen=True):
    """A machine in a bundle, by its own words: what it is called, its snapshots, and how many files it has."""

    name: str
    snapshots: tuple[str, ...]
    files: int


# --- out --------------------------------------------------------------------------------------------------------------


async def export(context: Context, name: str, target: Path) -> int:
    """Write a bundle of a stopped machine; returns its bytes.

    Raises:
        StateError: it runs or was adopted, a disk is no file, or there is a file of that name.
        StoreMismatch: a file is not the recorded one.
    """
    async with working(context, name, "export") as session:
        if session.qemu:
            raise StateError(f"machine {name} is running", hint=call("stop", name), machine=name)
        require_spec(session.machine, "export it")
        record = await blocking(lambda: context.store.records.of(name, earlier=None))
        named: dict[str, Source] = {layer.path: Source(layer.path, layer) for layer in record.layers}
        for snapshot in record.snapshots:
            if snapshot.vmstate:
                named[snapshot.vmstate.path] = Source(snapshot.vmstate.path, snapshot.vmstate)
            for copy in firmware_files.copies(snapshot.variables) if snapshot.variables else ():
                named[copy] = Source(copy)
        if record.machine.spec.firmware == "uefi":
            named[""] = Source(str(context.home.variables(name)))
            if (state := context.home.tpm(name) / firmware_files.STATE).exists():
                named[TPM] = Source(str(state))
        await to_read(_require_files, record, name)
        await other_programs.require_free([layer.path for layer in record.layers], machine=name)
        contents = msgspec.json.encode(Contents(record=record, files=tuple(named)))
        return await to_end(bundle.write, str(target.absolute()), contents, tuple(named.values()))


def _require_files(record: Record, name: str) -> None:
    for layer in record.layers:
        try:
            mode = Path(layer.path).lstat().st_mode
        except OSError as error:
            raise HostCannot(f"{layer.path} cannot be read: {error.strerror}", machine=name) from error
        if not stat.S_ISREG(mode):
            raise StateError(
                f"layer {layer.id} of machine {name} is {layer.path}, which is not a file",
                hint="copy the disk into a file first, by a mirror with a pivot",
                machine=name,
            )


# --- back -------------------------------------------------------------------------------------------------------------


async def preview(context: Context, path: Path, *, name: str | None) -> Told:
    """What :func:`unpack` would define; only the beginning of the bundle is read."""
    contents = await to_read(_contents, path)
    wanted = check_name(name or contents.record.machine.name, "machine")
    await require_settled(context, wanted)
    await define.require_new(context, wanted)
    await define.require_free_uuid(context, wanted, contents.record.machine.uuid)
    return Told(wanted, tuple(one.name for one in contents.record.snapshots), len(contents.files))


async def unpack(context: Context, path: Path, *, name: str | None, allow_extra: bool) -> Machine:
    """Define the machine that a bundle has; returns it as recorded.

    Its files are published and the machine is recorded after the last byte was compared with the bundle's digest.

    Raises:
        StoreMismatch: it is no bundle, or damaged.
        NameTaken: there is a machine of that name.
        StateError: there is a machine with its UUID.
    """
    wanted = check_name(name or (await to_read(_contents, path)).record.machine.name, "machine")
    async with locked(context, wanted, "import"):
        await define.end_earlier(context, wanted)
        folder, was_there = context.home.unpacked(wanted), context.home.run_dir(wanted).exists()
        try:
            await to_end(_make_anew, folder)
            size = (await to_read(path.stat)).st_size
            await to_read(lambda: free_space.require([Need(str(folder), size, "the machine")], machine=wanted))
            found = await to_end(bundle.unpack, str(path), str(folder))
            return await _record(context, wanted, found, allow_extra=allow_extra)
        except BaseException:
            forget_places(context.home, wanted, run=not was_there)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of one that died
    files.make_folder(folder)


def _contents(path: Path) -> Contents:
    return _decoded(bundle.manifest_of(str(path)), path)


def _decoded(manifest: bytes, path: Path) -> Contents:
    try:
        return msgspec.json.decode(manifest, type=Contents)
    except msgspec.MsgspecError as error:
        raise StoreMismatch(f"{path} is damaged, or another qmpsnap's: {error}") from error


async def _record(context: Context, name: str, found: Unpacked, *, allow_extra: bool) -> Machine:
    contents = _decoded(found.manifest, Path(found.files[0] if found.files else "."))
    old = contents.record
    if len(found.files) != len(contents.files):
        raise StoreMismatch("the bundle has other files than it says")
    await define.require_free_uuid(context, name, old.machine.uuid)
    basis = await context.astore.basis(name)
    staged = dict(zip(contents.files, found.files, strict=True))
    await to_read(_require_images, old, staged)
    spec = _spec(name, old, context.home)
    if spec.extra and not allow_extra:
        raise UsageError(
            f"machine {name} has 'extra' QEMU arguments, which can override every protection",
            hint="accept them with " + option("allow_extra"),
        )
    machine = Machine(
        name=name,
        uuid=old.machine.uuid,
        host=context.host,
        spec=spec,
        created=time.time(),
        consent=define.agreed(spec),
        vmgenid=vmgenid.new() if old.machine.vmgenid else None,  # its memory has the device, or has not
    )
    move: dict[str, str] = {}

    def make(at: PlanInputs) -> DefinePlan:
        move.clear()
        planned = plan(machine, old, staged, at, move)
        require_free(move.values())
        return planned

    session = MachineSession(context, machine)
    following = await context.astore.next_serial()
    operation = await begin(session, basis, make, serials=_serials(old, following))
    async with recovery.attempting(session, operation):
        await _publish(context, operation, move)
    return await context.astore.machine(name)


def _serials(old: Record, following: int) -> int:
    """How many numbers the operation takes: one for each file, and all up to the last one of the tags inside."""
    tags = [tag_number(point.tag) or 0 for one in old.snapshots for point in one.points if point.tag]
    return max(len(old.layers) + len(old.snapshots) + 1, max(tags, default=0) - following + 1)


def plan(machine: Machine, old: Record, staged: dict[str, str], at: PlanInputs, move: dict[str, str]) -> DefinePlan:
    """What will be recorded; ``move`` gets for each staged file the name that it will have."""
    folder = at.home.machine_dir(machine.name)
    numbers = iter(range(at.serial, at.serial + len(old.layers) + len(old.snapshots) + 1))
    ids = {layer.id: layer_id(layer_disk(layer.id) or "disk", next(numbers)) for layer in old.layers}

    def placed(original: str, path: Path) -> tuple[str, FileId]:
        move[staged[original]] = str(path)
        identity = FileId.at(staged[original])
        if identity is None:
            raise StoreMismatch(f"{staged[original]} was removed while it was imported")
        return str(path), identity

    layers = []
    for layer in old.layers:
        path, file = placed(layer.path, folder / f"{ids[layer.id]}.{layer.format}")
        backing = ids[layer.backing] if layer.backing else None
        layers.append(
            replace(
                layer, id=ids[layer.id], path=path, backing=backing, owned=True,
                device=file.device, inode=file.inode, birth=file.birth,
            )
        )  # fmt: skip
    snapshots = [
        _snapshot(one, ids=ids, at=at, number=OperationId(next(numbers)), machine=machine.name, placed=placed)
        for one in old.snapshots
    ]
    if "" in staged:
        placed("", at.home.variables(machine.name))
    if TPM in staged:
        placed(TPM, at.home.tpm(machine.name) / firmware_files.STATE)
    return DefinePlan(
        machine=machine.name,
        images=(),
        overlays=(),
        variables=str(at.home.variables(machine.name)) if "" in staged else None,
        change=Change(
            define=machine,
            layers=tuple(layers),
            active={disk: ids[layer] for disk, layer in old.active.items()},
            snapshots=tuple(snapshots),
            current=old.machine.current,
        ),
    )


def _snapshot(
    one: Snapshot,
    *,
    ids: dict[LayerId, LayerId],
    at: PlanInputs,
    number: OperationId,
    machine: str,
    placed: Callable[[str, Path], tuple[str, FileId]],
) -> Snapshot:
    state, variables = one.vmstate, one.variables
    if state:
        path, file = placed(state.path, at.home.machine_dir(machine) / f"memory-{number}.vmstate")
        state = replace(state, path=path, device=file.device, inode=file.inode, birth=file.birth)
    if variables:
        old = firmware_files.copies(variables)
        new = firmware_files.copies(str(at.home.variables_copy(machine, number, tpm=len(old) > 1)))
        for source, target in zip(old, new, strict=True):
            placed(source, Path(target))
        variables = new[0]
    return replace(
        one,
        points=tuple(replace(point, layer=ids[point.layer]) for point in one.points),
        operation=at.serial,
        vmstate=state,
        inside=replace(one.inside, layer=ids[one.inside.layer]) if one.inside else None,
        variables=variables,
    )


def _spec(name: str, old: Record, home: Home) -> MachineSpec:
    """The machine's spec, held to the rules of a file: a bundle may be anybody's."""
    from qmpsnap.machine.config import specfile  # YAML is slow to load

    sizes = {
        disk: next(layer.virtual_size for layer in old.layers if layer.id == top) for disk, top in old.active.items()
    }
    disks = tuple(
        replace(disk, image=None, base=None, own=False, size=sizes[disk.name]) for disk in old.machine.spec.disks
    )
    spec = replace(old.machine.spec, name=name, disks=disks, tcg_cpu="")
    cpu = old.machine.spec.tcg_cpu if old.machine.spec.tcg_cpu.isprintable() else ""  # one word of QEMU's, whatever
    found = specfile.checked(spec, folder=Path("/"), guest_dir=home.guest)
    return replace(found, tcg_cpu=cpu).plugged_as(old.machine.spec)


def _require_images(old: Record, staged: dict[str, str]) -> None:
    """Make sure that a proven bundle names what it has, and that its images are what they are said to be."""
    known = {layer.id for layer in old.layers}
    needed = [*old.active.values(), *(point.layer for one in old.snapshots for point in one.points)]
    needed += [layer.backing for layer in old.layers if layer.backing]
    paths = [layer.path for layer in old.layers]
    paths += [path for one in old.snapshots if one.variables for path in firmware_files.copies(one.variables)]
    paths += [one.vmstate.path for one in old.snapshots if one.vmstate]
    disks = {disk.name for disk in old.machine.spec.disks}
    if not known.issuperset(needed) or not staged.keys() >= {*paths} or disks != old.active.keys():
        raise StoreMismatch("the bundle lacks what its machine needs")
    for one in old.snapshots:
        check_name(one.name, "snapshot")
    for layer in old.layers:
        found = header.read(staged[layer.path], format=layer.format)
        if found.virtual_size != layer.virtual_size:
            raise StoreMismatch(f"the image of layer {layer.id} in the bundle has another size than its record")


async def _publish(context: Context, operation: Operation[DefinePlan], move: dict[str, str]) -> None:
    planned = operation.plan
    folder = context.home.machine_dir(planned.machine)
    await to_read(require_folder, context.home, planned.machine)

    def publish() -> None:
        files.make_folder(folder)
        for part, path in move.items():
            files.make_folder(Path(path).parent)
            Path(part).rename(path)
        for each in {Path(path).parent for path in move.values()}:
            sync_folder(each)

    await to_end(publish)
    layers = {layer.id: layer for layer in planned.change.layers}
    assert planned.change.define
    for layer in planned.change.layers:
        if layer.format == "qcow2":
            await _point_to(context, planned.change.define, layer, layers[layer.backing] if layer.backing else None)
    await context.astore.settle(operation.id, planned.machine, planned.change)


async def _point_to(context: Context, machine: Machine, layer: Layer, backing: Layer | None) -> None:
    """Let a layer's header name the layer below where that lies now."""
    disk = machine.disk_of_layers(layer_disk(layer.id) or "")
    async with contextlib.AsyncExitStack() as stack:
        key = await stack.enter_async_context(luks.for_images(context, machine.name, disk)) if disk else None
        await set_backing(layer, backing, qemu_img=context.image.binary, key=key)
