"""The QMP commands qmpsnap uses, one function each, with typed answers.

Each names its QAPI command. Answers are decoded by msgspec at this border: wire data that is not what QEMU's schema
says becomes a ``QmpError``, never an ``AttributeError`` further up.
"""

import re
from typing import Any, Final, Literal, TypeVar

import msgspec
from msgspec import Struct, field

from qmpsnap.errors import QmpError
from qmpsnap.model.names import NodeName
from qmpsnap.qmp import runstate
from qmpsnap.qmp.session import COMMAND_DEADLINE, Monitor

T = TypeVar("T")

# A device with an id gives its backend that id; virtio-pci's disk is a child of the device and has only a path.
DEVICE: Final = re.compile(r"(?:/machine/peripheral/)?([^/]+)(?:/|$)")

_FLASH: Final = re.compile(r"pflash\d+$")


class RunStatus(Struct, frozen=True):
    """QAPI ``StatusInfo``: ``status`` is one of QEMU's RunState names (running, paused, prelaunch ...)."""

    status: str
    running: bool

    @property
    def live(self) -> bool:
        """Nobody has stopped the guest: it runs, or it sleeps and may wake at any moment."""
        return self.running or self.status == runstate.SUSPENDED


class GraphNode(Struct, frozen=True):
    """A vertex of QEMU's block graph: a node, a device's backend or a job."""

    id: int
    type: str
    name: str


class GraphEdge(Struct, frozen=True):
    """An edge of QEMU's block graph: ``parent`` uses ``child`` as its ``name`` (``backing``, ``file``, ``root`` ...).

    ``perm``: QAPI ``BlockPermission`` names: what the parent may do (``consistent-read``, ``write`` ...).
    """

    parent: int
    child: int
    name: str
    perm: tuple[str, ...] = ()


