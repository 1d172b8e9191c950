"""A machine of the operations' tests: its values, a context on a real store, and a monitor whose graph is a value."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from qmpsnap.block.image.create import ImageTool
from qmpsnap.errors import QmpError
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.ops.base.context import Context, this_host
from qmpsnap.qmp.session import COMMAND_DEADLINE, Monitor
from qmpsnap.store.store import Store
from tests.qmp.deaf import Deaf

MIB = 1 << 20


def home_at(folder: Path) -> Home:
    return Home(data=folder, run=folder / "run", cache=folder / "cache")


def machine(*disks: DiskSpec, name: str = "web", current: str | None = None) -> Machine:
    spec = MachineSpec(name=name, disks=disks or (DiskSpec(name="vda", size=MIB), DiskSpec(name="vdb", size=2 * MIB)))
    return Machine(name=name, uuid=f"uuid-of-{name}", host=this_host(), spec=spec, created=0.0, current=current)


def chain(disk: str, *serials: int, folder: str = "/m", size: int = MIB) -> Chain:
    """The chain of a disk, base first, by its layers' serial numbers."""
    layers: list[Layer] = []
    for serial in serials:
        identity = f"{disk}-{serial}"
        backing = layers[-1].id if layers else None
        path = f"{folder}/{identity}.qcow2"
        layers.append(Layer(id=LayerId(identity), path=path, format="qcow2", backing=backing, virtual_size=size))
    return Chain(disk, tuple(layers))


def with_base(found: Chain, **changed: Any) -> Chain:
    return Chain(found.disk, (replace(found.base, **changed), *found.layers[1:]))


def snapshot(name: str, *points: str, created: float = 0.0, parent: str | None = None) -> Snapshot:
    """A snapshot with its points given as layer ids."""
    return Snapshot(
        name=name,
        kind="disk",
        state="ok",
        parent=parent,
        created=created,
        description="",
        mode="live",
        points=tuple(Point(disk=identity.partition("-")[0], layer=LayerId(identity)) for identity in points),
        operation=OperationId(1),
    )


class FakeQemu(Deaf):
    """A monitor on a graph of backing chains; ``blockdev-del`` takes a node away, as QEMU does."""

    def __init__(self, chains: Mapping[str, Sequence[str]], loose: Sequence[str] = ()) -> None:
        self.chains = {disk: list(nodes) for disk, nodes in chains.items()}
        self.loose = list(loose)
        self.said: list[tuple[str, Mapping[str, Any]]] = []

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        deadline: float = COMMAND_DEADLINE,  # noqa: ARG002 - the protocol's
    ) -> Any:
        match command:
            case "query-status":
                return {"status": "running", "running": True}
            case "x-debug-query-block-graph":
                return self._graph()
        self.said.append((command, dict(arguments or {})))
        if command == "blockdev-del":
            node = (arguments or {})["node-name"]
            if node not in self.loose:
                raise QmpError(f"Node {node} is in use")
            self.loose.remove(node)
        return {}

    def _graph(self) -> dict[str, Any]:
        numbers: dict[str, int] = {}
        nodes: list[dict[str, Any]] = []
        edges: list[dict[str, Any]] = []

        def number(name: str, kind: str = "block-driver") -> int:
            if name not in numbers:
                numbers[name] = len(numbers) + 1
                nodes.append({"id": numbers[name], "type": kind, "name": name})
            return numbers[name]

        for disk, chain_nodes in self.chains.items():
            above = number(f"/machine/peripheral/{disk}/virtio-backend", "block-backend")
            for name, hold in zip(reversed(chain_nodes), ["root"] + ["backing"] * len(chain_nodes), strict=False):
                edges.append({"parent": above, "child": number(name), "name": hold})
                above = numbers[name]
        for name in self.loose:
            number(name)
        return {"nodes": nodes, "edges": edges}


class BenchContext(Context, frozen=True, kw_only=True):
    """A context whose machine's QEMU is the one given, or none at all."""

    qemu_now: Any = None

    @asynccontextmanager
    async def monitor(self, machine: Machine, *, look: bool = False) -> AsyncIterator[Monitor | None]:  # noqa: ARG002 - as its parent
        yield self.qemu_now


def context_on(store: Store, folder: Path, qemu: FakeQemu | None = None) -> BenchContext:
    return BenchContext(
        home=home_at(folder),
        store=store,
        qemu="no-qemu",
        image=ImageTool("no-qemu-img"),
        host=this_host(),
        qemu_now=qemu,
    )
