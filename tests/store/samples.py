"""A machine, its layers and snapshots as the store's tests use them, and the changes that record them."""

import contextlib
import os
import tempfile
from pathlib import Path

from qmpsnap.errors import NumberTaken
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change, DefinePlan, Operation, Plan
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.store import Store

MACHINES = Path(tempfile.gettempdir()) / f"qs-pool-{os.getpid()}" / "machines"
"""Of this process; each test begins without it (``conftest.py``)."""
PROCESS = Process(pid=7, start_ticks=8, boot_id="b", started=9.5, accel="tcg", qemu_version="7.2.22")


def machine(name: str = "web", *, disks: tuple[str, ...] = ("vda",)) -> Machine:
    spec = MachineSpec(name=name, disks=tuple(DiskSpec(name=disk, size=1 << 20) for disk in disks))
    return Machine(name=name, uuid=f"uuid-of-{name}", host="here", spec=spec, created=1.5)


def layer(identity: str, backing: Layer | None = None, *, path: str = "", owned: bool = True) -> Layer:
    return Layer(
        id=LayerId(identity),
        path=path or f"{MACHINES}/web/{identity}.qcow2",
        format="qcow2",
        backing=backing.id if backing else None,
        virtual_size=1 << 20,
        device=3,
        inode=4,
        owned=owned,
    )


def snapshot(name: str, at: Layer, *, parent: str | None = None, disk: str = "vda") -> Snapshot:
    return Snapshot(
        name=name,
        kind="disk",
        state="ok",
        parent=parent,
        created=2.5,
        description="",
        mode="live",
        points=(Point(disk=disk, layer=at.id),),
        operation=OperationId(1),
    )


def opened(store: Store, name: str = "web", *, serials: int = 1) -> Operation:
    """An operation of the machine; what its plan says does not matter to the store."""
    return journalled(store, DefinePlan(machine=name, images=(), overlays=(), change=Change()), serials=serials)


def journalled(store: Store, plan: Plan, *, serials: int = 1) -> Operation:
    """The operation of a plan that was made from what the store says now, whoever else takes numbers meanwhile."""
    while True:
        basis, serial = store.basis(plan.machine), OperationId(store.next_serial())
        with contextlib.suppress(NumberTaken):
            return store.open_operation(plan, basis, serial=serial, serials=serials)


def skip_to(store: SqliteStore, serial: int) -> None:
    """Let the next operation have this number: the smallest of changes."""
    with store._database.writing() as sql:
        sql.execute("UPDATE serial SET last = ?", (serial - 1,))


def settled(store: Store, change: Change, name: str = "web") -> None:
    store.settle(opened(store, name).id, name, change)


def defined(store: Store, name: str = "web", *layers: Layer, active: Layer | None = None) -> None:
    """Define a machine on the layers; the last one is active unless said otherwise."""
    top = active or layers[-1]
    settled(store, Change(define=machine(name), layers=layers, active={"vda": top.id}), name)


def created(store: Store, name: str, below: Layer, *, parent: str | None = None) -> Layer:
    """Take a snapshot of the one disk of ``web`` and return its new active layer."""
    top = layer(f"vda-{store.next_serial()}", below)
    change = Change(
        layers=(top,),
        active={"vda": top.id},
        snapshots=(snapshot(name, below, parent=parent),),
        current=name,
    )
    settled(store, change)
    return top


def everything(store: Store) -> object:
    """All that can be read of a store, for comparing."""
    names = [found.name for found in store.machines()]
    return (
        store.machines(),
        [(store.chains(name), store.snapshots(name)) for name in names],
    )
