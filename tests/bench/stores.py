"""Stores with many snapshots, written as operations write them; their images do not exist."""

import os
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change, DefinePlan
from qmpsnap.ops.base.context import this_host
from qmpsnap.store.sqlite.backend import SqliteStore

MIB = 1 << 20
EPOCH = 1_767_225_600.0


def home_at(folder: Path) -> Home:
    """The home that ``QMPSNAP_HOME`` names."""
    return Home.from_environment({"QMPSNAP_HOME": str(folder)}, uid=os.geteuid())


def fill(folder: Path, *, machines: int, snapshots: int) -> None:
    """A store of machines ``m0``, ``m1`` ... with that many snapshots each."""
    home = home_at(folder)
    with SqliteStore(home.store, machines=home.machines) as store:
        for number in range(machines):
            name = f"m{number}"
            plan = DefinePlan(machine=name, images=(), overlays=(), change=Change())
            basis, serial = store.basis(name), OperationId(store.next_serial())
            operation = store.open_operation(plan, basis, serial=serial, serials=snapshots + 1)
            store.settle(operation.id, name, _whole(home, name, operation.id, snapshots))


def _whole(home: Home, name: str, serial: OperationId, count: int) -> Change:
    """A machine, its layers and its snapshots as one change."""
    spec = MachineSpec(name=name, machine="pc-q35-7.2", memory=256 * MIB, disks=(DiskSpec(name="vda", size=MIB),))
    identity = f"00000000-0000-4000-8000-{serial:012}"
    layers: list[Layer] = []
    for place in range(count + 1):
        path = str(home.machine_dir(name) / f"vda-{serial + place}.qcow2")
        layer = Layer(
            id=LayerId(f"vda-{serial + place}"), path=path, format="qcow2", backing=None, virtual_size=MIB, inode=place
        )
        layers.append(replace(layer, backing=layers[-1].id) if layers else layer)
    taken = [_snapshot(place, layer, serial) for place, layer in enumerate(layers[:-1])]
    return Change(
        define=Machine(name=name, uuid=identity, host=this_host(), spec=spec, created=EPOCH),
        layers=tuple(layers),
        active={"vda": layers[-1].id},
        snapshots=tuple(taken),
        current=taken[-1].name,
    )


def _snapshot(place: int, layer: Layer, serial: OperationId) -> Snapshot:
    return Snapshot(
        name=f"s{place}",
        kind="disk",
        state="ok",
        parent=f"s{place - 1}" if place else None,
        created=EPOCH + 60 * place,
        description="",
        mode="stopped",
        points=(Point(disk="vda", layer=layer.id),),
        operation=serial,
    )
