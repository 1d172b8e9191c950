"""A store with fixed values, filled as operations fill it, and the images that its layers name."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change, DefinePlan
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.store.samples import journalled

MIB = 1 << 20
EPOCH = 1_767_225_600.0
"""2026-01-01T00:00:00Z; everything happens a minute after the one before."""
HOST = os.uname().nodename
HOSTILE = "red \x1b[31m, C1 \x9b31m, bidi \u202e, bell \a, two\nlines, \u00e9\u4e2d"
"""A description that would steer a terminal."""


def fill(home: Home) -> None:
    """Three machines: ``web`` with a straight line of snapshots, ``lab`` with branches, ``bare`` without disks."""
    with SqliteStore(home.store, machines=home.machines) as store:
        vda = [_layer(home, "web", "vda", serial, 64 * MIB) for serial in (1, 3, 4, 5)]
        vdb = [_layer(home, "web", "vdb", serial, 8 * MIB) for serial in (2, 3, 5)]
        both, only_vda = ("vda-1", "vdb-2"), ("vda-3",)
        _settle(
            store,
            _machine("web", 1, ("vda", 64 * MIB), ("vdb", 8 * MIB)),
            [*_stacked(vda), *_stacked(vdb)],
            active={"vda": "vda-5", "vdb": "vdb-5"},
            snapshots=[
                _snapshot("fresh", None, 1, both, mode="stopped"),
                _snapshot("before-upgrade", "fresh", 2, only_vda, description="works; do not touch", pause_ms=1.25),
                _snapshot("after-upgrade", "before-upgrade", 3, ("vda-4", "vdb-3"), pause_ms=2.0),
            ],
            current="after-upgrade",
        )
        # As a revert to `base` will leave it: two branches above it, and the machine on an overlay of its own.
        base, left, right, here = (_layer(home, "lab", "vda", serial, 64 * MIB) for serial in (11, 12, 13, 14))
        _settle(
            store,
            _machine("lab", 2, ("vda", 64 * MIB)),
            [base, *(replace(layer, backing=base.id) for layer in (left, right, here))],
            active={"vda": here.id},
            snapshots=[
                _snapshot("base", None, 4, ("vda-11",), description=HOSTILE),
                _snapshot("left", "base", 5, ("vda-12",), mode="paused", pause_ms=0.5),
                _snapshot("left-leaf", "left", 6, ("vda-12",), mode="stopped"),
                _snapshot("right", "base", 7, ("vda-13",), mode="stopped"),
            ],
            current="base",
        )
        _settle(store, _machine("bare", 3), [], active={}, snapshots=[], current=None)


def make_images(home: Home, machine: str) -> None:
    """Every image in a machine's folder as qemu-img makes it, and its identity in the store."""
    with SqliteStore(home.store, machines=home.machines) as store:
        layers = store.forest().layers
        for layer in layers.values():
            if not layer.path.startswith(f"{home.machine_dir(machine)}/"):
                continue
            Path(layer.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            below = layers[layer.backing] if layer.backing else None
            backing = ["-u", "-b", below.path, "-F", below.format] if below else []
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, layer.path, str(layer.virtual_size)]
            subprocess.run(argv, check=True)
            _record_identity(store, machine, layer)


def _record_identity(store: SqliteStore, machine: str, layer: Layer) -> None:
    status = Path(layer.path).stat()
    change = Change(layers=(replace(layer, device=status.st_dev, inode=status.st_ino),))
    _apply(store, machine, change)


def _machine(name: str, minute: int, *disks: tuple[str, int]) -> Machine:
    return Machine(
        name=name,
        uuid=f"00000000-0000-4000-8000-{minute:012}",
        host=HOST,
        spec=MachineSpec(
            name=name,
            machine="pc-q35-7.2",
            memory=256 * MIB,
            disks=tuple(DiskSpec(name=disk, size=size) for disk, size in disks),
        ),
        created=EPOCH + 60 * minute,
    )


def _layer(home: Home, machine: str, disk: str, serial: int, size: int) -> Layer:
    path = home.machine_dir(machine) / f"{disk}-{serial}.qcow2"
    return Layer(id=LayerId(f"{disk}-{serial}"), path=str(path), format="qcow2", backing=None, virtual_size=size)


def _stacked(layers: Sequence[Layer]) -> list[Layer]:
    return [replace(layer, backing=below.id if below else None) for below, layer in zip((None, *layers), layers)]  # noqa: B905


def _snapshot(
    name: str,
    parent: str | None,
    minute: int,
    layers: Sequence[str],
    *,
    description: str = "",
    mode: str = "live",
    pause_ms: float | None = None,
) -> Snapshot:
    return Snapshot(
        name=name,
        kind="disk",
        state="ok",
        parent=parent,
        created=EPOCH + 3600 + 60 * minute,
        description=description,
        mode=mode,
        points=tuple(Point(disk=layer.partition("-")[0], layer=LayerId(layer)) for layer in layers),
        operation=OperationId(minute),
        pause_ms=pause_ms,
    )


def _settle(
    store: SqliteStore,
    machine: Machine,
    layers: Sequence[Layer],
    *,
    active: dict[str, str],
    snapshots: Sequence[Snapshot],
    current: str | None,
) -> None:
    change = Change(
        define=machine,
        layers=tuple(layers),
        active={disk: LayerId(layer) for disk, layer in active.items()},
        snapshots=tuple(snapshots),
        current=current,
    )
    _apply(store, machine.name, change)


def _apply(store: SqliteStore, machine: str, change: Change) -> None:
    operation = journalled(store, DefinePlan(machine=machine, images=(), overlays=(), change=change), serials=20)
    store.settle(operation.id, machine, change)
