"""The invariants of docs/explanation/how-it-works.md as functions: what of a machine's facts does not hold. Pure.

I2, I7 and I8 are about moments and cannot be seen afterwards; the tests hold them. I9 shows as I3: a file that was
touched is another one, or another size. I1 shows where content was recorded: in state files, and as tags.
"""

import re
import stat
from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from qmpsnap.block.graph import FILTERS
from qmpsnap.host.files import same_file
from qmpsnap.machine.starting.argv import CDROM, SEED
from qmpsnap.model.finding import Finding
from qmpsnap.model.layers.blockdev import node_name
from qmpsnap.model.machines.rbd import shown
from qmpsnap.model.names import JobId, NodeName
from qmpsnap.model.planning.layer_graph import Writer
from qmpsnap.ops.check.facts import Asked, Facts
from qmpsnap.ops.outside import compare, other_devices
from qmpsnap.store.owner import Flaw

UNSETTLED = frozenset({"postmigrate", "finish-migrate", "save-vm", "restore-vm", "inmigrate", "colo"})
"""Run states that only an operation under way has."""

FAILED = frozenset({"io-error", "internal-error", "guest-panicked"})

OUR_NODE = re.compile(r"[a-z][a-z0-9]{0,15}-\d+(\.file)?\Z")
"""A node that bears a layer's id, or the file below one."""

_FLASH = frozenset({f"{node}{end}" for node in ("uefi-code", "uefi-vars", CDROM, SEED) for end in ("", ".file")})


def judge(at: Facts) -> list[Finding]:
    """Everything that does not hold, the worst first.

    While an operation is open, what it may have left is its affair; while another controller works, all is.
    """
    if at.busy:
        return [at.finding("machine-busy", f"it is in use by {at.busy}")]
    found = [*_older(at), *_layers(at), *_snapshots(at), *_users(at), *_writers(at), *_private(at), *_described(at)]
    if at.record.open:
        return [*_operations(at), *found]
    return [*found, *_files(at), *_volumes(at), *_qemu(at), *_helper(at)]


def _older(at: Facts) -> Iterator[Finding]:
    if at.moved:
        yield at.finding("home-moved", f"the store and the headers name {at.moved} as the home")
    if at.older:
        yield at.finding("store-older", at.older)
    for name in at.lost:
        yield at.finding("machine-lost", f"machine {name} was defined before, but the store lacks it")


def _operations(at: Facts) -> Iterator[Finding]:
    for operation in at.record.open:
        text = f"operation {operation.id} ({operation.verb}) stopped at step '{operation.step}'"
        yield at.finding("operation-open", text, repairable=True)


def _layers(at: Facts) -> Iterator[Finding]:
    """I3: every layer exists, is the recorded file, of the recorded size, and its header names the recorded backing."""
    layers = at.record.forest.layers
    for identity, found in at.headers.items():
        layer = layers[identity]
        if isinstance(found, str):
            yield at.finding("layer-missing", found, layer=layer)
            continue
        if not same_file(layer, found):
            yield at.finding("layer-replaced", f"{layer.shown} is not the recorded file", layer=layer)
        for text in compare.backing_problems(layer, layers[layer.backing] if layer.backing else None, found):
            if not (at.moved and found.backing and found.backing.startswith(f"{at.moved}/")):  # told already
                yield at.finding("backing-differs", text, layer=layer)
        for text in compare.size_problems(layer, found):
            active = layer.id in (chain.active.id for chain in at.record.chains)
            grown = active and found.virtual_size > layer.virtual_size and same_file(layer, found)
            way = (
                ""
                if grown
                else f": {compare.resized(at.record.machine.name, layer, found.virtual_size, active=active)}"
            )
            yield at.finding("size-differs", f"{text}{way}", layer=layer, repairable=grown)
        if found.corrupt:
            yield at.finding("image-corrupt", f"{layer.shown} is marked corrupt", layer=layer)


def _snapshots(at: Facts) -> Iterator[Finding]:
    """I1, as far as it can be told without reading all: tags, state files and variable stores are there."""
    for snapshot in at.record.snapshots:
        for point in snapshot.points if snapshot.state == "ok" else ():
            if point.tag and point.tag not in (at.tags.get(point.layer) or ()):
                layer = at.record.forest.layers[point.layer]
                text = f"{layer.shown} lacks tag {point.tag} of disk {point.disk} in snapshot {snapshot.name}"
                yield at.finding("tag-missing", text, disk=point.disk, layer=layer)
        if snapshot.vmstate and (problem := at.states[snapshot.vmstate.path]):
            code, text = problem
            yield at.finding(code, f"snapshot {snapshot.name}: {text}", file=snapshot.vmstate.path)
    for path in at.missing:
        yield at.finding("variables-missing", f"there is no {path}", file=path)


