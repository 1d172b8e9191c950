"""The library's API: composes, decides nothing.

::

    async with qmpsnap.open() as q:
        vm = await q.start("machine.yaml")
        snap = await vm.snapshot("before")
        await vm.run("rm -rf /data")
"""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.block.image import ImageTool
from qmpsnap.errors import NotFoundError, QmpError
from qmpsnap.machine import agent
from qmpsnap.machine.agent import Completed
from qmpsnap.machine.argv import AGENT_SOCKET
from qmpsnap.machine.recipes import launch_dir
from qmpsnap.model.chain import Layer
from qmpsnap.model.home import Home
from qmpsnap.model.machine import Machine, Process
from qmpsnap.model.operation import CreatePlan, MergePlan, MirrorPlan, Operation
from qmpsnap.model.snapshot import Snapshot
from qmpsnap.model.spec import Format, MachineSpec
from qmpsnap.ops import adopt, commit, compare, create, define, delete, mirror, power, rename, revert, stack, undefine
from qmpsnap.ops.adopt import Adopted
from qmpsnap.ops.commit import CommitRequest, StreamRequest
from qmpsnap.ops.compare import ChainView
from qmpsnap.ops.context import Context, blocking, this_host
from qmpsnap.ops.create import CreateRequest
from qmpsnap.ops.delete import DeletePlan, DeleteRequest
from qmpsnap.ops.mirror import MirrorRequest, Mode
from qmpsnap.ops.revert import Preview, Reverted, RevertRequest, Run
from qmpsnap.ops.work import working
from qmpsnap.qmp import commands
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.store.sqlite import SqliteStore

Files = Mapping[str, str | os.PathLike[str]]
"""Disk to a path for its new layer; a relative one begins at the working directory."""


@asynccontextmanager
async def open_controller(home: str | os.PathLike[str] | None = None) -> AsyncIterator["Controller"]:
    """A controller for the block: ``async with qmpsnap.open() as q``.

    Args:
        home: folder that holds everything, as ``QMPSNAP_HOME`` does; None goes by the environment, in which
            ``QMPSNAP_QEMU`` and ``QMPSNAP_QEMU_IMG`` name other binaries.

    Raises:
        StoreTooNew: a newer qmpsnap wrote the store.
        HostCannot: the store cannot be opened.
    """
    environment = dict(os.environ)
    if home is not None:
        environment["QMPSNAP_HOME"] = os.fspath(home)
    places = Home.from_environment(environment, uid=os.geteuid())
    store = await blocking(lambda: SqliteStore(places.store, machines=places.machines))
    context = Context(
        home=places,
        store=store,
        qemu=environment.get("QMPSNAP_QEMU") or "qemu-system-x86_64",
        image=ImageTool(environment.get("QMPSNAP_QEMU_IMG") or "qemu-img"),
        host=this_host(),
    )
    try:
        yield Controller(context)
    finally:
        store.close()


