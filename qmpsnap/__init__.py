"""Snapshots of QEMU virtual machines over QMP: create, merge, revert and delete them, without libvirtd.

::

    async with qmpsnap.open() as q:
        vm = await q.start("machine.yaml")
        snapshot = await vm.snapshot("before")
        await vm.run("apt-get -y dist-upgrade", deadline=1800)
        await vm.revert(snapshot)

This module is the public API: :func:`open`, :class:`Controller`, :class:`MachineHandle`, the values they return and the
errors they raise. A name is imported when it is first used, so that short commands start quickly.
"""

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from qmpsnap import errors
    from qmpsnap.api.controller import Controller
    from qmpsnap.api.controller import open_controller as open  # noqa: A004 - reads as qmpsnap.open()
    from qmpsnap.api.following import progress
    from qmpsnap.api.job import Job
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.api.outcomes import Committed, Deleted, Mirrored, Streamed
    from qmpsnap.errors import QmpsnapError
    from qmpsnap.machine.agent import Completed, Trimmed
    from qmpsnap.model.layers.chain import Chain, Layer
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.machines.record import Machine, Process
    from qmpsnap.model.machines.spec import DiskSpec, Encryption, Forward, MachineSpec, NicSpec
    from qmpsnap.model.operations.operation import (
        CreatePlan,
        DefinePlan,
        InternalPlan,
        MergePlan,
        MirrorPlan,
        Operation,
        ResizePlan,
    )
    from qmpsnap.ops.check.check import Checked
    from qmpsnap.ops.lifecycle.adopt import Adopted, Survey
    from qmpsnap.ops.lifecycle.dry_run import Forgotten
    from qmpsnap.ops.outside.compare import ChainView
    from qmpsnap.ops.revert.revert import Preview, Reverted
    from qmpsnap.ops.snapshot.delete import DeletePlan
    from qmpsnap.ops.snapshot.request import SnapshotOptions
    from qmpsnap.ops.stack import PopPreview
    from qmpsnap.qmp.commands import JobInfo

__version__ = "0.1.0"
__all__ = [
    "Adopted",
    "Chain",
    "ChainView",
    "Checked",
    "Committed",
    "Completed",
    "Controller",
    "CreatePlan",
    "DefinePlan",
    "DeletePlan",
    "Deleted",
    "DiskSpec",
    "Encryption",
    "Forgotten",
    "Forward",
    "InternalPlan",
    "Job",
    "JobInfo",
    "Layer",
    "Machine",
    "MachineHandle",
    "MachineSpec",
    "MergePlan",
    "MirrorPlan",
    "Mirrored",
    "NicSpec",
    "Operation",
    "PopPreview",
    "Preview",
    "Process",
    "QmpsnapError",
    "ResizePlan",
    "Reverted",
    "Snapshot",
    "SnapshotOptions",
    "Streamed",
    "Survey",
    "Trimmed",
    "errors",
    "open",
    "progress",
]

_FROM = {
    "qmpsnap.api.controller": ("Controller",),
    "qmpsnap.errors": ("QmpsnapError",),
    "qmpsnap.api.following": ("progress",),
    "qmpsnap.api.job": ("Job",),
    "qmpsnap.api.outcomes": ("Committed", "Deleted", "Mirrored", "Streamed"),
    "qmpsnap.machine.agent": ("Completed", "Trimmed"),
    "qmpsnap.api.machine_handle": ("MachineHandle",),
    "qmpsnap.model.layers.chain": ("Chain", "Layer"),
    "qmpsnap.model.machines.record": ("Machine", "Process"),
    "qmpsnap.model.operations.operation": (
        "CreatePlan",
        "DefinePlan",
        "InternalPlan",
        "MergePlan",
        "MirrorPlan",
        "Operation",
        "ResizePlan",
    ),
    "qmpsnap.model.layers.snapshot": ("Snapshot",),
    "qmpsnap.model.machines.spec": ("DiskSpec", "Encryption", "Forward", "MachineSpec", "NicSpec"),
    "qmpsnap.ops.lifecycle.adopt": ("Adopted", "Survey"),
    "qmpsnap.ops.check.check": ("Checked",),
    "qmpsnap.ops.outside.compare": ("ChainView",),
    "qmpsnap.ops.snapshot.delete": ("DeletePlan",),
    "qmpsnap.ops.lifecycle.dry_run": ("Forgotten",),
    "qmpsnap.ops.stack": ("PopPreview",),
    "qmpsnap.ops.revert.revert": ("Preview", "Reverted"),
    "qmpsnap.ops.snapshot.request": ("SnapshotOptions",),
    "qmpsnap.qmp.commands": ("JobInfo",),
}
_WHERE = {name: (module, name) for module, names in _FROM.items() for name in names}
_WHERE |= {"errors": ("qmpsnap.errors", ""), "open": ("qmpsnap.api.controller", "open_controller")}


if not TYPE_CHECKING:  # a type checker would conclude from it that every name exists

    def __getattr__(name: str) -> object:
        if name in _WHERE:
            from importlib import import_module

            module, attribute = _WHERE[name]
            return getattr(import_module(module), attribute) if attribute else import_module(module)
        raise AttributeError(f"module 'qmpsnap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
