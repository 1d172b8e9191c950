"""QEMU's block graph, read as chains of our layers.

Node names are layer ids, so names alone show which image is where. A node between a device and its first layer must be
a filter (throttle, a job's own); any other is an image that another client inserted.
"""

from collections.abc import Mapping, Sequence

from msgspec import Struct

from qmpsnap.errors import StateError, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Outside
from qmpsnap.qmp import commands
from qmpsnap.qmp.commands import DEVICE, Backend, BlockGraph, GraphNode
from qmpsnap.qmp.session import Monitor

FILTERS = frozenset(
    {
        "throttle",
        "copy-on-read",
        "mirror_top",
        "commit_top",
        "backup-top",
        "copy-before-write",
        "preallocate",
        "compress",
    }
)
"""Drivers that pass requests through and hold no data."""


class DiskGraph(Struct, frozen=True):
    """What QEMU has behind one device.

    ``nodes`` are node names base first, as far as ``backing`` leads; the last is where the guest writes. ``above``:
    nodes between the device and that one: filters, or images we do not know. ``jobs``: block jobs that hold any of the
    nodes.
    """

    nodes: tuple[str, ...]
    above: tuple[str, ...]
    jobs: tuple[str, ...]


class Beside(Struct, frozen=True):
    """Where QEMU's devices are not the machine's disks; ``names`` are those that its nodes and drives have.

    ``others``: what the guest writes to besides, as somebody has attached it or ``adopt`` has left it out.
    ``unplugged``: disks of the machine that QEMU has no device for, and nobody else writes to.
    """

    others: tuple[Outside, ...] = ()
    unplugged: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


NOTHING = Beside()
"""QEMU's devices and the machine's disks are the same, or no QEMU runs."""


async def read(monitor: Monitor) -> BlockGraph:
    """QEMU's graph as it is now (``x-debug-query-block-graph``)."""
    return await commands.query_block_graph(monitor)


def taken_names(graph: BlockGraph) -> frozenset[str]:
    """The names that no new node can have: those of nodes and of drives, which share one space of names."""
    return frozenset(node.name for node in graph.nodes if node.type in {"block-driver", "block-backend"})


def node_names(graph: BlockGraph) -> frozenset[str]:
    """The names of all block nodes, in use or not."""
    return frozenset(node.name for node in graph.nodes if node.type == "block-driver")


def child(graph: BlockGraph, name: str, edge: str) -> str | None:
    """The name of the node that the node of that name has below it as its ``edge`` (``file``, ``backing``)."""
    names = {node.id: node.name for node in graph.nodes}
    return next((names[at.child] for at in graph.edges if (names[at.parent], at.name) == (name, edge)), None)


def by_disk(graph: BlockGraph, known: frozenset[str]) -> dict[str, DiskGraph]:
    """The graph as chains, one per device that has an id and an image.

    The walk goes through other nodes until it meets one that is ``known``: a layer of the machine.
    """
    vertices = {node.id: node for node in graph.nodes}
    children: dict[int, dict[str, int]] = {}
    for edge in graph.edges:
        children.setdefault(edge.parent, {}).setdefault(edge.name, edge.child)
    jobs = {edge.child: vertices[edge.parent].name for edge in graph.edges if vertices[edge.parent].type == "block-job"}
    return {
        device[1]: _walk(children[node.id]["root"], vertices, children, jobs, known)
        for node in graph.nodes
        if node.type == "block-backend" and (device := DEVICE.match(node.name)) and "root" in children.get(node.id, {})
    }


def _walk(
    root: int,
    vertices: Mapping[int, GraphNode],
    children: Mapping[int, Mapping[str, int]],
    jobs: Mapping[int, str],
    known: frozenset[str],
) -> DiskGraph:
    nodes: list[str] = []
    above: list[str] = []
    holders: set[str] = set()
    at: int | None = root
    while at is not None:
        name, below = vertices[at].name, children.get(at, {})
        if at in jobs:
            holders.add(jobs[at])
        if name in known or nodes:
            nodes.append(name)
            at = below.get("backing")
        else:
            above.append(name)
            at = below.get("backing", below.get("file"))
    return DiskGraph(tuple(reversed(nodes)), tuple(above), tuple(sorted(holders)))


async def require_agreement(monitor: Monitor, chains: Sequence[Chain], *, machine: str) -> None:
    """As :func:`require_chains`, of the graph as it is now."""
    await require_chains(monitor, await read(monitor), chains, machine=machine)


