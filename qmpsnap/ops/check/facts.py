"""What `check` goes by: all that store, files and QEMU say of one machine, gathered without changing anything."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.graph import NOTHING, Beside, DiskGraph
from qmpsnap.block.image import header, snapshot_table
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.block.usage import survey
from qmpsnap.block.usage.users import User
from qmpsnap.errors import HostCannot, ImageRefused, QemuGone, QmpsnapError, StateError, StoreMismatch
from qmpsnap.host.files import Inode, same_file
from qmpsnap.host.threads import to_read
from qmpsnap.host.value import replaced
from qmpsnap.machine import adopted, agent, statefile, worker
from qmpsnap.machine.config import firmware_files
from qmpsnap.machine.starting import alive
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.model.finding import Finding
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Operation
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.ops.base import admission, home_location, volumes
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.check import entries
from qmpsnap.ops.check import references as named
from qmpsnap.ops.check.entries import Entry
from qmpsnap.ops.outside import compare, other_devices
from qmpsnap.ops.outside.other_devices import Devices
from qmpsnap.ops.session import recovery, stale_store
from qmpsnap.qmp import commands
from qmpsnap.qmp.commands import JobInfo, NodeInfo
from qmpsnap.qmp.session import Monitor
from qmpsnap.store import lock, owner
from qmpsnap.volumes.driver import Volume

AGENT_DEADLINE = 2.0
"""Seconds the agent may take to say whether the guest is frozen; one that is not there is not asked."""

LOOKS = 3
"""Times we look at a machine that somebody changes while we do."""


class Record(Struct, frozen=True, kw_only=True):
    """The store's side of a machine, with the layers of all; ``open``: operations that have not ended."""

    machine: Machine
    chains: tuple[Chain, ...]
    snapshots: tuple[Snapshot, ...]
    open: tuple[Operation, ...]
    forest: Forest


class Asked(Struct, frozen=True, kw_only=True):
    """What QEMU has answered.

    ``files``: device and inode of what its process has open, and of what its nodes name. ``frozen``: the agent says
    that the guest's file systems are; None where it was not asked or did not answer. ``agent``: a guest's agent
    listens. ``beside``: where QEMU's drives are not the machine's disks. ``devices``: where its others are not the
    machine's. ``tpm``: the emulator of its TPM, if it has one, runs.
    """

    status: str
    nodes: tuple[NodeInfo, ...]
    disks: Mapping[str, DiskGraph]
    jobs: tuple[JobInfo, ...]
    files: frozenset[Inode]
    agent: bool
    frozen: bool | None = None
    beside: Beside = NOTHING
    devices: Devices = Devices()
    tpm: bool = True


