"""Snapshots of QEMU machines over QMP: taken, kept, merged and reverted without libvirtd.

::

    async with qmpsnap.open() as q:
        vm = await q.start("machine.yaml")
        snap = await vm.snapshot("before")

Everything a program needs is here: :func:`open`, :class:`Controller`, :class:`MachineHandle`, the values they return
and the errors they raise. Names are loaded when first used, so that quick commands stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpsnap import errors
    from qmpsnap.controller import Controller
    from qmpsnap.controller import open_controller as open  # noqa: A004 - reads as qmpsnap.open()
    from qmpsnap.errors import QmpsnapError
    from qmpsnap.following import progress
    from qmpsnap.machine_handle import MachineHandle
    from qmpsnap.model.chain import Chain, Layer
    from qmpsnap.model.snapshot import Snapshot
    from qmpsnap.model.spec import DiskSpec, MachineSpec

__version__ = "0.1.0"
__all__ = [
    "Chain",
    "Controller",
    "DiskSpec",
    "Layer",
    "MachineHandle",
    "MachineSpec",
    "QmpsnapError",
    "Snapshot",
    "errors",
    "open",
    "progress",
]

_WHERE = {
    "errors": ("qmpsnap.errors", ""),
    "Controller": ("qmpsnap.controller", "Controller"),
    "MachineHandle": ("qmpsnap.machine_handle", "MachineHandle"),
    "open": ("qmpsnap.controller", "open_controller"),
    "QmpsnapError": ("qmpsnap.errors", "QmpsnapError"),
    "Chain": ("qmpsnap.model.chain", "Chain"),
    "Layer": ("qmpsnap.model.chain", "Layer"),
    "Snapshot": ("qmpsnap.model.snapshot", "Snapshot"),
    "DiskSpec": ("qmpsnap.model.spec", "DiskSpec"),
    "MachineSpec": ("qmpsnap.model.spec", "MachineSpec"),
    "progress": ("qmpsnap.following", "progress"),
}


if not TYPE_CHECKING:  # a type checker would take it for a promise that every name is there

    def __getattr__(name: str) -> object:
        if name in _WHERE:
            module, attribute = _WHERE[name]
            return getattr(import_module(module), attribute) if attribute else import_module(module)
        raise AttributeError(f"module 'qmpsnap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
