"""Snapshots of QEMU virtual machines over QMP: create, merge, revert and delete them, without libvirtd.

::

    async with qmpsnap.open() as q:
        vm = await q.define("machine.yaml", exist_ok=True)
        await vm.start()
        snapshot = await vm.snapshot("before")
        await vm.run("apt-get -y dist-upgrade", timeout=1800)
        await vm.revert(snapshot)

This module is the public API: :func:`open`, :class:`Controller`, :class:`MachineHandle`, the values they return and the
errors they raise. A name is imported when it is first used, so that short commands start quickly.
"""

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from qmpsnap import errors, sync
    from qmpsnap.api.controller import Controller
    from qmpsnap.api.controller import open_controller as open  # noqa: A004 - reads as qmpsnap.open()
    from qmpsnap.api.events import Event, JobChanged, ShortageChanged, StateChanged
    from qmpsnap.api.forks import ForkPool
    from qmpsnap.api.job import Job, progress
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.api.outcomes import Committed, Deleted, Mirrored, Streamed
    from qmpsnap.api.plans import Plan, PlannedFile
    from qmpsnap.errors import ProcessError, QmpsnapError
    from qmpsnap.machine.agent import Completed, Trimmed
    from qmpsnap.model.layers.chain import Chain, Layer
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.machines.record import Machine, Process
    from qmpsnap.model.machines.spec import CloudInit, DiskSpec, Encryption, Forward, MachineSpec, NicSpec
    from qmpsnap.model.machines.state import State
    from qmpsnap.model.operations.flatten import FlattenPlan
    from qmpsnap.model.operations.operation import (
        CreatePlan,
        DefinePlan,
        InternalPlan,
        MergePlan,
        MirrorPlan,
        Operation,
        ResizePlan,
    )
    from qmpsnap.ops.adoption.adopt import Adopted, Survey
    from qmpsnap.ops.base.free_space import Shortage, ShortageKind
    from qmpsnap.ops.check.check import Checked
    from qmpsnap.ops.fork.run import Forked
    from qmpsnap.ops.fork.upkeep import Pruned, Shelved
    from qmpsnap.ops.jobs.at_work import MachineJob
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
    "CloudInit",
    "Committed",
    "Completed",
    "Controller",
    "CreatePlan",
    "DefinePlan",
    "DeletePlan",
    "Deleted",
    "DiskSpec",
    "Encryption",
    "Event",
    "FlattenPlan",
    "Forgotten",
    "ForkPool",
    "Forked",
    "Forward",
    "InternalPlan",
    "Job",
    "JobChanged",
    "JobInfo",
    "Layer",
    "Machine",
    "MachineHandle",
    "MachineJob",
    "MachineSpec",
    "MergePlan",
    "MirrorPlan",
    "Mirrored",
    "NicSpec",
    "Operation",
    "Plan",
    "PlannedFile",
    "PopPreview",
    "Preview",
    "Process",
    "ProcessError",
    "Pruned",
    "QmpsnapError",
    "ResizePlan",
    "Reverted",
    "Shelved",
    "Shortage",
    "ShortageChanged",
    "ShortageKind",
    "Snapshot",
    "SnapshotOptions",
    "State",
    "StateChanged",
    "Streamed",
    "Survey",
    "Trimmed",
    "errors",
    "open",
    "progress",
    "sync",
]

_FROM = {
    "qmpsnap.api.controller": ("Controller",),
    "qmpsnap.errors": ("ProcessError", "QmpsnapError"),
    "qmpsnap.api.events": ("Event", "JobChanged", "ShortageChanged", "StateChanged"),
    "qmpsnap.model.machines.state": ("State",),
    "qmpsnap.ops.base.free_space": ("Shortage", "ShortageKind"),
    "qmpsnap.api.forks": ("ForkPool",),
    "qmpsnap.ops.fork.run": ("Forked",),
    "qmpsnap.ops.fork.upkeep": ("Pruned", "Shelved"),
    "qmpsnap.api.job": ("Job", "progress"),
    "qmpsnap.api.outcomes": ("Committed", "Deleted", "Mirrored", "Streamed"),
    "qmpsnap.api.plans": ("Plan", "PlannedFile"),
    "qmpsnap.machine.agent": ("Completed", "Trimmed"),
    "qmpsnap.api.machine_handle": ("MachineHandle",),
    "qmpsnap.model.layers.chain": ("Chain", "Layer"),
    "qmpsnap.model.machines.record": ("Machine", "Process"),
    "qmpsnap.model.operations.flatten": ("FlattenPlan",),
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
    "qmpsnap.model.machines.spec": ("CloudInit", "DiskSpec", "Encryption", "Forward", "MachineSpec", "NicSpec"),
    "qmpsnap.ops.adoption.adopt": ("Adopted", "Survey"),
    "qmpsnap.ops.check.check": ("Checked",),
    "qmpsnap.ops.outside.compare": ("ChainView",),
    "qmpsnap.ops.snapshot.delete": ("DeletePlan",),
    "qmpsnap.ops.lifecycle.dry_run": ("Forgotten",),
    "qmpsnap.ops.stack": ("PopPreview",),
    "qmpsnap.ops.revert.revert": ("Preview", "Reverted"),
    "qmpsnap.ops.snapshot.request": ("SnapshotOptions",),
    "qmpsnap.ops.jobs.at_work": ("MachineJob",),
    "qmpsnap.qmp.commands": ("JobInfo",),
}
_WHERE = {name: (module, name) for module, names in _FROM.items() for name in names}
_WHERE |= {"errors": ("qmpsnap.errors", ""), "sync": ("qmpsnap.sync", "")}
_WHERE |= {"open": ("qmpsnap.api.controller", "open_controller")}


if not TYPE_CHECKING:  # a type checker would conclude from it that every name exists

    def __getattr__(name: str) -> object:
        if name in _WHERE:
            from importlib import import_module

            module, attribute = _WHERE[name]
            return getattr(import_module(module), attribute) if attribute else import_module(module)
        raise AttributeError(f"module 'qmpsnap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