class Facts(Struct, frozen=True, kw_only=True):
    """Everything that is judged.

    Attributes:
        busy: who works on the machine now.
        older: why the store must be an old copy.
        moved: where the store believes its home to lie, if that is elsewhere.
        lost: machines that were defined and that the store does not know.
        described: the machine's record beside its images is what the store has.
        private: folders and files that must be this user's alone.
        flaws: what of the home another user can write to.
        folder: what lies in the machine's folder, and unfinished files beside layers elsewhere.
        named: those of them that the store's names lead to, of any machine: of layers and state files, in specs and
            open plans.
        read: those that the header of a layer names as its backing.
        headers: each of the machine's layers: its header, or why it cannot be read.
        tags: of each layer that a point with a tag lies in; None where they cannot be read.
        states: of each state file: what is wrong with it, as (code, sentence); None when nothing is.
        asked: None when the machine is stopped, or QEMU is ``silent``, for that reason.
        helper: a worker runs, or the emulator of a TPM without its QEMU.
        overwritten: the frozen layers that something has written to since they were frozen.
        users: of each image that somebody else has open for writing: who.
        volumes: what the machine's name is on in volume groups and clusters, as far as these answer.
    """

    record: Record
    described: bool
    private: tuple[Entry, ...]
    flaws: tuple[owner.Flaw, ...]
    folder: tuple[Entry, ...]
    named: frozenset[str]
    read: frozenset[str]
    headers: Mapping[LayerId, Header | str]
    tags: Mapping[LayerId, frozenset[str] | None]
    states: Mapping[str, tuple[str, str] | None]
    missing: tuple[str, ...]
    busy: str | None = None
    older: str | None = None
    moved: str | None = None
    lost: tuple[str, ...] = ()
    asked: Asked | None = None
    silent: str | None = None
    helper: bool = False
    overwritten: tuple[LayerId, ...] = ()
    users: Mapping[LayerId, User] = MappingProxyType({})
    volumes: tuple[Volume, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether anything may be put right by the store's record."""
        return not self.older and not self.lost and not self.moved

    def finding(
        self,
        code: str,
        text: str,
        *,
        disk: str | None = None,
        layer: Layer | None = None,
        file: str | None = None,
        repairable: bool = False,
    ) -> Finding:
        """A finding about the machine; about a layer, also its file."""
        return Finding(
            code=code,
            machine=self.record.machine.name,
            text=text,
            disk=disk,
            layer=layer.id if layer else None,
            file=file or (layer.path if layer else None),
            repairable=repairable,
        )


async def record(context: Context, name: str) -> Record:
    """The store's side of a machine."""

    def read() -> Record:
        store = context.store
        return Record(
            machine=store.machine(name),
            chains=store.chains(name),
            snapshots=store.snapshots(name),
            open=store.operations(name, only_open=True),
            forest=store.forest(),
        )

    return await blocking(read)


async def gather(context: Context, name: str, *, qemu: Monitor | None = None, own: bool = False) -> Facts:
    """Look at a machine without changing it; a QEMU that hangs is given up at its monitor's deadline."""
    before = await record(context, name)
    await volumes.activate(before.forest.layers.values())
    for _ in range(LOOKS):
        busy = None if own else lock.holder(context.home.lock(name))
        asked, silent = await _ask(context, before, qemu)
        found = await to_read(_files, context, before)
        process = context.process(before.machine)
        pid = process.pid if process else None
        look = survey.wanted(await blocking(context.store.images.read_by, name), pid, active_too=True)
        seen = await to_read(survey.look, replaced(look, ours=_ours(context, before.machine)))
        old = await blocking(stale_store.sign, context, before.machine.name, before.chains)
        made = await volumes.there(before.machine, (chain.base for chain in before.chains))
        lost = await blocking(context.store.records.lost)
        moved = await blocking(home_location.recorded_elsewhere, context.home, context.store, context.host)
        busy = busy or (None if own else lock.holder(context.home.lock(name)))
        after = await record(context, name)
        if busy or after == before:
            break
        before = after
    return replace(
        found,
        busy=busy,
        older=old,
        moved=moved,
        lost=lost,
        asked=asked,
        silent=silent,
        helper=recovery.helper_left(context, before.machine),
        users=seen.users,
        overwritten=tuple(seen.changed),
        volumes=made,
    )


def _ours(context: Context, machine: Machine) -> list[int]:
    """The machine's own processes, which may have its images open."""
    helper = worker.find(machine, context.home.run_dir(machine.name))
    return [found.pid for found in (context.process(machine), helper) if found]


async def _ask(context: Context, at: Record, qemu: Monitor | None) -> tuple[Asked | None, str | None]:
    process = context.process(at.machine)
    if process and alive.is_stopped(process.pid):
        return None, f"its QEMU (process {process.pid}) is stopped by a signal or a debugger"
    try:
        if qemu is not None:
            return await _answers(context, at, qemu), None
        async with context.monitor(at.machine) as monitor:
            return (await _answers(context, at, monitor) if monitor else None), None
    except QmpsnapError as error:
        return None, error.message


async def _answers(context: Context, at: Record, qemu: Monitor) -> Asked:
    known = frozenset(layer for chain in at.chains for layer in chain.ids)
    status = await commands.query_status(qemu)
    listening = not at.machine.adopted and await commands.agent_listens(qemu)
    jobs = await commands.query_jobs(qemu)
    if any(job.type == "stream" and job.status == "concluded" for job in jobs):
        raise StateError("a concluded stream job is not dismissed: QEMU 7.2 would crash when asked for its nodes")
    nodes = await commands.query_nodes(qemu)
    return Asked(
        status=status.status,
        nodes=nodes,
        disks=graph.by_disk(await graph.read(qemu), known),
        jobs=jobs,
        files=await to_read(_opened, context.process(at.machine), nodes),
        agent=listening,
        beside=await graph.beside(qemu, await graph.read(qemu), at.chains),
        devices=await other_devices.look(at.machine, qemu),
        frozen=await freeze_state(context, at.machine) if listening and status.running else None,
        tpm=not at.machine.spec.tpm or await to_read(firmware_files.tpm_runs, context.home.tpm(at.machine.name)),
    )


def _opened(process: Process | None, nodes: tuple[NodeInfo, ...]) -> frozenset[Inode]:
    names = named.ways(node.file for node in nodes)
    try:
        return names | (adopted.look(process.pid).files if process else frozenset())
    except (HostCannot, QemuGone):  # another user's, of which there are only names; or it has just ended
        return names


async def freeze_state(context: Context, machine: Machine) -> bool | None:
    """Whether the guest's file systems are frozen; None when its agent does not say within :data:`AGENT_DEADLINE`."""
    socket = context.home.run_dir(machine.name) / AGENT_SOCKET
    try:
        with anyio.fail_after(2 * AGENT_DEADLINE):
            async with agent.connect(socket, machine=machine.name, deadline=AGENT_DEADLINE) as guest:
                return await guest.freeze_status(deadline=AGENT_DEADLINE) == "frozen"
    except (QmpsnapError, TimeoutError):
        return None


def _files(context: Context, at: Record) -> Facts:
    home, name = context.home, at.machine.name
    layers = layers_of(at, str(home.machine_dir(name)))
    states = {found.vmstate.path: found.vmstate for found in at.snapshots if found.vmstate}
    kept = {found.variables for found in at.snapshots if found.variables}
    wanted = {path for variables in kept for path in firmware_files.copies(variables)}
    if at.machine.spec.firmware == "uefi" and not at.machine.adopted:
        wanted.add(str(home.variables(name)))
    images = [layer.path for layer in layers if Path(layer.path).parent != home.machine_dir(name)]
    ours = [
        *(layer.path for layer in layers if layer.owned),
        *states,
        *wanted,
        str(home.tpm(name)),
        str(home.record(name)),
    ]
    if at.machine.adopted:
        ours += map(str, home.active(name))
        if at.machine.own.spec.firmware == "uefi":  # a death has left it, as its owner's QEMU had ended
            ours.append(str(home.variables(name)))
    outside = [path for path in ours if Path(path).parent != home.machine_dir(name)]
    beside = (*entries.parts_beside(outside), *entries.volumes_beside(images, at.machine.uuid))
    folder = entries.once((*entries.within(home.machine_dir(name)), *beside))
    headers = {layer.id: compare.header_of(layer) for layer in layers}
    known = {*ours, *(layer.path for layer in layers)}
    strangers = [entry for entry in folder if entry.path not in known]
    # Names are asked after the folder was: what an operation has made meanwhile is in the store before it is there.
    needed = named.ways(named.by_store(context.store, home)) if strangers else frozenset()
    backing = named.ways(_backings(at, headers)) if strangers else frozenset()
    given = {disk.existing for disk in at.machine.spec.disks if disk.own}  # who may read these is their owner's choice
    places = (str(home.machine_dir(name)), str(home.run_dir(name)), *(path for path in ours if path not in given))
    trusted = admission.users(context, at.machine)
    return Facts(
        record=at,
        described=context.store.records.is_current(at.machine.name),
        private=tuple(entry for path in places if (entry := entries.entry(path, trusted))),
        flaws=tuple(owner.of_machine(home, name)),
        folder=folder,
        named=frozenset(entry.path for entry in folder if entry.path in known or entry.identity in needed),
        read=frozenset(entry.path for entry in strangers if entry.identity in backing),
        headers=headers,
        tags={layer: _tags(at.forest.layers[layer]) for layer in _tagged(at)},
        states={path: _state(state) for path, state in states.items()},
        missing=tuple(sorted(path for path in wanted if not Path(path).is_file())),
    )


def _backings(at: Record, headers: Mapping[LayerId, Header | str]) -> list[str]:
    """What the headers name, which a foreign one may do from its own folder on."""
    layers = at.forest.layers
    return [
        str(Path(layers[identity].path).parent / found.backing)
        for identity, found in headers.items()
        if not isinstance(found, str) and found.backing
    ]


def layers_of(at: Record, folder: str) -> tuple[Layer, ...]:
    """Every layer that the machine's disks and snapshots read, and those of its folder."""
    forest = at.forest
    pending = [layer.id for layer in forest.layers.values() if layer.path.startswith(f"{folder}/")]
    pending += [chain.active.id for chain in at.chains]
    pending += [point.layer for snapshot in at.snapshots for point in snapshot.points]
    found: dict[LayerId, Layer] = {}
    while pending:
        layer = forest.layers[pending.pop()]
        if layer.id not in found:
            found[layer.id] = layer
            pending += [layer.backing] if layer.backing else []
    return tuple(found.values())


def _tagged(at: Record) -> set[LayerId]:
    return {p.layer for s in at.snapshots if s.state == "ok" for p in s.points if p.tag and p.layer in at.forest.layers}


def _tags(layer: Layer) -> frozenset[str] | None:
    try:
        return snapshot_table.names(layer)
    except ImageRefused:
        return None
    except HostCannot as error:
        header.require_tellable(error)
        return None


def _state(recorded: Vmstate) -> tuple[str, str] | None:
    path = recorded.path
    try:
        state, _ = statefile.find(path)
    except HostCannot as error:
        header.require_tellable(error)
        return "state-file-missing", error.message
    except StoreMismatch as error:
        return "state-file-damaged", error.message
    if not same_file(recorded, state):
        return "state-file-replaced", f"{path} is not the recorded file"
    if state.digest != recorded.digest:
        return (
            "state-file-damaged",
            f"{path} names digest {state.digest[:12]}..., recorded is {recorded.digest[:12]}...",
        )
    return None
