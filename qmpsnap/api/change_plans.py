"""What changes of a machine itself, and of what is said of its snapshots, would do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qmpsnap.api import asked
from qmpsnap.api.machine_plans import MachinePlans
from qmpsnap.host.borders import border
from qmpsnap.later import Later

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qmpsnap.api import plans
    from qmpsnap.api.plans import Plan
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.machines.record import Machine
    from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec
    from qmpsnap.model.operations.flatten import FlattenPlan
    from qmpsnap.model.operations.operation import ResizePlan
    from qmpsnap.ops.adoption import take
    from qmpsnap.ops.adoption.take import TakePlan
    from qmpsnap.ops.devices import attach, detach, nics
    from qmpsnap.ops.devices.attach import Attached
    from qmpsnap.ops.devices.detach import Detached
    from qmpsnap.ops.devices.nics import Nic
    from qmpsnap.ops.lifecycle import change, resize
    from qmpsnap.ops.lifecycle import rename as rename_machine
    from qmpsnap.ops.lifecycle.change import Changed
    from qmpsnap.ops.lifecycle.rename import Renamed
    from qmpsnap.ops.merge import flatten
    from qmpsnap.ops.snapshot import describe, rename
else:
    plans = Later("api.plans")
    attach, detach = Later("ops.devices.attach"), Later("ops.devices.detach")
    nics = Later("ops.devices.nics")
    change, resize = Later("ops.lifecycle.change"), Later("ops.lifecycle.resize")
    flatten, rename_machine = Later("ops.merge.flatten"), Later("ops.lifecycle.rename")
    describe, rename = Later("ops.snapshot.describe"), Later("ops.snapshot.rename")
    take = Later("ops.adoption.take")


@border
class ChangePlans(MachinePlans):
    """The plans of :class:`qmpsnap.api.machine_changes.Changing`, and of renaming a snapshot."""

    async def plan_rename_snapshot(self, old: str, new: str) -> Plan[None, Snapshot]:
        """What :meth:`rename_snapshot` would do now."""
        return await self._plan(
            "rename_snapshot",
            lambda context: rename.preview(context, self.name, old, new),
            plans.of_rename(old, new),
            lambda vm, _: vm.rename_snapshot(old, new),
        )

    async def plan_describe_snapshot(
        self,
        snapshot: Snapshot | str,
        description: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        untag: Sequence[str] = (),
    ) -> Plan[Snapshot, Snapshot]:
        """What :meth:`describe_snapshot` would do now."""
        request = asked.to_describe(snapshot, description, tags, untag)
        return await self._plan(
            "describe_snapshot",
            lambda context: describe.preview(context, self.name, request),
            plans.of_describe,
            lambda vm, _: vm.describe_snapshot(snapshot, description, tags=tags, untag=untag),
        )

    async def plan_set(
        self, settings: Mapping[str, str] | MachineSpec, *, allow_extra: bool = False
    ) -> Plan[Changed, Changed]:
        """What :meth:`set` would do now."""
        make = change.made(settings, guest_dir=self._context.home.guest)
        return await self._plan(
            "set",
            lambda context: change.preview(context, self.name, make, allow_extra=allow_extra),
            plans.of_set,
            lambda vm, _: vm.set(settings, allow_extra=allow_extra),
        )

    async def plan_take(self, spec: MachineSpec, *, allow_extra: bool = False) -> Plan[TakePlan, TakePlan]:
        """What :meth:`take` would do now."""
        return await self._plan(
            "take",
            lambda context: take.preview(context, self.name, spec, allow_extra=allow_extra),
            plans.of_take,
            lambda vm, _: vm.take(spec, allow_extra=allow_extra),
        )

    async def plan_rename(self, new: str) -> Plan[Renamed, Machine]:
        """What :meth:`rename` would do now."""
        return await self._plan(
            "rename",
            lambda context: rename_machine.preview(context, self.name, new),
            plans.of_rename_machine,
            lambda vm, _: vm.rename(new),
        )

    async def plan_resize(self, disk: str, size: int | str) -> Plan[ResizePlan, ResizePlan]:
        """What :meth:`resize` would do now."""
        request = resize.requested(disk, size)
        return await self._plan(
            "resize",
            lambda context: resize.preview(context, self.name, request),
            plans.of_resize,
            lambda vm, _: vm.resize(disk, size),
        )

    async def plan_flatten(self, disk: str) -> Plan[FlattenPlan, FlattenPlan]:
        """What :meth:`flatten` would do now."""
        return await self._plan(
            "flatten",
            lambda context: flatten.preview(context, self.name, disk),
            plans.of_flatten,
            lambda vm, report: vm.flatten(disk, report=report),
        )

    async def plan_attach_disk(
        self, disk: Mapping[str, object] | DiskSpec, *, folders: Sequence[Path] = ()
    ) -> Plan[Attached, Attached]:
        """What :meth:`attach_disk` would do now."""
        make = attach.wanted(disk, folder=Path.cwd(), guest_dir=self._context.home.guest)
        return await self._plan(
            "attach_disk",
            lambda context: attach.preview(context, self.name, make, folders=folders),
            plans.of_attach,
            lambda vm, _: vm.attach_disk(disk, folders=folders),
        )

    async def plan_detach_disk(self, disk: str, *, timeout: float = 30.0) -> Plan[Detached, Detached]:
        """What :meth:`detach_disk` would do now."""
        return await self._plan(
            "detach_disk",
            lambda context: detach.preview(context, self.name, disk),
            plans.of_detach,
            lambda vm, _: vm.detach_disk(disk, timeout=timeout),
        )

    async def plan_attach_nic(self, nic: Mapping[str, object] | NicSpec) -> Plan[Nic, Nic]:
        """What :meth:`attach_nic` would do now."""
        make = nics.wanted(nic, folder=Path.cwd(), guest_dir=self._context.home.guest)
        return await self._plan(
            "attach_nic",
            lambda context: nics.preview_attach(context, self.name, make),
            plans.of_nic("attach"),
            lambda vm, _: vm.attach_nic(nic),
        )

    async def plan_detach_nic(self, nic: str | int, *, timeout: float = 30.0) -> Plan[Nic, Nic]:
        """What :meth:`detach_nic` would do now."""
        return await self._plan(
            "detach_nic",
            lambda context: nics.preview_detach(context, self.name, nic),
            plans.of_nic("detach"),
            lambda vm, _: vm.detach_nic(nic, timeout=timeout),
        )