class Controller:
    """All machines of one store, from :func:`qmpsnap.open`."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def machines(self) -> tuple["MachineHandle", ...]:
        """Every machine of the store, by name."""
        return tuple(MachineHandle(self.context, found.name) for found in await blocking(self.context.store.machines))

    async def machine(self, name: str) -> "MachineHandle":
        """The machine of that name.

        Raises:
            NotFoundError: there is none.
        """
        await blocking(self.context.store.machine, name)
        return MachineHandle(self.context, name)

    def read_spec(self, path: str | os.PathLike[str]) -> MachineSpec:
        """A spec file as a value.

        Raises:
            SpecError: it describes no machine; the message has file, line and column.
        """
        from qmpsnap.machine import specfile  # YAML is slow to load and only needed here

        return specfile.read(Path(path), guest_dir=self.context.home.guest, profile_dir=launch_dir() / "profiles")

    async def define(
        self,
        spec: MachineSpec | str | os.PathLike[str],
        *,
        folders: Sequence[Path] = (),
        allow_extra: bool = False,
    ) -> "MachineHandle":
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
        if not isinstance(spec, MachineSpec):
            folders = (*folders, Path(spec).absolute().parent)
            spec = self.read_spec(spec)
        machine = await define.run(self.context, spec, folders=folders, allow_extra=allow_extra)
        return MachineHandle(self.context, machine.name)

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

    async def start(self, spec: str | os.PathLike[str], *, paused: bool = False) -> "MachineHandle":
        """Start a machine, defining it first if the store does not have it.

        Args:
            spec: path of a spec file, or the name of a machine.
            paused: leave the vCPUs stopped.
        """
        name = os.fspath(spec)
        if Path(name).is_file():
            wanted = self.read_spec(name)
            try:
                vm = await self.machine(wanted.name)
            except NotFoundError:
                vm = await self.define(name)
        else:
            vm = await self.machine(name)
        await vm.start(paused=paused)
        return vm


class MachineHandle:
    """One machine of the store, by name."""

    def __init__(self, context: Context, name: str) -> None:
        self._context = context
        self.name = name

    async def record(self) -> Machine:
        """The machine as the store has it."""
        return await blocking(self._context.store.machine, self.name)

    async def start(self, *, paused: bool = False) -> Process:
        """Start QEMU and return once its monitor answers; ``paused`` leaves the vCPUs stopped.

        Raises:
            StateError: it runs already.
            StoreMismatch: an image is not the one the store knows.
            QemuGone: QEMU ended at once.
        """
        return await power.start(self._context, self.name, paused=paused)

    async def stop(self, *, force: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Switch the guest off, waiting up to ``timeout`` seconds (60); ``force`` then ends QEMU.

        Raises:
            StateError: it does not run.
            DeadlinePassed: the guest did not switch itself off.
        """
        await power.stop(self._context, self.name, force=force, timeout=timeout)

    async def is_running(self) -> bool:
        """Whether a QEMU runs for the machine, whatever state its guest is in."""
        return self._context.process(await self.record()) is not None

    async def state(self) -> str:
        """QEMU's word for the run state (``running``, ``paused`` ...), or ``stopped``."""
        return await compare.state(self._context, await self.record())

    async def snapshot(
        self,
        name: str | None = None,
        *,
        description: str = "",
        disks: Sequence[str] | None = None,
        files: Files | None = None,
    ) -> Snapshot:
        """Take a snapshot of the disks, all at one instant, without stopping the guest.

        Args:
            name: its name; None takes the next free ``snap-N``.
            description: free text.
            disks: names of the disks; None takes all that the spec does not leave out.
            files: disk to the path of its new layer, where that is to be a place of the caller's choice.

        Raises:
            NameTaken: there is a snapshot of that name.
            UsageError: a file for a disk that is not included, or at a place that cannot be chosen.
            StateError: a disk is read-only or busy with a job, or something is at the path of a file.
            StoreMismatch: QEMU's chains are not the store's.
        """
        return await create.run(self._context, self.name, _request(name, description, disks, files))

    async def preview_snapshot(
        self,
        name: str | None = None,
        *,
        description: str = "",
        disks: Sequence[str] | None = None,
        files: Files | None = None,
    ) -> tuple[Machine, CreatePlan]:
        """What :meth:`snapshot` would do now, without doing it."""
        return await create.preview(self._context, self.name, _request(name, description, disks, files))

    async def add_layers(self, *, disks: Sequence[str] | None = None, files: Files | None = None) -> tuple[Layer, ...]:
        """Put a new empty layer on every disk as :meth:`snapshot` does, but list no snapshot; returns those layers.

        Args:
            disks: names of the disks; None takes all that the spec does not leave out.
            files: as for :meth:`snapshot`.

        Raises:
            StateError: a disk is read-only or busy with a job.
            StoreMismatch: QEMU's chains are not the store's.
        """
        return await create.add_layers(self._context, self.name, _request(None, "", disks, files))

    async def preview_add_layers(
        self, *, disks: Sequence[str] | None = None, files: Files | None = None
    ) -> tuple[Machine, CreatePlan]:
        """What :meth:`add_layers` would do now, without doing it."""
        request = replace(_request(None, "", disks, files), listed=False)
        return await create.preview(self._context, self.name, request)

    async def revert(self, snapshot: Snapshot | str, *, discard: bool = False, state: Run | None = None) -> Reverted:
        """Go back to a snapshot: new empty layers on its points become active. A running guest is ended for it.

        Disks that the snapshot does not include stay as they are. What was written since is kept as an automatic
        snapshot, ``auto-N``, unless there is nothing.

        Args:
            snapshot: the snapshot, or its name.
            discard: remove what was written since instead.
            state: ``running`` or ``paused`` afterwards; None leaves the machine running, paused or stopped as it was.

        Raises:
            NotFoundError: there is none of that name.
            StateError: it is consumed or internal, or a job holds a disk.
            StoreMismatch: QEMU's chains or the files are not the store's.
        """
        return await revert.run(self._context, self.name, _revert_request(snapshot, discard, state))

    async def preview_revert(
        self, snapshot: Snapshot | str, *, discard: bool = False, state: Run | None = None
    ) -> Preview:
        """What :meth:`revert` would do now, without doing it."""
        return await revert.preview(self._context, self.name, _revert_request(snapshot, discard, state))

    async def push(self, name: str | None = None, *, description: str = "") -> Snapshot:
        """Take a snapshot to come back to with :meth:`pop`; the same as :meth:`snapshot`."""
        return await self.snapshot(name, description=description)

    async def pop(self, *, report: Report = unreported) -> Reverted:
        """Go back to the current snapshot, without what was written since, and delete it; its parent is current then.

        Args:
            report: told about the progress of jobs.

        Raises:
            StateError: there is no current snapshot, or it cannot be gone back to.
        """
        return await stack.pop(self._context, self.name, report=report)

    async def rename_snapshot(self, old: str, new: str) -> Snapshot:
        """Give a snapshot another name; returns it as it is now.

        Raises:
            NameRefused: the new name is not allowed.
            NotFoundError: there is no snapshot ``old``.
            NameTaken: there is a snapshot ``new``.
        """
        return await rename.run(self._context, self.name, old, new)

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots, oldest first."""
        return await blocking(self._context.store.snapshots, self.name)

    async def chains(self, disk: str | None = None) -> tuple[ChainView, ...]:
        """The layers of every disk (or one) as the store, QEMU and the files see them."""
        return await compare.chains(self._context, self.name, disk)

    async def run(self, command: str | Sequence[str], *, deadline: float = 60, check: bool = True) -> Completed:
        """Run a command in the guest through its agent.

        Args:
            command: program and arguments, or a line for the guest's ``/bin/sh``.
            deadline: seconds to wait for its end.
            check: raise when it ends with another status than 0.

        Raises:
            QmpError: the guest refused, or with ``check`` the command failed.
            DeadlinePassed: no agent, or the command takes longer.
        """
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        socket = self._context.home.run_dir(self.name) / AGENT_SOCKET
        async with agent.connect(socket, machine=self.name, deadline=deadline) as guest:
            done = await guest.run(words, deadline=deadline)
        if check and done.status:
            raise QmpError(
                f"{command!r} ended with status {done.status} in the guest of {self.name}:"
                f" {done.stderr.decode(errors='replace').strip()}",
                effect="applied",
                machine=self.name,
            )
        return done

    async def commit(
        self,
        disk: str,
        *,
        base: str | None = None,
        top: str | None = None,
        consume: bool = False,
        report: Report = unreported,
    ) -> MergePlan:
        """Merge the layers above ``base`` up to ``top`` into ``base``; the guest runs on.

        Args:
            disk: the disk.
            base: layer id or snapshot name; None is the lowest layer of the chain.
            top: layer id or snapshot name; None is the active layer.
            consume: agree that snapshots whose content ``base`` or a layer between holds become unreadable.
            report: told about the job's progress.

        Raises:
            StateError: base is above top, others read what would change, or snapshots would be lost unasked.
            HostCannot: not enough space; if it runs out on the way, the job is paused and can go on.
        """
        request = CommitRequest(disk=disk, base=base, top=top, consume=consume)
        return await commit.run(self._context, self.name, request, report=report)

    async def stream(self, disk: str, *, base: str | None = None, report: Report = unreported) -> MergePlan:
        """Let the active layer absorb what lies between it and ``base`` (everything, without it); nothing is lost.

        Raises:
            StateError: nothing lies between.
            HostCannot: not enough space.
        """
        return await commit.run(self._context, self.name, StreamRequest(disk=disk, base=base), report=report)

    async def mirror(
        self,
        disk: str,
        target: str | os.PathLike[str],
        *,
        mode: Mode,
        shallow: bool = False,
        reuse: bool = False,
        format: Format | None = None,  # noqa: A002 - as in a spec
        write_blocking: bool = False,
        report: Report = unreported,
    ) -> MirrorPlan:
        """Copy a disk; the guest runs on, and no snapshot is harmed.

        Args:
            disk: the disk.
            target: absolute path of the copy, or the URI of an NBD export (``finish`` only).
            mode: ``pivot``: the guest goes on with the copy. ``finish``: it stays, and the copy is the caller's.
            shallow: copy the active layer only; the copy has the same backing.
            reuse: overwrite the image that is at ``target``, exactly as large as the disk.
            format: of the copy; None is qcow2 for a new image, and what its header says for one that is there.
            write_blocking: the guest's writes wait for the copy, so that it cannot be outrun.
            report: told about the job's progress.

        Raises:
            ImageRefused: the image to reuse does not fit.
            StateError: something is at the target, or another process has it open.
            HostCannot: not enough space; if it runs out on the way, the job is paused and can go on.
        """
        request = MirrorRequest(
            disk=disk,
            target=os.fspath(target),
            mode=mode,
            shallow=shallow,
            reuse=reuse,
            format=format,
            write_blocking=write_blocking,
        )
        return await mirror.run(self._context, self.name, request, report=report)

    async def delete_snapshots(
        self, *names: str, children: bool = False, metadata: bool = False, report: Report = unreported
    ) -> DeletePlan:
        """Delete snapshots, moving as few bytes as possible.

        Args:
            names: the snapshots.
            children: also those that grew from them.
            metadata: only the names; the layers stay.
            report: told about each job's progress.

        Raises:
            NotFoundError: one is not there; nothing was deleted.
        """
        request = DeleteRequest(names=names, children=children, metadata=metadata)
        return await delete.run(self._context, self.name, request, report=report)

    async def jobs(self) -> tuple[JobInfo, ...]:
        """The jobs that the machine's QEMU has; none when it is stopped."""
        async with self._context.monitor(await self.record()) as qemu:
            return await commands.query_jobs(qemu) if qemu else ()

    async def wait(self, *, report: Report = unreported) -> list[Operation]:
        """See every job of an interrupted operation to its end; returns those operations as they were."""
        pending = await blocking(lambda: self._context.store.operations(self.name, only_open=True))
        async with working(self._context, self.name, "job wait", unfinished="carry on", report=report):
            return list(pending)

    async def cancel(self) -> list[Operation]:
        """Cancel every job of an interrupted operation: the chains stay as they are."""
        pending = await blocking(lambda: self._context.store.operations(self.name, only_open=True))
        async with working(self._context, self.name, "job cancel", unfinished="cancel"):
            return list(pending)

    async def recover(self) -> list[Operation]:
        """End what an earlier operation left open; returns those operations as they were."""
        pending = await blocking(lambda: self._context.store.operations(self.name, only_open=True))
        async with working(self._context, self.name, "recover"):
            return list(pending)

    async def undefine(self, *, disks: undefine.Fate | None = None) -> list[str]:
        """Forget the machine and its snapshots; see :func:`qmpsnap.ops.undefine.run`."""
        return await undefine.run(self._context, self.name, disks=disks)


def _request(
    name: str | None, description: str, disks: Sequence[str] | None, files: Files | None = None
) -> CreateRequest:
    chosen = {disk: str(Path(path).absolute()) for disk, path in (files or {}).items()}
    included = None if disks is None else tuple(disks)
    return CreateRequest(name=name, description=description, disks=included, files=chosen)


def _revert_request(snapshot: Snapshot | str, discard: bool, state: Run | None) -> RevertRequest:  # noqa: FBT001
    name = snapshot if isinstance(snapshot, str) else snapshot.name
    return RevertRequest(name=name, discard=discard, run=state)
