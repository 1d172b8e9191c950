"""Plans of one machine, for programs without asyncio.

Written by tests/api/sync_api.py from the source of ``qmpsnap.api``, whose docstrings say more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from qmpsnap.qmp.jobs import unreported
from qmpsnap.sync.runner import Delegating

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from typing import Literal, Unpack

    from qmpsnap.api.outcomes import Committed, Deleted, Mirrored, Streamed
    from qmpsnap.api.plans import Plan
    from qmpsnap.model.layers.chain import Layer
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.layers.vmstate import Compression
    from qmpsnap.model.machines.record import Machine
    from qmpsnap.model.machines.spec import DiskSpec, Format, MachineSpec, NicSpec
    from qmpsnap.model.operations.by import DeleteBy, LoadBy, MirrorBy
    from qmpsnap.model.operations.flatten import FlattenPlan
    from qmpsnap.model.operations.operation import CreatePlan, InternalPlan, MergePlan, MirrorPlan, ResizePlan
    from qmpsnap.ops.adoption.take import TakePlan
    from qmpsnap.ops.devices.attach import Attached
    from qmpsnap.ops.devices.detach import Detached
    from qmpsnap.ops.devices.nics import Nic
    from qmpsnap.ops.fork.run import Forked
    from qmpsnap.ops.fork.run import Preview as ForkPreview
    from qmpsnap.ops.lifecycle import undefine
    from qmpsnap.ops.lifecycle.change import Changed
    from qmpsnap.ops.lifecycle.dry_run import Forgotten
    from qmpsnap.ops.lifecycle.rename import Renamed
    from qmpsnap.ops.mirror.mirror import Mode
    from qmpsnap.ops.revert.plan import HardwareOf, Run
    from qmpsnap.ops.revert.revert import Preview, Reverted
    from qmpsnap.ops.snapshot.delete import DeletePlan
    from qmpsnap.ops.snapshot.request import DiskOptions, Files, FullOptions, InternalOptions, Kind, VolumeOptions
    from qmpsnap.ops.stack import PopPreview
    from qmpsnap.qmp.jobs import Report

R = TypeVar("R")


class MachinePlans(Delegating):
    """:class:`qmpsnap.MachinePlans` without ``await``."""

    def apply(self, plan: Plan[Any, R], *, report: Report = unreported) -> R:
        """Carry a plan out, if the machine is as it was when the plan was made; returns what its verb returns."""
        return self._call(self._handle.apply(plan, report=report))

    @overload
    def plan_snapshot(
        self, name: str | None = None, *, kind: Literal["disk"] = "disk", **options: Unpack[DiskOptions]
    ) -> Plan[CreatePlan, Snapshot]: ...

    @overload
    def plan_snapshot(
        self, name: str | None = None, *, kind: Literal["full"], **options: Unpack[FullOptions]
    ) -> Plan[CreatePlan, Snapshot]: ...

    @overload
    def plan_snapshot(
        self, name: str | None = None, *, kind: Literal["volume"], **options: Unpack[VolumeOptions]
    ) -> Plan[CreatePlan, Snapshot]: ...

    @overload
    def plan_snapshot(
        self, name: str | None = None, *, kind: Literal["internal"], **options: Unpack[InternalOptions]
    ) -> Plan[InternalPlan, Snapshot]: ...

    def plan_snapshot(self, name: str | None = None, *, kind: Kind = "disk", **options: Any) -> Plan[Any, Snapshot]:
        """A plan of what :meth:`snapshot` would do now; no agent is asked to freeze file systems for it."""
        return self._call(self._handle.plan_snapshot(name, kind=kind, **options))

    def plan_save(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        description: str = "",
        compression: Compression = "none",
    ) -> Plan[CreatePlan, Snapshot]:
        """What :meth:`save` would do now."""
        return self._call(self._handle.plan_save(file, name=name, description=description, compression=compression))

    def plan_restore(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        discard: bool = False,
        paused: bool = False,
        after: bool = True,
    ) -> Plan[Preview, Reverted]:
        """What :meth:`restore` would do now."""
        return self._call(self._handle.plan_restore(file, discard=discard, paused=paused, after=after))

    def plan_add_layers(
        self, *, disks: Sequence[str] | None = None, files: Files | None = None
    ) -> Plan[CreatePlan, tuple[Layer, ...]]:
        """What :meth:`add_layers` would do now."""
        return self._call(self._handle.plan_add_layers(disks=disks, files=files))

    def plan_revert(
        self,
        snapshot: Snapshot | str,
        *,
        discard: bool = False,
        state: Run | None = None,
        hardware: HardwareOf = "now",
        after: bool = True,
        by: LoadBy | None = None,
    ) -> Plan[Preview, Reverted]:
        """What :meth:`revert` would do now."""
        return self._call(
            self._handle.plan_revert(snapshot, discard=discard, state=state, hardware=hardware, after=after, by=by)
        )

    def plan_push(self, name: str | None = None, *, description: str = "") -> Plan[CreatePlan, Snapshot]:
        """What :meth:`push` would do now."""
        return self._call(self._handle.plan_push(name, description=description))

    def plan_pop(self, *, discard: bool = False, bandwidth: int = 0) -> Plan[PopPreview, Reverted]:
        """A plan of what :meth:`pop` would do now; its ``qmp`` has only the commands of the revert."""
        return self._call(self._handle.plan_pop(discard=discard, bandwidth=bandwidth))

    def plan_commit(
        self,
        disk: str,
        *,
        base: Snapshot | str | None = None,
        top: Snapshot | str | None = None,
        consume: bool = False,
        bandwidth: int = 0,
    ) -> Plan[MergePlan, Committed]:
        """What :meth:`commit` would do now."""
        return self._call(self._handle.plan_commit(disk, base=base, top=top, consume=consume, bandwidth=bandwidth))

    def plan_stream(
        self, disk: str, *, base: Snapshot | str | None = None, bandwidth: int = 0
    ) -> Plan[MergePlan, Streamed]:
        """What :meth:`stream` would do now."""
        return self._call(self._handle.plan_stream(disk, base=base, bandwidth=bandwidth))

    def plan_mirror(
        self,
        disk: str,
        target: str | os.PathLike[str],
        *,
        mode: Mode,
        shallow: bool = False,
        reuse: bool = False,
        format: Format | None = None,
        write_blocking: bool = False,
        bandwidth: int = 0,
        by: MirrorBy = "blockdev-mirror",
    ) -> Plan[MirrorPlan, Mirrored]:
        """What :meth:`mirror` would do now."""
        return self._call(
            self._handle.plan_mirror(
                disk,
                target,
                mode=mode,
                shallow=shallow,
                reuse=reuse,
                format=format,
                write_blocking=write_blocking,
                bandwidth=bandwidth,
                by=by,
            )
        )

    def plan_fork(
        self,
        snapshot: Snapshot | str | None = None,
        name: str | None = None,
        *,
        count: int = 1,
        ephemeral: bool = False,
        paused: bool = False,
        identity: Literal["keep", "fresh"] = "keep",
        description: str = "",
    ) -> Plan[ForkPreview, list[Forked]]:
        """What :meth:`fork` would do now."""
        return self._call(
            self._handle.plan_fork(
                snapshot,
                name,
                count=count,
                ephemeral=ephemeral,
                paused=paused,
                identity=identity,
                description=description,
            )
        )

    def plan_delete_snapshots(
        self,
        *names: Snapshot | str,
        children: bool = False,
        metadata: bool = False,
        flatten: bool = False,
        bandwidth: int = 0,
        by: DeleteBy | None = None,
    ) -> Plan[DeletePlan, Deleted]:
        """What :meth:`delete_snapshots` would do now."""
        return self._call(
            self._handle.plan_delete_snapshots(
                *names, children=children, metadata=metadata, flatten=flatten, bandwidth=bandwidth, by=by
            )
        )

    def plan_undefine(self, *, disks: undefine.Fate | None = None) -> Plan[Forgotten, list[str]]:
        """What :meth:`undefine` would do now."""
        return self._call(self._handle.plan_undefine(disks=disks))

    def plan_rename_snapshot(self, old: str, new: str) -> Plan[None, Snapshot]:
        """What :meth:`rename_snapshot` would do now."""
        return self._call(self._handle.plan_rename_snapshot(old, new))

    def plan_describe_snapshot(
        self,
        snapshot: Snapshot | str,
        description: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        untag: Sequence[str] = (),
    ) -> Plan[Snapshot, Snapshot]:
        """What :meth:`describe_snapshot` would do now."""
        return self._call(self._handle.plan_describe_snapshot(snapshot, description, tags=tags, untag=untag))

    def plan_set(
        self, settings: Mapping[str, str] | MachineSpec, *, allow_extra: bool = False
    ) -> Plan[Changed, Changed]:
        """What :meth:`set` would do now."""
        return self._call(self._handle.plan_set(settings, allow_extra=allow_extra))

    def plan_take(self, spec: MachineSpec, *, allow_extra: bool = False) -> Plan[TakePlan, TakePlan]:
        """What :meth:`take` would do now."""
        return self._call(self._handle.plan_take(spec, allow_extra=allow_extra))

    def plan_rename(self, new: str) -> Plan[Renamed, Machine]:
        """What :meth:`rename` would do now."""
        return self._call(self._handle.plan_rename(new))

    def plan_resize(self, disk: str, size: int | str) -> Plan[ResizePlan, ResizePlan]:
        """What :meth:`resize` would do now."""
        return self._call(self._handle.plan_resize(disk, size))

    def plan_flatten(self, disk: str) -> Plan[FlattenPlan, FlattenPlan]:
        """What :meth:`flatten` would do now."""
        return self._call(self._handle.plan_flatten(disk))

    def plan_attach_disk(
        self, disk: Mapping[str, object] | DiskSpec, *, folders: Sequence[Path] = ()
    ) -> Plan[Attached, Attached]:
        """What :meth:`attach_disk` would do now."""
        return self._call(self._handle.plan_attach_disk(disk, folders=folders))

    def plan_detach_disk(self, disk: str, *, timeout: float = 30.0) -> Plan[Detached, Detached]:
        """What :meth:`detach_disk` would do now."""
        return self._call(self._handle.plan_detach_disk(disk, timeout=timeout))

    def plan_attach_nic(self, nic: Mapping[str, object] | NicSpec) -> Plan[Nic, Nic]:
        """What :meth:`attach_nic` would do now."""
        return self._call(self._handle.plan_attach_nic(nic))

    def plan_detach_nic(self, nic: str | int, *, timeout: float = 30.0) -> Plan[Nic, Nic]:
        """What :meth:`detach_nic` would do now."""
        return self._call(self._handle.plan_detach_nic(nic, timeout=timeout))
