"""What each verb of a machine would do: nothing is locked, ended, made or changed for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from msgspec.structs import replace

from qmpsnap.api import asked
from qmpsnap.api.job import Job
from qmpsnap.api.machine_life import MachineLife
from qmpsnap.errors import UsageError
from qmpsnap.host.borders import border
from qmpsnap.later import Later
from qmpsnap.model.planning.expectation import Expectation
from qmpsnap.qmp.jobs import unreported

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from typing import Literal, Self, Unpack

    from qmpsnap.api import plans
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.api.outcomes import Committed, Deleted, Mirrored, Streamed
    from qmpsnap.api.plans import Plan, Shape
    from qmpsnap.model.layers.chain import Layer
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.layers.vmstate import Compression
    from qmpsnap.model.machines.spec import Format
    from qmpsnap.model.operations.by import DeleteBy, LoadBy, MirrorBy
    from qmpsnap.model.operations.operation import CreatePlan, InternalPlan, MergePlan, MirrorPlan
    from qmpsnap.ops import save, stack
    from qmpsnap.ops.base.context import Context
    from qmpsnap.ops.fork import run as forks
    from qmpsnap.ops.fork.run import Forked
    from qmpsnap.ops.fork.run import Preview as ForkPreview
    from qmpsnap.ops.internal import create as internal
    from qmpsnap.ops.lifecycle import change, dry_run, resize, undefine
    from qmpsnap.ops.lifecycle.dry_run import Forgotten
    from qmpsnap.ops.merge import commit
    from qmpsnap.ops.mirror import mirror
    from qmpsnap.ops.mirror.mirror import Mode
    from qmpsnap.ops.revert import revert
    from qmpsnap.ops.revert.plan import HardwareOf, Run
    from qmpsnap.ops.revert.revert import Preview, Reverted
    from qmpsnap.ops.snapshot import create, delete, describe, rename
    from qmpsnap.ops.snapshot import request as wishes
    from qmpsnap.ops.snapshot.delete import DeletePlan
    from qmpsnap.ops.snapshot.request import (
        DiskOptions,
        Files,
        FullOptions,
        InternalOptions,
        Kind,
        SnapshotOptions,
        VolumeOptions,
    )
    from qmpsnap.ops.stack import PopPreview
    from qmpsnap.qmp.jobs import Report
else:
    plans = Later("api.plans")
    save, stack = Later("ops.save"), Later("ops.stack")
    forks = Later("ops.fork.run")
    internal, dry_run = Later("ops.internal.create"), Later("ops.lifecycle.dry_run")
    change, resize = Later("ops.lifecycle.change"), Later("ops.lifecycle.resize")
    commit, mirror, revert = Later("ops.merge.commit"), Later("ops.mirror.mirror"), Later("ops.revert.revert")
    create, delete, rename = Later("ops.snapshot.create"), Later("ops.snapshot.delete"), Later("ops.snapshot.rename")
    describe, wishes = Later("ops.snapshot.describe"), Later("ops.snapshot.request")

D = TypeVar("D")
F = TypeVar("F")
R = TypeVar("R")


@border
class MachinePlans(MachineLife):
    """The plans of :class:`qmpsnap.MachineHandle`; each is refused as its verb, and while an operation is open."""

    def apply(self, plan: Plan[Any, R], *, report: Report = unreported) -> Job[R]:
        """Carry a plan out, if the machine is as it was when the plan was made; returns what its verb returns.

        Refused if the guest was started, stopped, paused or resumed since, or if its layers or snapshots are others;
        not because of data that it wrote to its disks.

        Args:
            plan: from a ``plan_*`` method of this machine; it can be applied once.
            report: told about the progress of jobs.

        Raises:
            StateError: the machine has changed since; nothing was done.
            UsageError: it is a plan of another machine.
            QmpsnapError: as the verb does.
        """

        async def act(tell: Report) -> R:
            if plan.machine != self.name or plan._expects is None:  # noqa: SLF001 - made here
                raise UsageError(f"this is a plan of machine {plan.machine}, not of {self.name}")

            def both(info: Any) -> None:
                tell(info)
                report(info)

            seen = plan._expects.seen  # noqa: SLF001
            context = replace(self._context, expects=Expectation(seen, met=seen is None))
            return await plan._act(self._of(context), both)  # noqa: SLF001

        return Job(self, plan.verb, act)

    def _of(self, context: Context) -> Self:
        return type(self)(context, self.name, self._running)

    async def _plan(
        self,
        verb: str,
        preview: Callable[[Context], Coroutine[Any, Any, F]],
        shape: Callable[[F], Shape[D]],
        act: Callable[[MachineHandle, Report], Awaitable[R]],
    ) -> Plan[D, R]:
        """What ``preview`` finds, in the ``shape`` of all plans; ``act`` is the verb."""
        expects = Expectation()
        found = shape(await preview(replace(self._context, expects=expects)))
        return plans.Plan(
            verb=verb,
            machine=self.name,
            summary=found.summary,
            qmp=found.qmp,
            bytes=found.bytes,
            files=found.files,
            details=found.details,
            _expects=expects,
            _act=act,
        )

    @overload
    async def plan_snapshot(
        self, name: str | None = None, *, kind: Literal["disk"] = "disk", **options: Unpack[DiskOptions]
    ) -> Plan[CreatePlan, Snapshot]: ...

    @overload
    async def plan_snapshot(
        self, name: str | None = None, *, kind: Literal["full"], **options: Unpack[FullOptions]
    ) -> Plan[CreatePlan, Snapshot]: ...

    @overload
    async def plan_snapshot(
        self, name: str | None = None, *, kind: Literal["volume"], **options: Unpack[VolumeOptions]
    ) -> Plan[CreatePlan, Snapshot]: ...

    @overload
    async def plan_snapshot(
        self, name: str | None = None, *, kind: Literal["internal"], **options: Unpack[InternalOptions]
    ) -> Plan[InternalPlan, Snapshot]: ...

    async def plan_snapshot(
        self, name: str | None = None, *, kind: Kind = "disk", **options: Any
    ) -> Plan[Any, Snapshot]:
        """A plan of what :meth:`snapshot` would do now; no agent is asked to freeze file systems for it."""
        request = wishes.requested(kind, name, cast("SnapshotOptions", options))
        verb: Any = internal if isinstance(request, internal.InternalRequest) else create
        return await self._plan(
            "snapshot",
            lambda context: verb.preview(context, self.name, request),
            cast("Callable[[Any], Shape[Any]]", plans.of_snapshot),
            lambda vm, report: vm.snapshot(name, kind=kind, report=report, **options),
        )

    async def plan_save(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        description: str = "",
        compression: Compression = "none",
    ) -> Plan[CreatePlan, Snapshot]:
        """What :meth:`save` would do now."""
        request = save.wanted(asked.to_save(file, name, description, compression))
        return await self._plan(
            "save",
            lambda context: create.preview(context, self.name, request),
            plans.of_create,
            lambda vm, report: vm.save(
                file, name=name, description=description, compression=compression, report=report
            ),
        )

    async def plan_restore(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        discard: bool = False,
        paused: bool = False,
        after: bool = True,
    ) -> Plan[Preview, Reverted]:
        """What :meth:`restore` would do now."""
        request = asked.to_restore(file, discard=discard, paused=paused, after=after)
        return await self._plan(
            "restore",
            lambda context: save.preview_restore(context, self.name, request),
            plans.of_revert,
            lambda vm, _: vm.restore(file, discard=discard, paused=paused, after=after),
        )

    async def plan_add_layers(
        self, *, disks: Sequence[str] | None = None, files: Files | None = None
    ) -> Plan[CreatePlan, tuple[Layer, ...]]:
        """What :meth:`add_layers` would do now."""
        request = asked.layers(disks, files)
        return await self._plan(
            "add_layers",
            lambda context: create.preview(context, self.name, request),
            plans.of_create,
            lambda vm, _: vm.add_layers(disks=disks, files=files),
        )

    async def plan_revert(
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
        request = asked.to_revert(snapshot, discard=discard, state=state, hardware=hardware, after=after, by=by)
        return await self._plan(
            "revert",
            lambda context: revert.preview(context, self.name, request),
            plans.of_revert,
            lambda vm, _: vm.revert(snapshot, discard=discard, state=state, hardware=hardware, after=after, by=by),
        )

    async def plan_push(self, name: str | None = None, *, description: str = "") -> Plan[CreatePlan, Snapshot]:
        """What :meth:`push` would do now."""
        request = asked.to_push(name, description)
        return await self._plan(
            "push",
            lambda context: create.preview(context, self.name, request),
            plans.of_create,
            lambda vm, _: vm.push(name, description=description),
        )

    async def plan_pop(self, *, discard: bool = False, bandwidth: int = 0) -> Plan[PopPreview, Reverted]:
        """A plan of what :meth:`pop` would do now; its ``qmp`` has only the commands of the revert."""
        return await self._plan(
            "pop",
            lambda context: stack.preview(context, self.name, discard=discard),
            plans.of_pop,
            lambda vm, report: vm.pop(discard=discard, bandwidth=bandwidth, report=report),
        )

    async def plan_commit(
        self,
        disk: str,
        *,
        base: Snapshot | str | None = None,
        top: Snapshot | str | None = None,
        consume: bool = False,
        bandwidth: int = 0,
    ) -> Plan[MergePlan, Committed]:
        """What :meth:`commit` would do now."""
        request = asked.to_commit(disk, base=base, top=top, consume=consume, bandwidth=bandwidth)
        return await self._plan(
            "commit",
            lambda context: commit.preview(context, self.name, request),
            plans.of_merge,
            lambda vm, report: vm.commit(disk, base=base, top=top, consume=consume, bandwidth=bandwidth, report=report),
        )

    async def plan_stream(
        self, disk: str, *, base: Snapshot | str | None = None, bandwidth: int = 0
    ) -> Plan[MergePlan, Streamed]:
        """What :meth:`stream` would do now."""
        request = asked.to_stream(disk, base=base, bandwidth=bandwidth)
        return await self._plan(
            "stream",
            lambda context: commit.preview(context, self.name, request),
            plans.of_merge,
            lambda vm, report: vm.stream(disk, base=base, bandwidth=bandwidth, report=report),
        )

    async def plan_mirror(
        self,
        disk: str,
        target: str | os.PathLike[str],
        *,
        mode: Mode,
        shallow: bool = False,
        reuse: bool = False,
        format: Format | None = None,  # noqa: A002 - as in a spec
        write_blocking: bool = False,
        bandwidth: int = 0,
        by: MirrorBy = "blockdev-mirror",
    ) -> Plan[MirrorPlan, Mirrored]:
        """What :meth:`mirror` would do now."""
        options: dict[str, Any] = {"mode": mode, "shallow": shallow, "reuse": reuse, "format": format}
        options |= {"write_blocking": write_blocking, "bandwidth": bandwidth, "by": by}
        request = asked.to_mirror(disk, target, **options)
        return await self._plan(
            "mirror",
            lambda context: mirror.preview(context, self.name, request),
            plans.of_mirror,
            lambda vm, report: vm.mirror(disk, target, report=report, **options),
        )

    async def plan_fork(
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
        options: dict[str, Any] = {"count": count, "ephemeral": ephemeral, "paused": paused}
        options |= {"identity": identity, "description": description}
        request = asked.to_fork(snapshot, name, **options)

        async def act(vm: MachineHandle, _: Report) -> list[Forked]:
            again = await vm.plan_fork(snapshot, name, **options)
            plans.require_same((again.summary, again.files), (plan.summary, plan.files), self.name)
            return await vm.fork(snapshot, name, **options)

        plan: Plan[ForkPreview, list[Forked]] = await self._plan(
            "fork", lambda context: forks.preview(context, self.name, request), plans.of_fork(self.name), act
        )
        return plan

    async def plan_delete_snapshots(
        self,
        *names: Snapshot | str,
        children: bool = False,
        metadata: bool = False,
        flatten: bool = False,
        bandwidth: int = 0,
        by: DeleteBy | None = None,
    ) -> Plan[DeletePlan, Deleted]:
        """What :meth:`delete_snapshots` would do now."""
        how = {"children": children, "metadata": metadata, "flatten": flatten}
        request = asked.to_delete(names, bandwidth=bandwidth, by=by, **how)
        return await self._plan(
            "delete_snapshots",
            lambda context: delete.preview(context, self.name, request),
            plans.of_delete,
            lambda vm, report: vm.delete_snapshots(*names, bandwidth=bandwidth, by=by, report=report, **how),
        )

    async def plan_undefine(self, *, disks: undefine.Fate | None = None) -> Plan[Forgotten, list[str]]:
        """What :meth:`undefine` would do now."""
        return await self._plan(
            "undefine",
            lambda context: dry_run.forgotten(context, self.name, disks=disks),
            plans.of_undefine(self.name),
            lambda vm, _: vm.undefine(disks=disks),
        )