class Chardev(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``ChardevInfo`` we use; ``frontend_open``: the device, or its guest, listens."""

    label: str
    frontend_open: bool


class BlockGraph(Struct, frozen=True):
    """QAPI ``XDbgBlockGraph``."""

    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]


class Tag(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``SnapshotInfo`` we use: a snapshot inside an image."""

    name: str
    vm_state_size: int = 0


class ImageInfo(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``ImageInfo`` we use; sizes in bytes."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int = 0
    snapshots: tuple[Tag, ...] = ()


class CacheInfo(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``BlockdevCacheInfo`` we use."""

    direct: bool = False
    no_flush: bool = False


class NodeInfo(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``BlockDeviceInfo`` we use."""

    node_name: str
    ro: bool
    drv: str
    file: str
    image: ImageInfo
    backing_file: str | None = field(name="backing_file", default=None)
    cache: CacheInfo = CacheInfo()
    detect_zeroes: str = field(name="detect_zeroes", default="off")


class Backend(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``BlockInfo`` we use.

    ``device`` is the drive's id, empty for a device whose image is a node of its own; ``qdev`` id or QOM path of the
    device, None when no device uses the drive; ``inserted`` the node that it reads, None for an empty drive;
    ``io_status``: ``ok``, or ``failed`` or ``nospace`` after an error for which QEMU has paused the guest.
    """

    device: str
    qdev: str | None = None
    removable: bool = False
    inserted: NodeInfo | None = None
    io_status: str = "ok"

    @property
    def name(self) -> str:
        """Its name in the block graph."""
        return self.device or self.qdev or ""

    @property
    def shown(self) -> str:
        """The id of its device, if that has one; else its name."""
        found = DEVICE.match(self.qdev or "")
        return found[1] if found else self.name

    @property
    def is_flash(self) -> bool:
        """Whether it is a flash chip: firmware, or its variables, which are part of the guest's memory."""
        return bool(_FLASH.match(self.device)) or (self.qdev or "").startswith("/machine/system.flash")


class JobInfo(Struct, frozen=True, rename="kebab"):
    """QAPI ``JobInfo``; ``error`` is set once it has concluded in failure, progress is in bytes."""

    id: str
    type: str
    status: str
    current_progress: int = 0
    total_progress: int = 0
    error: str | None = None


class BlockJobInfo(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``BlockJobInfo`` we use; ``io_status`` is ``ok``, ``failed`` or ``nospace``.

    ``speed``: bytes per second it may copy, 0 without limit.
    """

    device: str
    io_status: str = "ok"
    speed: int = 0


class _Version(Struct, frozen=True):
    class Triple(Struct, frozen=True):
        major: int
        minor: int
        micro: int

    qemu: Triple


class _CpuModel(Struct, frozen=True):
    props: dict[str, bool | int | str]


class _Expansion(Struct, frozen=True):
    model: _CpuModel


class _Property(Struct, frozen=True):
    name: str


class _Uuid(Struct, frozen=True):
    UUID: str


class _Memory(Struct, frozen=True, rename="kebab"):
    base_memory: int


class _Kvm(Struct, frozen=True):
    enabled: bool


class _CpuDefinition(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``CpuDefinitionInfo`` we use."""

    name: str


class MachineType(Struct, frozen=True):
    """The part of QAPI ``MachineInfo`` we use; ``alias`` is set on the newest version of a family."""

    name: str
    alias: str | None = None


async def query_status(monitor: Monitor) -> RunStatus:
    """Whether the guest runs (``query-status``)."""
    return await ask(monitor, "query-status", RunStatus)


async def run_state(monitor: Monitor) -> str:
    """QEMU's word for the run state, or why it has paused the guest itself; see :mod:`qmpsnap.qmp.runstate`."""
    status = (await query_status(monitor)).status
    if status != runstate.IO_ERROR:
        return status
    return runstate.worded(status, [backend.io_status for backend in await query_block(monitor)])


async def query_uuid(monitor: Monitor) -> str:
    """The machine's UUID as given by ``-uuid`` (``query-uuid``)."""
    return (await ask(monitor, "query-uuid", _Uuid)).UUID


async def query_version(monitor: Monitor) -> str:
    """QEMU's version, as ``7.2.22`` (``query-version``)."""
    triple = (await ask(monitor, "query-version", _Version)).qemu
    return f"{triple.major}.{triple.minor}.{triple.micro}"


async def query_machines(monitor: Monitor) -> tuple[MachineType, ...]:
    """The machine types this QEMU has (``query-machines``)."""
    return await ask(monitor, "query-machines", tuple[MachineType, ...])


async def has_device(monitor: Monitor, name: str) -> bool:
    """Whether this QEMU was built with that device (``device-list-properties``).

    ``qom-list-types`` would load every module of QEMU that it finds, of another build as well, and 11.1 aborts then.
    """
    try:
        return bool(await ask(monitor, "device-list-properties", tuple[_Property, ...], {"typename": name}))
    except QmpError:
        return False


async def query_cpu_models(monitor: Monitor) -> tuple[str, ...]:
    """The names of the CPU models that this QEMU has (``query-cpu-definitions``)."""
    return tuple(found.name for found in await ask(monitor, "query-cpu-definitions", tuple[_CpuDefinition, ...]))


async def expand_cpu(monitor: Monitor, model: str) -> dict[str, bool | int | str]:
    """What a CPU model is now, in properties of the static model (``query-cpu-model-expansion``)."""
    arguments = {"type": "static", "model": {"name": model}}
    return (await ask(monitor, "query-cpu-model-expansion", _Expansion, arguments)).model.props


async def query_jobs(monitor: Monitor, *, deadline: float = COMMAND_DEADLINE) -> tuple[JobInfo, ...]:
    """Every job QEMU has and nobody dismissed (``query-jobs``); ``deadline`` seconds for the answer."""
    return await ask(monitor, "query-jobs", tuple[JobInfo, ...], deadline=deadline)


async def query_block_jobs(monitor: Monitor) -> tuple[BlockJobInfo, ...]:
    """Every block job (``query-block-jobs``), for what only it tells: whether a write failed."""
    return await ask(monitor, "query-block-jobs", tuple[BlockJobInfo, ...])


async def query_block(monitor: Monitor) -> tuple[Backend, ...]:
    """Every drive of the guest (``query-block``)."""
    return await ask(monitor, "query-block", tuple[Backend, ...])


async def agent_listens(monitor: Monitor) -> bool:
    """Whether something in the guest has the agent's port open (``query-chardev``, our chardev ``agent``)."""
    found = await ask(monitor, "query-chardev", tuple[Chardev, ...])
    return any(at.label == "agent" and at.frontend_open for at in found)


async def query_memory(monitor: Monitor) -> int:
    """The guest's memory at its start, in bytes (``query-memory-size-summary``)."""
    return (await ask(monitor, "query-memory-size-summary", _Memory)).base_memory


async def query_cpus(monitor: Monitor) -> int:
    """How many vCPUs the guest has (``query-cpus-fast``)."""
    return len(await ask(monitor, "query-cpus-fast", tuple[dict[str, Any], ...]))


async def query_kvm(monitor: Monitor) -> bool:
    """Whether KVM runs the guest (``query-kvm``)."""
    return (await ask(monitor, "query-kvm", _Kvm)).enabled


async def machine_type(monitor: Monitor) -> str:
    """The versioned machine type of this very machine (``qom-get``)."""
    return (await ask(monitor, "qom-get", str, {"path": "/machine", "property": "type"})).removesuffix("-machine")


async def query_block_graph(monitor: Monitor) -> BlockGraph:
    """Who reads whom (``x-debug-query-block-graph``; why this one: docs/decisions/0001)."""
    return await ask(monitor, "x-debug-query-block-graph", BlockGraph)


async def query_nodes(monitor: Monitor) -> tuple[NodeInfo, ...]:
    """Every named block node (``query-named-block-nodes``), flat: nested, the answer outgrows the client's buffer."""
    return await ask(monitor, "query-named-block-nodes", tuple[NodeInfo, ...], {"flat": True})


async def blockdev_add(monitor: Monitor, options: dict[str, Any]) -> None:
    """Open an image as a node (``blockdev-add``); ``options`` from :mod:`qmpsnap.model.layers.blockdev`."""
    await monitor.execute("blockdev-add", options)


async def blockdev_reopen(monitor: Monitor, options: dict[str, Any]) -> None:
    """Give an open node other options (``blockdev-reopen``); all that are not named go back to their defaults."""
    await monitor.execute("blockdev-reopen", {"options": [options]})


async def blockdev_del(monitor: Monitor, node: NodeName) -> None:
    """Close a node nobody uses (``blockdev-del``)."""
    await monitor.execute("blockdev-del", {"node-name": node})


def block_resize(node: NodeName, size: int) -> tuple[str, dict[str, Any]]:
    """``block_resize`` and its arguments: the guest sees ``size`` bytes of the image from then on, and is told."""
    return "block_resize", {"node-name": node, "size": size}


async def query_tags(monitor: Monitor) -> dict[str, tuple[Tag, ...]]:
    """The snapshots inside the image of each named node, by the node's name (``query-named-block-nodes``)."""
    return {node.node_name: node.image.snapshots for node in await query_nodes(monitor)}


async def delete_tag(monitor: Monitor, node: NodeName, tag: str) -> None:
    """Remove a snapshot from the image of a node that a device has (``blockdev-snapshot-delete-internal-sync``)."""
    await monitor.execute("blockdev-snapshot-delete-internal-sync", {"device": node, "name": tag})


async def transaction(monitor: Monitor, arguments: dict[str, Any], *, deadline: float = COMMAND_DEADLINE) -> None:
    """Run a ``transaction``; it waits for requests in flight, hence its own deadline in seconds."""
    await monitor.execute("transaction", arguments, deadline=deadline)


async def control(
    monitor: Monitor, command: Literal["cont", "stop", "system_powerdown", "system_wakeup", "quit"]
) -> None:
    """``cont``, ``stop``, ``system_powerdown`` (the power button), ``system_wakeup`` or ``quit``."""
    await monitor.execute(command)


class _Filter(Struct, frozen=True, rename="kebab"):
    main_mac: str


async def mac_of(monitor: Monitor, card: str) -> str | None:
    """The MAC address that the guest has given a network card (``query-rx-filter``); None of one without a filter."""
    try:
        found = await ask(monitor, "query-rx-filter", tuple[_Filter, ...], {"name": card})
    except QmpError:
        return None
    return found[0].main_mac if found else None


async def set_link(monitor: Monitor, backend: str, *, up: bool) -> None:
    """Plug a network card's cable in, or pull it (``set_link``)."""
    await monitor.execute("set_link", {"name": backend, "up": up})


async def announce_self(monitor: Monitor) -> None:
    """Let the network cards tell the switches where they are (``announce-self``), five times in half a second."""
    await monitor.execute("announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100})


async def ask(
    monitor: Monitor,
    command: str,
    kind: type[T],
    arguments: dict[str, Any] | None = None,
    *,
    deadline: float = COMMAND_DEADLINE,
) -> T:
    """Run a command that answers with a value; ``QmpError`` where that is not what QEMU's schema says."""
    answer = await monitor.execute(command, arguments, deadline=deadline)
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise QmpError(f"QEMU's answer to {command} does not match its schema: {error}", effect="none") from error
