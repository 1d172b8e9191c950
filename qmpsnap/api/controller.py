"""The library's API: composes, decides nothing.

::

    async with qmpsnap.open() as q:
        vm = await q.start("machine.yaml")
        snap = await vm.snapshot("before")
        await vm.run("rm -rf /data")
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qmpsnap.api import forks
from qmpsnap.api.job import Running, end_all
from qmpsnap.api.later import Later
from qmpsnap.api.machine_handle import MachineHandle
from qmpsnap.errors import NotFoundError, UsageError
from qmpsnap.host.borders import border
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.base.context import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from qmpsnap.model.operations.operation import DefinePlan, Operation
    from qmpsnap.ops.base.context import Context
    from qmpsnap.ops.lifecycle import adopt, define, dry_run
    from qmpsnap.ops.lifecycle.adopt import Adopted, Survey
else:
    adopt, define, dry_run = Later("ops.lifecycle.adopt"), Later("ops.lifecycle.define"), Later("ops.lifecycle.dry_run")


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

        Raises:
            NotFoundError: there is none.
        """
        await self.context.astore.machine(name)
        return self._handle(name)

    async def recover(self, name: str) -> list[Operation]:
        """End what is open of a machine, or of a name that is none, as define or undefine died; returns it as it was.

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
    ) -> MachineHandle:
        """Record a machine and create its disks.

        Args:
            spec: a spec, or the path of a spec file, whose folder is then one that images may lie in.
            folders: further folders that images may lie in.
            allow_extra: accept the spec's ``extra`` QEMU arguments.

        Raises:
            SpecError: the spec describes no machine this QEMU can run.
            NameTaken: there is a machine of that name.
            ImageRefused: an image is not what the spec says, or not in an allowed folder.
        """
        wanted, allowed = self._wanted(spec, folders)
        machine = await define.run(self.context, wanted, folders=allowed, allow_extra=allow_extra)
        return self._handle(machine.name)

    async def preview_define(
        self,
        spec: MachineSpec | str | os.PathLike[str],
        *,
        folders: Sequence[Path] = (),
        allow_extra: bool = False,
    ) -> DefinePlan:
        """What :meth:`define` would do now, without doing it; refused as that would be."""
        wanted, allowed = self._wanted(spec, folders)
        return await dry_run.defined(self.context, wanted, folders=allowed, allow_extra=allow_extra)

    def _wanted(
        self, spec: MachineSpec | str | os.PathLike[str], folders: Sequence[Path]
    ) -> tuple[MachineSpec, Sequence[Path]]:
        """A spec as a value, and the folders that its images may lie in."""
        if isinstance(spec, MachineSpec):
            from qmpsnap.machine.config import specfile  # as above

            return specfile.checked(spec, folder=Path.cwd(), guest_dir=self.context.home.guest), folders
        return self.read_spec(spec), (*folders, Path(spec).absolute().parent)

    async def preview_adopt(self, name: str, socket: str | os.PathLike[str]) -> tuple[Survey, DefinePlan]:
        """What :meth:`adopt` would find and record now, without doing it; refused as that would be."""
        return await adopt.preview(self.context, name, Path(socket))

    async def adopt(self, name: str, socket: str | os.PathLike[str]) -> Adopted:
        """Take over a QEMU that somebody else launched; it does not notice. ``machine(name)`` then is its handle.

        Args:
            name: what the machine will be called.
            socket: its QMP monitor, which nobody else may hold.

        Raises:
            NameTaken: there is a machine of that name.
            QemuGone: no QEMU answers there.
            DeadlinePassed: somebody listens there and is silent.
            StateError: it is known already, has jobs, or an image is not a file that can be taken over.
            StoreMismatch: a file is not what QEMU says it is.
        """
        return await adopt.run(self.context, name, Path(socket))

    async def start(self, spec: str | os.PathLike[str], *, paused: bool = False) -> MachineHandle:
        """Start a machine, defining it first if the store does not have it.

        Args:
            spec: path of a spec file, or the name of a machine. Of a machine that is defined already the file gives
                only the name: what else has changed in it since is not looked at.
            paused: leave the vCPUs stopped.

        Raises:
            SpecError: the file describes no machine, or there is none.
            UsageError: there are both a file and a machine of that name.
            NotFoundError: no machine of that name.
            QmpsnapError: as :meth:`define` and :meth:`MachineHandle.start`.
        """
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

    async def _require_one_meaning(self, name: str) -> None:
        if os.sep not in name and name in {found.name for found in await self.context.astore.machines()}:
            raise UsageError(
                f"{name!r} names both a machine and the file {Path.cwd() / name}",
                hint=f"write ./{name} for the file, or start() of machine({name!r})",
                machine=name,
            )