def _users(at: Facts) -> Iterator[Finding]:
    """I4, beyond our own machines: who has an image open that nobody may write to."""
    for identity, user in at.users.items():
        layer = at.record.forest.layers[identity]
        yield at.finding("image-in-use", f"{layer.shown} {user.does} {user.who}", layer=layer)
    for identity in at.overwritten:
        layer = at.record.forest.layers[identity]
        text = f"{layer.shown} has changed in time, size, header or tables since it was frozen"
        yield at.finding("frozen-written", text, layer=layer)


def _writers(at: Facts) -> Iterator[Finding]:
    """I4, by the record: a layer that a guest writes to has no other reader."""
    consumed = {found.name for found in at.record.snapshots if found.state == "consumed"}
    read_only = {disk.name for disk in at.record.machine.spec.disks if disk.read_only}
    for chain in at.record.chains:
        layer = chain.active
        writer = Writer(at.record.machine.name, chain.disk, layer.id)
        others = at.record.forest.sharers(writer, consumed=consumed)
        if others and chain.disk not in read_only:
            text = f"{layer.shown} is written to by disk {chain.disk} and read by {', '.join(others)}"
            yield at.finding("writable-shared", text, disk=chain.disk, layer=layer)


def owned(machine: str, flaws: Iterable[Flaw]) -> Iterator[Finding]:
    """What of the home another user can write to, as findings of a machine."""
    for flaw in flaws:
        yield Finding(
            code="home-open",
            machine=machine,
            text=f"{flaw.text}: {flaw.remedy}",
            file=flaw.path,
            repairable=not flaw.foreign and not flaw.above,
        )


def _private(at: Facts) -> Iterator[Finding]:
    yield from owned(at.record.machine.name, at.flaws)
    for entry in at.private:
        if entry.is_open:
            text = f"{entry.path} has mode {stat.S_IMODE(entry.mode):04o}"
            yield at.finding("mode-open", text, file=entry.path, repairable=True)


def _described(at: Facts) -> Iterator[Finding]:
    if not at.described and not at.older:
        yield at.finding("record-missing", "a lost store could not be rebuilt as it is now", repairable=True)


def _files(at: Facts) -> Iterator[Finding]:
    """I3 and I6: every file in the machine's folder has its place in the record, and none is unfinished."""
    layers = {(layer.device, layer.inode): layer for layer in at.record.forest.layers.values()}
    states = {(s.vmstate.device, s.vmstate.inode) for s in at.record.snapshots if s.vmstate}
    opened = at.asked.files if at.asked else frozenset()
    for entry in at.folder:
        if entry.path in at.named:
            continue
        layer = layers.get(entry.identity)
        used = layer or entry.identity in states or entry.identity in opened or entry.path in at.read
        # What somebody still reads, what is ours by another name, or what a newer store knew, is left where it is.
        movable = not (at.older or at.silent or used)
        if layer:
            text = f"{entry.path} is layer {layer.id}, recorded at {layer.shown}"
            yield at.finding("unreferenced-file", text, file=entry.path)
        elif entry.path.endswith(".part"):
            yield at.finding("part-left", f"{entry.path} is unfinished", file=entry.path, repairable=movable)
        else:
            text = f"{entry.path} is not in the store"
            yield at.finding("unreferenced-file", text, file=entry.path, repairable=movable)


def _volumes(at: Facts) -> Iterator[Finding]:
    """I6 where no folder shows it: every snapshot and clone of the machine's storage has its place in the record."""
    layers = {layer.path: layer for layer in at.record.forest.layers.values()}
    for volume in at.volumes:
        layer = layers.get(volume.path)
        if layer and volume.state == "invalid":
            yield at.finding("volume-invalid", f"{layer.shown} has run full, and its content is lost", layer=layer)
        elif layer is None:
            part = volume.state == "part"
            text = f"{shown(volume.path)} is {'unfinished' if part else 'not in the store'}"
            yield at.finding("volume-left", text, file=volume.path, repairable=part and not at.older and not at.silent)


