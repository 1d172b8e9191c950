"""One machine, for programs without asyncio.

Written by tests/api/sync_api.py from the source of ``qmpsnap.api``, whose docstrings say more.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from qmpsnap.qmp.jobs import unreported
from qmpsnap.sync.machine_plans import MachinePlans

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Literal, Unpack

    from qmpsnap.api.events import Event
    from qmpsnap.api.outcomes import Committed, Deleted, Mirrored, Streamed
    from qmpsnap.imports.found import Imported
    from qmpsnap.machine.agent import Completed, Trimmed
    from qmpsnap.model.layers.chain import Layer
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.layers.vmstate import Compression
    from qmpsnap.model.machines.record import Machine, Process
    from qmpsnap.model.machines.spec import DiskSpec, Format, MachineSpec, NicSpec
    from qmpsnap.model.machines.state import State
    from qmpsnap.model.operations.by import DeleteBy, LoadBy, MirrorBy
    from qmpsnap.model.operations.flatten import FlattenPlan
    from qmpsnap.model.operations.operation import Operation, ResizePlan
    from qmpsnap.ops.adoption.take import TakePlan
    from qmpsnap.ops.base.free_space import Shortage
    from qmpsnap.ops.check.check import Checked
    from qmpsnap.ops.devices.attach import Attached
    from qmpsnap.ops.devices.detach import Detached
    from qmpsnap.ops.devices.nics import Nic
    from qmpsnap.ops.fork.run import Forked
    from qmpsnap.ops.jobs.at_work import MachineJob
    from qmpsnap.ops.lifecycle import undefine
    from qmpsnap.ops.lifecycle.change import Changed
    from qmpsnap.ops.mirror.mirror import Mode
    from qmpsnap.ops.outside.compare import ChainView
    from qmpsnap.ops.revert.plan import HardwareOf, Run
    from qmpsnap.ops.revert.revert import Reverted
    from qmpsnap.ops.snapshot.request import DiskOptions, Files, FullOptions, InternalOptions, Kind, VolumeOptions
    from qmpsnap.qmp.jobs import Report
    from qmpsnap.sync.pool import ForkPool

R = TypeVar("R")


class MachineHandle(MachinePlans):
    """:class:`qmpsnap.MachineHandle` without ``await``."""

    def set(self, settings: Mapping[str, str] | MachineSpec, *, allow_extra: bool = False) -> Changed:
        """Give a stopped machine another spec; its disks and snapshots stay."""
        return self._call(self._handle.set(settings, allow_extra=allow_extra))

    def launched_as(self) -> Imported:
        """What the command line of an adopted machine's QEMU says, as a proposal for :meth:`take`."""
        return self._call(self._handle.launched_as())

    def take(self, spec: MachineSpec, *, allow_extra: bool = False) -> TakePlan:
        """Let qmpsnap launch an adopted machine, by this spec; its snapshots stay."""
        return self._call(self._handle.take(spec, allow_extra=allow_extra))

    def rename(self, new: str) -> Machine:
        """Give a stopped machine another name, and its folder with it; handles of the old name find it no more."""
        return self._call(self._handle.rename(new))

    def resize(self, disk: str, size: int | str) -> ResizePlan:
        """Let the guest see more bytes of a disk: of its active layer, as the layers below keep their size."""
        return self._call(self._handle.resize(disk, size))

    def flatten(self, disk: str, *, report: Report = unreported) -> FlattenPlan:
        """Let a clone in a Ceph cluster, as a revert makes one, have a copy of all that it reads of its snapshot."""
        return self._call(self._handle.flatten(disk, report=report))

    def attach_disk(self, disk: Mapping[str, object] | DiskSpec, *, folders: Sequence[Path] = ()) -> Attached:
        """Give a machine one more disk; its snapshots stay. A running QEMU plugs it in (QAPI ``device_add``)."""
        return self._call(self._handle.attach_disk(disk, folders=folders))

    def detach_disk(self, disk: str, *, timeout: float = 30.0) -> Detached:
        """Take a disk from a machine; no file is removed, and snapshots that include it stay."""
        return self._call(self._handle.detach_disk(disk, timeout=timeout))

    def attach_nic(self, nic: Mapping[str, object] | NicSpec) -> Nic:
        """Give a machine one more network card; a running QEMU plugs it in (QAPI ``netdev_add``, ``device_add``)."""
        return self._call(self._handle.attach_nic(nic))

    def detach_nic(self, nic: str | int, *, timeout: float = 30.0) -> Nic:
        """Take a network card from a machine; a running guest is asked and waited for (QAPI ``device_del``)."""
        return self._call(self._handle.detach_nic(nic, timeout=timeout))

    def rename_snapshot(self, old: str, new: str) -> Snapshot:
        """Give a snapshot another name; returns it as it is now."""
        return self._call(self._handle.rename_snapshot(old, new))

    def describe_snapshot(
        self,
        snapshot: Snapshot | str,
        description: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        untag: Sequence[str] = (),
    ) -> Snapshot:
        """Give a snapshot another description, other tags, or both; returns it as it is now."""
        return self._call(self._handle.describe_snapshot(snapshot, description, tags=tags, untag=untag))

    def fork(
        self,
        snapshot: Snapshot | str | None = None,
        name: str | None = None,
        *,
        count: int = 1,
        ephemeral: bool = False,
        paused: bool = False,
        identity: Literal["keep", "fresh"] = "keep",
        description: str = "",
    ) -> list[Forked]:
        """Make machines that go on from a full snapshot of this one, side by side with it."""
        return self._call(
            self._handle.fork(
                snapshot,
                name,
                count=count,
                ephemeral=ephemeral,
                paused=paused,
                identity=identity,
                description=description,
            )
        )

    @contextmanager
    def pool(
        self, snapshot: Snapshot | str, *, size: int = 4, fresh: bool = True, floor: int | None = None
    ) -> Iterator[ForkPool]:
        """Keep that many forks of a snapshot loaded and waiting, for the block: ``with vm.pool("warm") as pool``."""
        with self._entered(self._handle.pool(snapshot, size=size, fresh=fresh, floor=floor)) as found:
            yield found

    def record(self) -> Machine:
        """The machine as the store has it."""
        return self._call(self._handle.record())

    @overload
    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        encoding: str = "utf-8",
        check: bool = True,
        allow_truncated: bool = False,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        wait: float | None = None,
        output: Callable[[Literal["stdout", "stderr"], bytes], object] | None = None,
    ) -> Completed[str]: ...

    @overload
    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        encoding: None,
        check: bool = True,
        allow_truncated: bool = False,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        wait: float | None = None,
        output: Callable[[Literal["stdout", "stderr"], bytes], object] | None = None,
    ) -> Completed[bytes]: ...

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        encoding: str | None = "utf-8",
        check: bool = True,
        allow_truncated: bool = False,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        wait: float | None = None,
        output: Callable[[Literal["stdout", "stderr"], bytes], object] | None = None,
    ) -> Completed[str] | Completed[bytes]:
        """Run a command in the guest through its agent."""
        return self._call(
            self._handle.run(
                command,
                timeout=timeout,
                encoding=encoding,
                check=check,
                allow_truncated=allow_truncated,
                stdin=stdin,
                env=env,
                cwd=cwd,
                wait=wait,
                output=output,
            )
        )

    def put(self, source: str | os.PathLike[str] | bytes, target: str, *, timeout: float = 60) -> int:
        """Write a file of the guest through its agent, over one that is there; one that fails may be there in part."""
        return self._call(self._handle.put(source, target, timeout=timeout))

    def get(self, source: str, target: str | os.PathLike[str], *, timeout: float = 60) -> int:
        """Copy a file of the guest to this host through the guest's agent, whole or not at all."""
        return self._call(self._handle.get(source, target, timeout=timeout))

    def fstrim(self, *, minimum: int = 0, timeout: float = 60) -> tuple[Trimmed, ...]:
        """Let the guest give its disks back what its file systems do not use; one entry per file system."""
        return self._call(self._handle.fstrim(minimum=minimum, timeout=timeout))

    def start(self, *, paused: bool = False, allow_extra: bool = False) -> Process:
        """Start QEMU and return once its monitor answers."""
        return self._call(self._handle.start(paused=paused, allow_extra=allow_extra))

    def stop(self, *, force: bool = False, timeout: float | None = None) -> None:
        """Switch the guest off: its power button is pressed, and QEMU ends once the guest has shut down."""
        return self._call(self._handle.stop(force=force, timeout=timeout))

    def pause(self) -> None:
        """Stop the guest's vCPUs; its QEMU stays, and :meth:`resume` lets it run on."""
        return self._call(self._handle.pause())

    def resume(self) -> State:
        """Let a paused guest run on, also one that QEMU has paused because a disk was full or failed."""
        return self._call(self._handle.resume())

    def wakeup(self) -> None:
        """Wake a guest that has put itself to sleep (ACPI S3)."""
        return self._call(self._handle.wakeup())

    def is_running(self) -> bool:
        """Whether a QEMU that can be seen from here runs for the machine, whatever state its guest is in."""
        return self._call(self._handle.is_running())

    def state(self) -> State:
        """The run state, also of a machine without QEMU; a :class:`qmpsnap.State` is equal to its text."""
        return self._call(self._handle.state())

    def events(self, *, interval: float = 0.25) -> Iterator[Event]:
        """What happens to the machine, until its QEMU ends: its state, its jobs, and file systems that may fill up."""
        return self._iterate(self._handle.events(interval=interval))

    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots, oldest first."""
        return self._call(self._handle.snapshots())

    def chains(self, disk: str | None = None) -> tuple[ChainView, ...]:
        """The layers of every disk as the store, QEMU and the files see them."""
        return self._call(self._handle.chains(disk))

    def shortage(self) -> tuple[Shortage, ...]:
        """The file systems that may fill up under the guest; QEMU pauses a guest that hits the end of one."""
        return self._call(self._handle.shortage())

    def misfits(self) -> tuple[str, ...]:
        """What a start of the machine would lack on this host, a sentence each: KVM, a CPU model, memory, a port."""
        return self._call(self._handle.misfits())

    def left_out(self) -> tuple[str, ...]:
        """A sentence on what the guest writes to and no snapshot holds: the UEFI variables of an adopted machine."""
        return self._call(self._handle.left_out())

    def jobs(self) -> tuple[MachineJob, ...]:
        """The jobs that the machine's QEMU has, or the worker of a stopped machine, also of a verb that is at work."""
        return self._call(self._handle.jobs())

    def wait(self, *, report: Report = unreported) -> list[Operation]:
        """See every job of an operation to its end."""
        return self._call(self._handle.wait(report=report))

    def cancel(self) -> list[Operation]:
        """Cancel every job of an operation: the chains stay as they are."""
        return self._call(self._handle.cancel())

    def set_speed(self, bandwidth: int) -> list[str]:
        """Limit what the jobs of the machine's operations copy, also while another controller waits for them."""
        return self._call(self._handle.set_speed(bandwidth))

    def recover(self) -> list[Operation]:
        """End what an earlier operation left open; returns those operations as they were."""
        return self._call(self._handle.recover())

    def check(self, *, deep: bool = False, repair: bool = False) -> Checked:
        """Compare the machine with all that is promised of it; ``findings`` has each difference."""
        return self._call(self._handle.check(deep=deep, repair=repair))

    def undefine(self, *, disks: undefine.Fate | None = None, told: undefine.Told | None = None) -> list[str]:
        """Forget the machine and its snapshots."""
        return self._call(self._handle.undefine(disks=disks, told=told))

    @overload
    def snapshot(
        self,
        name: str | None = None,
        *,
        kind: Literal["disk"] = "disk",
        report: Report = unreported,
        **options: Unpack[DiskOptions],
    ) -> Snapshot: ...

    @overload
    def snapshot(
        self,
        name: str | None = None,
        *,
        kind: Literal["full"],
        report: Report = unreported,
        **options: Unpack[FullOptions],
    ) -> Snapshot: ...

    @overload
    def snapshot(
        self,
        name: str | None = None,
        *,
        kind: Literal["volume"],
        report: Report = unreported,
        **options: Unpack[VolumeOptions],
    ) -> Snapshot: ...

    @overload
    def snapshot(
        self,
        name: str | None = None,
        *,
        kind: Literal["internal"],
        report: Report = unreported,
        **options: Unpack[InternalOptions],
    ) -> Snapshot: ...

    def snapshot(
        self, name: str | None = None, *, kind: Kind = "disk", report: Report = unreported, **options: Any
    ) -> Snapshot:
        """Take a snapshot, all disks at one instant; a ``full`` one with the guest's memory of that same instant."""
        return self._call(self._handle.snapshot(name, kind=kind, report=report, **options))

    def save(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        description: str = "",
        compression: Compression = "none",
        report: Report = unreported,
    ) -> Snapshot:
        """Take a full snapshot and end QEMU; :meth:`restore` continues the machine from there."""
        return self._call(
            self._handle.save(file, name=name, description=description, compression=compression, report=report)
        )

    def restore(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        discard: bool = False,
        paused: bool = False,
        after: bool = True,
    ) -> Reverted:
        """Let the machine go on where it was saved, whatever it does now, and whatever was written since."""
        return self._call(self._handle.restore(file, discard=discard, paused=paused, after=after))

    def add_layers(self, *, disks: Sequence[str] | None = None, files: Files | None = None) -> tuple[Layer, ...]:
        """Put a new empty layer on every disk as :meth:`snapshot` does, but list no snapshot; returns those layers."""
        return self._call(self._handle.add_layers(disks=disks, files=files))

    def revert(
        self,
        snapshot: Snapshot | str,
        *,
        discard: bool = False,
        state: Run | None = None,
        hardware: HardwareOf = "now",
        after: bool = True,
        by: LoadBy | None = None,
    ) -> Reverted:
        """Revert to a snapshot: new empty layers on its points become active. A running guest is ended for it."""
        return self._call(
            self._handle.revert(snapshot, discard=discard, state=state, hardware=hardware, after=after, by=by)
        )

    def push(self, name: str | None = None, *, description: str = "") -> Snapshot:
        """Take a snapshot as :meth:`snapshot` does, and mark it as one to come back to with :meth:`pop`."""
        return self._call(self._handle.push(name, description=description))

    def pop(self, *, discard: bool = False, bandwidth: int = 0, report: Report = unreported) -> Reverted:
        """Go back to the current snapshot, without what was written since, and delete it."""
        return self._call(self._handle.pop(discard=discard, bandwidth=bandwidth, report=report))

    def commit(
        self,
        disk: str,
        *,
        base: Snapshot | str | None = None,
        top: Snapshot | str | None = None,
        consume: bool = False,
        bandwidth: int = 0,
        report: Report = unreported,
    ) -> Committed:
        """Merge the layers above ``base`` up to ``top`` into ``base``; the guest runs on."""
        return self._call(
            self._handle.commit(disk, base=base, top=top, consume=consume, bandwidth=bandwidth, report=report)
        )

    def stream(
        self, disk: str, *, base: Snapshot | str | None = None, bandwidth: int = 0, report: Report = unreported
    ) -> Streamed:
        """Let the active layer absorb those between it and ``base``; no snapshot is lost, and the guest runs on."""
        return self._call(self._handle.stream(disk, base=base, bandwidth=bandwidth, report=report))

    def mirror(
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
        report: Report = unreported,
    ) -> Mirrored:
        """Copy a disk; the guest runs on, and no snapshot is harmed."""
        return self._call(
            self._handle.mirror(
                disk,
                target,
                mode=mode,
                shallow=shallow,
                reuse=reuse,
                format=format,
                write_blocking=write_blocking,
                bandwidth=bandwidth,
                by=by,
                report=report,
            )
        )

    def delete_snapshots(
        self,
        *names: Snapshot | str,
        children: bool = False,
        metadata: bool = False,
        flatten: bool = False,
        bandwidth: int = 0,
        by: DeleteBy | None = None,
        report: Report = unreported,
    ) -> Deleted:
        """Delete snapshots, moving as few bytes as possible."""
        return self._call(
            self._handle.delete_snapshots(
                *names, children=children, metadata=metadata, flatten=flatten, bandwidth=bandwidth, by=by, report=report
            )
        )