async def require_chains(
    monitor: Monitor,
    graph: BlockGraph,
    chains: Sequence[Chain],
    *,
    machine: str,
    lacking: frozenset[str] = frozenset(),
) -> None:
    """Make sure that QEMU's chains are the store's, and that no job holds them."""
    disks = by_disk(graph, frozenset(layer for chain in chains for layer in chain.ids))
    for chain in chains:
        found = disks.get(chain.disk)
        if found is None and chain.disk in lacking:
            continue
        if found is None or found.nodes != chain.ids:
            raise _mismatch(machine, chain, found.nodes if found else ())
        if found.jobs:
            raise StateError(
                f"disk {chain.disk} of machine {machine} is busy with job {', '.join(found.jobs)}",
                hint="wait for the job to end or cancel it, then try again",
                machine=machine,
            )
        if found.above:
            await _require_filters(monitor, found.above, machine=machine, disk=chain.disk)


async def beside(monitor: Monitor, graph: BlockGraph, chains: Sequence[Chain]) -> Beside:
    """What QEMU has attached that is no disk of these chains, and which of them it lacks."""
    disks = by_disk(graph, frozenset(layer for chain in chains for layer in chain.ids))
    found = [disks[chain.disk] for chain in chains if chain.disk in disks]
    ours = {name for disk in found for name in (*disk.above, *disk.nodes[-1:])}
    # query-block describes whole chains, so that a long one costs: it is asked only where there is another drive. The
    # drives last: a disk that is unplugged between the two answers is one that QEMU has.
    backends = await commands.query_block(monitor) if _has_others(graph, ours) else ()
    permissions = _permissions(graph)
    others = tuple(
        Outside(backend.shown, backend.inserted.file)
        for backend in backends
        if backend.inserted and backend.inserted.node_name not in ours and _writes(backend, permissions)
    )
    # A layer that has another reader, as under another device's name, is not out of the guest's reach.
    used = {edge.child for edge in graph.edges}
    free = {chain.disk for chain in chains if not any(n.name == chain.active.id and n.id in used for n in graph.nodes)}
    return Beside(others, frozenset(free - disks.keys()), taken_names(graph))


def _has_others(graph: BlockGraph, ours: set[str]) -> bool:
    """Whether any drive or device has another node than these."""
    nodes = {node.id: node for node in graph.nodes}
    return any(
        nodes[edge.parent].type == "block-backend" and nodes[edge.child].name not in ours for edge in graph.edges
    )


async def require_no_other(monitor: Monitor, chains: Sequence[Chain], *, machine: str, hint: str) -> None:
    """Make sure that the guest writes to its machine's disks alone: memory destroys what is of another time."""
    if found := (await beside(monitor, await read(monitor), chains)).others:
        others = [f"{other.name} ({other.file})" for other in found]
        raise StateError(
            f"the guest of machine {machine} also writes to {', '.join(others)}, which is no disk of the machine:"
            " loading memory beside a disk of another point in time destroys its content",
            hint="detach it (device_del) or eject its medium; " + hint,
            machine=machine,
        )


def _permissions(graph: BlockGraph) -> dict[str, frozenset[str]]:
    """What devices may do with each node that they have."""
    names = {node.id: node.name for node in graph.nodes}
    may: dict[str, frozenset[str]] = {}
    for edge in graph.edges:
        if edge.name == "root":
            may[names[edge.child]] = may.get(names[edge.child], frozenset()) | frozenset(edge.perm)
    return may


def _writes(backend: Backend, permissions: Mapping[str, frozenset[str]]) -> bool:
    """Whether a device can write to what it has; a CD-ROM drive only reads, however its image was opened."""
    node = backend.inserted
    if node is None or node.ro or not backend.qdev or backend.is_flash:
        return False
    may = permissions.get(node.node_name, frozenset())
    return "write" in may or "consistent-read" not in may


async def _require_filters(monitor: Monitor, names: Sequence[str], *, machine: str, disk: str) -> None:
    for node in await commands.query_nodes(monitor):
        if node.node_name in names and node.drv not in FILTERS:
            raise StoreMismatch(
                f"the guest of machine {machine} writes disk {disk} to {node.file}, a node that another client"
                " inserted",
                hint=call("chains", machine, disk) + " shows both sides",
                machine=machine,
            )


def _mismatch(machine: str, chain: Chain, found: tuple[str, ...]) -> StoreMismatch:
    return StoreMismatch(
        f"disk {chain.disk} of machine {machine}: QEMU's chain is {' <- '.join(found) or 'empty'}, the store's is"
        f" {' <- '.join(chain.ids)}",
        hint=call("chains", machine, chain.disk) + " shows both sides"
        if found
        else f"if it was unplugged, attach it again (device_add with id {chain.disk}), or start a new QEMU: "
        + call("stop", machine)
        + ", then "
        + call("start", machine),
        machine=machine,
    )
