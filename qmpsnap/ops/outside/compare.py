"""What store, QEMU and the files say of a machine's chains, side by side: for ``chain`` and ``show``."""

from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.graph import DiskGraph
from qmpsnap.block.image import header
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.hint import call
from qmpsnap.host.files import same_file
from qmpsnap.host.threads import to_read
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.state import State
from qmpsnap.model.names import LayerId
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.outside import unseen_qemu
from qmpsnap.qmp import commands
from qmpsnap.store import lock


class LayerView(Struct, frozen=True, kw_only=True):
    """One layer as all three see it.

    Attributes:
        bytes: what the file occupies on its file system; None when it cannot be read.
        snapshots: names of the snapshots whose point it is, but for those that a commit has consumed.
        problems: where the three disagree; empty when all is well.
    """

    layer: Layer
    active: bool
    bytes: int | None
    snapshots: tuple[str, ...]
    problems: tuple[str, ...]


class ChainView(Struct, frozen=True):
    """One disk's layers, base first, and what is wrong with the chain as a whole.

    ``running``: QEMU was asked, too. It is not while a command works on the machine (``busy``), which may just be
    changing the chain.
    """

    disk: str
    layers: tuple[LayerView, ...]
    problems: tuple[str, ...]
    running: bool = False
    busy: str | None = None

    @property
    def active(self) -> Layer:
        """The layer the guest writes to."""
        return self.layers[-1].layer

    @property
    def ids(self) -> tuple[LayerId, ...]:
        """The layers' ids, base first."""
        return tuple(at.layer.id for at in self.layers)


async def chains(context: Context, name: str, disk: str | None = None) -> tuple[ChainView, ...]:
    """The machine's live chains; asks QEMU if it runs and nobody works on it, and reads every header."""
    machine = await context.astore.machine(name)
    recorded = [chain for chain in await context.astore.chains(name) if disk in (None, chain.disk)]
    if disk is not None and not recorded:
        machine.require_disk(disk)
    snapshots = await context.astore.snapshots(name)
    busy = await to_read(lock.holder, context.home.lock(name))
    running = None if busy else await _ask_qemu(context, machine, recorded)
    views = []
    for chain in recorded:
        found = await to_read(headers, chain)
        in_qemu = None if running is None else running.get(chain.disk, DiskGraph((), (), ()))
        views.append(replace(view(chain, found, snapshots, in_qemu), busy=busy))
    return tuple(views)


async def _ask_qemu(context: Context, machine: Machine, chains: Sequence[Chain]) -> dict[str, DiskGraph] | None:
    async with context.monitor(machine) as qemu:
        if qemu is None:
            return None
        known = frozenset(layer for chain in chains for layer in chain.ids)
        return graph.by_disk(await graph.read(qemu), known)


def headers(chain: Chain) -> dict[LayerId, Header | str]:
    """Each layer's header, or why it cannot be read."""
    return {layer.id: header_of(layer) for layer in chain.layers}


def header_of(layer: Layer) -> Header | str:
    """A layer's header, or why it cannot be read."""
    try:
        return header.read(layer.path, format=layer.format, block_device=True)
    except ImageRefused as error:
        return error.message
    except HostCannot as error:
        header.require_tellable(error)
        return error.message


def view(
    chain: Chain,
    headers: Mapping[LayerId, Header | str],
    snapshots: Sequence[Snapshot],
    running: DiskGraph | None,
) -> ChainView:
    """Compare the three; pure."""
    at: dict[LayerId, list[str]] = {}
    for snapshot in snapshots:
        if snapshot.state == "ok" and (point := snapshot.point(chain.disk)):
            at.setdefault(point.layer, []).append(snapshot.name)
    layers = []
    for below, layer in zip((None, *chain.layers), chain.layers, strict=False):
        found = headers[layer.id]
        layers.append(
            LayerView(
                layer=layer,
                active=layer is chain.active,
                bytes=None if isinstance(found, str) else found.allocated,
                snapshots=tuple(at.get(layer.id, ())),
                problems=tuple(layer_problems(layer, below, found)),
            )
        )
    problems = []
    if running is not None and running.nodes != chain.ids:
        problems.append(f"QEMU's chain is {' <- '.join(running.nodes) or 'unknown to the store'}")
    return ChainView(chain.disk, tuple(layers), tuple(problems), running is not None)


def layer_problems(layer: Layer, below: Layer | None, found: Header | str) -> list[str]:
    """Where a layer's file contradicts its record; pure."""
    if isinstance(found, str):
        return [found]
    problems = []
    if not same_file(layer, found):
        problems.append(f"{layer.shown} is not the recorded file")
    return [*problems, *backing_problems(layer, below, found), *size_problems(layer, found)]


def remedy(machine: str, at: LayerView, found: Header | str) -> str:
    """The one next action where a layer's file contradicts its record; pure."""
    if not isinstance(found, str):
        if not same_file(at.layer, found):
            return "put the recorded file back; if this is a copy of it, accept it with " + call("relocate")
        if found.virtual_size != at.layer.virtual_size:
            return resized(machine, at.layer, found.virtual_size, active=at.active)
    return call("check", machine) + " shows what to do"


def resized(machine: str, layer: Layer, size: int, *, active: bool) -> str:
    """The next action for a layer of another size than the recorded one; pure."""
    if active and size > layer.virtual_size:
        return call("check", machine, repair=True) + " records the new size; each snapshot keeps its own"
    resize = "qemu-img resize --shrink" if size > layer.virtual_size else "qemu-img resize"
    return f"set the recorded size again: {resize} -f {layer.format} {layer.shown} {layer.virtual_size}"


def backing_problems(layer: Layer, below: Layer | None, found: Header) -> list[str]:
    """Where a layer's header names another backing than the one recorded; pure."""
    # A foreign image may name its backing by a relative path; ours never does.
    if layer.owned and layer.format == "qcow2" and found.backing != (below.path if below else None):
        return [f"the header of {layer.shown} names {found.backing or 'nothing'} as its backing file"]
    return []


def size_problems(layer: Layer, found: Header) -> list[str]:
    """Where a layer has another size than the one recorded; pure."""
    if found.virtual_size != layer.virtual_size:
        return [f"{layer.shown} has virtual size {found.virtual_size}, recorded is {layer.virtual_size}"]
    return []


async def state(context: Context, machine: Machine) -> State:
    """QEMU's word for the run state (``running``, ``paused`` ...), or ``stopped`` when there is no QEMU.

    ``paused: no space`` and ``paused: I/O error``: QEMU has paused the guest because a request of it failed.
    ``unknown``: a QEMU may run where it cannot be seen from here.
    """
    async with context.monitor(machine, look=True) as qemu:
        if qemu:
            return State(await commands.run_state(qemu))
    hidden = await blocking(unseen_qemu.may_run, context.home, context.store, machine)
    return State.UNKNOWN if hidden else State.STOPPED