def _qemu(at: Facts) -> Iterator[Finding]:
    """I4, I5, I6 and I10 in the QEMU that runs: its graph, what it has open, its jobs, its guest."""
    asked = at.asked
    if asked is None:
        if at.silent:
            yield at.finding("monitor-silent", at.silent)
        return
    for chain in at.record.chains:
        disk = asked.disks.get(chain.disk)
        if chain.disk in asked.beside.unplugged:
            text = f"disk {chain.disk} is not attached to the guest"
            yield at.finding("disk-unplugged", text, disk=chain.disk, layer=chain.active)
        elif disk is None or disk.nodes != chain.ids:
            seen = " <- ".join(disk.nodes) if disk and disk.nodes else "unknown to the store"
            text = f"disk {chain.disk}: QEMU's chain is {seen}, the store's {' <- '.join(chain.ids)}"
            yield at.finding("graph-differs", text, disk=chain.disk, layer=chain.active)
        elif strangers := [node for node in asked.nodes if node.node_name in disk.above and node.drv not in FILTERS]:
            text = f"disk {chain.disk}: the guest writes to {strangers[0].file}, a node that another client inserted"
            yield at.finding("graph-differs", text, disk=chain.disk, layer=chain.active)
    yield from _nodes(at)
    yield from _attached(at)
    for job in asked.jobs:
        ours = job.id.startswith("qs.") and job.status == "concluded"
        left = at.finding("job-left", f"job {job.id} ({job.type}) is {job.status}", repairable=ours)
        yield replace(left, job=JobId(job.id))
    yield from _guest(at, asked)


def _guest(at: Facts, asked: Asked) -> Iterator[Finding]:
    """I10: the guest goes on, with all that it needs."""
    if asked.frozen:
        yield at.finding("guest-frozen", "the guest agent reports frozen file systems", repairable=True)
    if not asked.tpm:
        yield at.finding("tpm-ended", "swtpm has ended, and the guest's TPM with it, until the machine is started anew")
    if asked.status in UNSETTLED | FAILED:
        yield at.finding("guest-held", f"QEMU's run state is {asked.status}")


def _nodes(at: Facts) -> Iterator[Finding]:
    asked, machine = at.asked, at.record.machine
    assert asked is not None
    layers = {node_name(layer): layer for chain in at.record.chains for layer in chain.layers}
    read_only = {disk.name for disk in machine.spec.disks if disk.read_only}
    active = {node_name(chain.active) for chain in at.record.chains if chain.disk not in read_only}
    filters = {name for disk in asked.disks.values() for name in disk.above}
    for node in asked.nodes:
        name = node.node_name
        layer = layers.get(name.removesuffix(".file"))  # type: ignore[call-overload]
        if layer is not None:
            # The file below a layer that a guest writes to is written to as well.
            if not node.ro and name.removesuffix(".file") not in active:
                yield at.finding("writable-frozen", f"QEMU has {layer.shown} open for writing", layer=layer)
            continue
        ours = OUR_NODE.match(name) is not None
        # In an adopted QEMU only nodes and jobs with qmpsnap's names can be judged.
        if name in _FLASH or name in filters or (machine.adopted and not ours):
            continue
        if not name.endswith(".file") or not ours:
            text = f"QEMU has node {name} ({node.file}) open"
            left = at.finding("node-left", text, file=node.file, repairable=ours)
            yield replace(left, node=NodeName(name))


def _attached(at: Facts) -> Iterator[Finding]:
    """Devices that others have added or taken: what the guest writes to that no snapshot has, other ones, cards.

    An adoption has told of what it has left out.
    """
    assert at.asked is not None
    known = at.record.machine.adopted.left_out if at.record.machine.adopted else ()
    for other in at.asked.beside.others:
        if other.name not in known:
            yield at.finding("disk-attached", other.sentence, file=other.file)
    told = {other.name for other in at.asked.beside.others}
    for name, driver in at.asked.devices.plugged:
        if name not in told:
            yield at.finding("device-attached", f"QEMU has device {name} ({driver}), which somebody has plugged in")
    for number in at.asked.devices.cards:
        yield at.finding("nic-unplugged", other_devices.lost(at.record.machine, number))


def _helper(at: Facts) -> Iterator[Finding]:
    if at.helper:
        text = "a helper still has files of the machine open: a QEMU without a guest, or a TPM without its QEMU"
        yield at.finding("worker-left", text, repairable=True)
