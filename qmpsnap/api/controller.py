"""The library's API: composes, decides nothing.

::

    async with qmpsnap.open() as q:
        vm = await q.define("machine.yaml", exist_ok=True)
        await vm.start()
        snap = await vm.snapshot("before")
        await vm.run("rm -rf /data")
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qmpsnap.api import forks, old_names
from qmpsnap.api.job import Running, end_all
from qmpsnap.api.machine_handle import MachineHandle
from qmpsnap.errors import NameTaken, NotFoundError, UsageError
from qmpsnap.host.borders import border
from qmpsnap.later import Later
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.base.context import opened
from qmpsnap.qmp.jobs import unreported

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from qmpsnap.api import plans
    from qmpsnap.api.plans import Plan
    from qmpsnap.model.operations.operation import DefinePlan, Operation
    from qmpsnap.ops.adoption import adopt
    from qmpsnap.ops.adoption.adopt import Survey
    from qmpsnap.ops.base.context import Context
    from qmpsnap.ops.lifecycle import define, dry_run
else:
    plans = Later("api.plans")
    adopt, define, dry_run = Later("ops.adoption.adopt"), Later("ops.lifecycle.define"), Later("ops.lifecycle.dry_run")

R = TypeVar("R")


@asynccontextmanager
async def open_controller(
    home: str | os.PathLike[str] | None = None, *, secrets: Mapping[str, bytes] | None = None
) -> AsyncIterator[Controller]:
    """A controller for the block: ``async with qmpsnap.open() as q``.

    Args:
        home: folder that holds everything, as ``QMPSNAP_HOME`` does; None goes by the environment, in which
            ``QMPSNAP_QEMU`` and ``QMPSNAP_QEMU_IMG`` name other binaries.
        secrets: keys of encrypted disks by ``machine/disk``, for those whose spec names no file with it, or instead.

    Raises:
        StoreTooNew: a newer qmpsnap wrote the store.
        HostCannot: the store cannot be opened.
    """
    async with opened(home, secrets=secrets) as context:
        await forks.sweep(context)
        controller = Controller(context)
        try:
            yield controller
        finally:
            await end_all(controller._running)  # noqa: SLF001


@border
class Controller(forks.Templates):
    """All machines of one store, from :func:`qmpsnap.open`."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._running: Running = set()

    def _handle(self, name: str) -> MachineHandle:
        return MachineHandle(self.context, name, self._running)

    async def machines(self) -> tuple[MachineHandle, ...]:
        """Every machine of the store, by name."""
        return tuple(self._handle(found.name) for found in await self.context.astore.machines())

    async def machine(self, name: str) -> MachineHandle:
        """The machine of that name.

        Args:
            name: its name; never a path.

        Raises:
            NotFoundError: there is none.
        """
        await self.context.astore.machine(name)
        return self._handle(name)

    async def recover(self, name: str) -> list[Operation]:
        """End what is open of a machine, or of a name where define or undefine died; returns it as it was.

        Args:
            name: of the machine.

        Raises:
            NotFoundError: there is neither.
        """
        try:
            vm = await self.machine(name)
        except NotFoundError:
            return await define.undo(self.context, name)
        return await vm.recover()

    def read_spec(self, path: str | os.PathLike[str]) -> MachineSpec:
        """A spec file as a value.

        Args:
            path: of the file.

        Raises:
            SpecError: it describes no machine; the message has file, line and column.
        """
        from qmpsnap.machine.config import specfile  # YAML is slow to load and only needed here
        from qmpsnap.machine.config.launch_dir import launch_dir

        return specfile.read(Path(path), guest_dir=self.context.home.guest, profile_dir=launch_dir() / "profiles")

    async def define(
        self,
        spec: MachineSpec | str | os.PathLike[str],
        *,
        folders: Sequence[Path] = (),
        allow_extra: bool = False,
        exist_ok: bool = False,
    ) -> MachineHandle:
        """Record a machine and create its disks.

        Args:
            spec: a spec, or the path of a spec file, whose folder is then one that images may lie in.
            folders: further folders that images may lie in.
            allow_extra: accept the spec's ``extra`` QEMU arguments.
            exist_ok: return the handle of the machine of that name, if it was defined with the same spec.

        Raises:
            SpecError: the spec describes no machine this QEMU can run.
            NameTaken: there is a machine of that name; the message names what its spec has otherwise.
            ImageRefused: an image is not what the spec says, or not in an allowed folder.
        """
        wanted, allowed = self._wanted(spec, folders)
        try:
            machine = await define.run(self.context, wanted, folders=allowed, allow_extra=allow_extra)
        except NameTaken as error:
            if await self._says_the_same(wanted, error) and exist_ok:
                return self._handle(wanted.name)
            raise
        return self._handle(machine.name)

    async def _says_the_same(self, wanted: MachineSpec, error: NameTaken) -> bool:
        """Whether the machine that has the name was defined so; tell the error where it was not."""
        from qmpsnap.model.machines.spec_differences import differences

        record = await self.context.astore.machine(wanted.name)
        if record.adopted:
            error.add("it was adopted")
            return False
        if wanted.uuid not in ("", record.uuid):
            error.add(f"its UUID is {record.uuid}")
            return False
        if other := differences(record.spec, wanted.recorded):
            error.add(f"its spec differs: {', '.join(other)}")
        return not other

    async def plan_define(
        self,
        spec: MachineSpec | str | os.PathLike[str],
        *,
        folders: Sequence[Path] = (),
        allow_extra: bool = False,
    ) -> Plan[DefinePlan, MachineHandle]:
        """What :meth:`define` would do now; refused as that would be."""
        wanted, allowed = self._wanted(spec, folders)
        found = await dry_run.defined(self.context, wanted, folders=allowed, allow_extra=allow_extra)

        async def act(q: Controller) -> MachineHandle:
            again = await q.plan_define(wanted, folders=allowed, allow_extra=allow_extra)
            plans.require_same(again.files, shape.files, found.machine)
            return await q.define(wanted, folders=allowed, allow_extra=allow_extra)

        shape = plans.of_define("define", found, found)
        return plans.planned("define", found.machine, shape, act)

    def _wanted(
        self, spec: MachineSpec | str | os.PathLike[str], folders: Sequence[Path]
    ) -> tuple[MachineSpec, Sequence[Path]]:
        """A spec as a value, and the folders that its images may lie in."""
        if isinstance(spec, MachineSpec):
            from qmpsnap.machine.config import specfile  # as above

            return specfile.checked(spec, folder=Path.cwd(), guest_dir=self.context.home.guest), folders
        return self.read_spec(spec), (*folders, Path(spec).absolute().parent)

    async def adopt(self, name: str, socket: str | os.PathLike[str], *, own: bool = False) -> MachineHandle:
        """Take over a QEMU that somebody else launched; it does not notice.

        Args:
            name: what the machine will be called.
            socket: its QMP monitor, which nobody else may hold.
            own: the images that the guest writes to become qmpsnap's: merges write to them and remove them.

        Raises:
            NameTaken: there is a machine of that name.
            QemuGone: no QEMU answers there.
            DeadlinePassed: somebody listens there and is silent.
            StateError: it is known already, has jobs, or an image is not a file that can be taken over.
            StoreMismatch: a file is not what QEMU says it is.
        """
        return self._handle((await adopt.run(self.context, name, Path(socket), own=own)).machine.name)

    async def plan_adopt(
        self, name: str, socket: str | os.PathLike[str], *, own: bool = False
    ) -> Plan[tuple[Survey, DefinePlan], MachineHandle]:
        """What :meth:`adopt` would find (``details``) and record now; refused as that would be."""
        found, plan = await adopt.preview(self.context, name, Path(socket), own=own)

        async def act(q: Controller) -> MachineHandle:
            again = await q.plan_adopt(name, socket, own=own)
            mine, now = found.machine.process, again.details[0].machine.process
            assert mine
            assert now
            plans.require_same((again.files, now.pid, now.start_ticks), (shape.files, mine.pid, mine.start_ticks), name)
            return await q.adopt(name, socket, own=own)

        shape = plans.of_define("adopt", plan, (found, plan))
        return plans.planned("adopt", name, shape, act)

    async def apply(self, plan: Plan[Any, R]) -> R:
        """Carry a plan out, also one of a machine's: see :meth:`MachineHandle.apply`.

        Args:
            plan: from a ``plan_*`` method of this controller or of one of its machines.

        Raises:
            StateError: the verb would now do something else; nothing was done.
            QmpsnapError: as the verb does.
        """
        if plan._expects:  # noqa: SLF001 - made by a handle
            return await (await self.machine(plan.machine)).apply(plan)
        return await plan._act(self, unreported)  # noqa: SLF001

    async def start(self, spec: str | os.PathLike[str], *, paused: bool = False) -> MachineHandle:
        """Start a machine by its name or spec file, of which only the name counts if it is defined; for one release.

        Raises:
            SpecError: the file describes no machine, or there is none.
            UsageError: there are both a file and a machine of that name.
            NotFoundError: no machine of that name.
            QmpsnapError: as :meth:`define` and :meth:`MachineHandle.start`.
        """
        old_names.warn("q.start()", "start() of define(path, exist_ok=True), or of machine(name)")
        name = os.fspath(spec)
        if os.sep in name or Path(name).is_file():
            await self._require_one_meaning(name)
            wanted = self.read_spec(name)
            try:
                vm = await self.machine(wanted.name)
            except NotFoundError:
                vm = await self.define(name)
        else:
            vm = await self.machine(name)
        await vm.start(paused=paused)
        return vm

    start.__deprecated__ = True  # type: ignore[attr-defined] # as PEP 702 has it
    preview_define = old_names.previewed("define", old_names.details)
    preview_adopt = old_names.previewed("adopt", old_names.details)

    async def _require_one_meaning(self, name: str) -> None:
        if os.sep not in name and name in {found.name for found in await self.context.astore.machines()}:
            raise UsageError(
                f"{name!r} names both a machine and the file {Path.cwd() / name}",
                hint=f"write ./{name} for the file, or start() of machine({name!r})",
                machine=name,
            )
