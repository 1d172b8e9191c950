"""What a program does with one machine: each verb of :mod:`qmpsnap.ops`, by the machine's name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast, overload

from qmpsnap.api import asked
from qmpsnap.api.change_plans import ChangePlans
from qmpsnap.api.forks import Forking
from qmpsnap.api.job import Job, job
from qmpsnap.api.machine_changes import Changing
from qmpsnap.api.old_names import OldPreviews
from qmpsnap.host.borders import border
from qmpsnap.later import Later
from qmpsnap.ops.base.requests import limited
from qmpsnap.qmp.jobs import unreported

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, Unpack

    from qmpsnap.api import outcomes
    from qmpsnap.api.outcomes import Committed, Deleted, Mirrored, Streamed
    from qmpsnap.model.layers.chain import Layer
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.layers.vmstate import Compression
    from qmpsnap.model.machines.spec import Format
    from qmpsnap.model.operations.by import DeleteBy, LoadBy, MirrorBy
    from qmpsnap.ops import save, stack
    from qmpsnap.ops.internal import create as internal
    from qmpsnap.ops.merge import commit
    from qmpsnap.ops.mirror import mirror
    from qmpsnap.ops.mirror.mirror import Mode
    from qmpsnap.ops.revert import plan as revert_plan
    from qmpsnap.ops.revert import revert
    from qmpsnap.ops.revert.plan import HardwareOf, Run
    from qmpsnap.ops.revert.revert import Reverted
    from qmpsnap.ops.snapshot import create, delete
    from qmpsnap.ops.snapshot import plan as create_plan
    from qmpsnap.ops.snapshot import request as wishes
    from qmpsnap.ops.snapshot.request import (
        DiskOptions,
        Files,
        FullOptions,
        InternalOptions,
        Kind,
        SnapshotOptions,
        VolumeOptions,
    )
    from qmpsnap.qmp.jobs import Report
else:
    outcomes = Later("api.outcomes")
    save, stack = Later("ops.save"), Later("ops.stack")
    internal = Later("ops.internal.create")
    commit, mirror = Later("ops.merge.commit"), Later("ops.mirror.mirror")
    revert, revert_plan = Later("ops.revert.revert"), Later("ops.revert.plan")
    create, delete = Later("ops.snapshot.create"), Later("ops.snapshot.delete")
    create_plan, wishes = Later("ops.snapshot.plan"), Later("ops.snapshot.request")


@border
class MachineHandle(ChangePlans, Forking, Changing, OldPreviews):
    """One machine of the store, by name."""

    @overload
    def snapshot(
        self,
        name: str | None = None,
        *,
        kind: Literal["disk"] = "disk",
        report: Report = unreported,
        **options: Unpack[DiskOptions],
    ) -> Job[Snapshot]: ...

    @overload
    def snapshot(
        self,
        name: str | None = None,
        *,
        kind: Literal["full"],
        report: Report = unreported,
        **options: Unpack[FullOptions],
    ) -> Job[Snapshot]: ...

    @overload
    def snapshot(
        self,
        name: str | None = None,
        *,
        kind: Literal["volume"],
        report: Report = unreported,
        **options: Unpack[VolumeOptions],
    ) -> Job[Snapshot]: ...

    @overload
    def snapshot(
        self,
        name: str | None = None,
        *,
        kind: Literal["internal"],
        report: Report = unreported,
        **options: Unpack[InternalOptions],
    ) -> Job[Snapshot]: ...

    def snapshot(
        self, name: str | None = None, *, kind: Kind = "disk", report: Report = unreported, **options: Any
    ) -> Job[Snapshot]:
        """Take a snapshot, all disks at one instant; a ``full`` one with the guest's memory of that same instant.

        An ``internal`` one is stored inside the qcow2 images, with its memory; the guest is paused while that is
        written. Of a ``volume`` one the storage keeps the disks (a reflink on xfs or btrfs, LVM, Ceph), and no chain
        grows.

        The guest does not notice a snapshot of its disks. For its memory it is paused for milliseconds, or for the
        whole save if the host supports nothing better.

        Args:
            name: its name; None takes the next free ``snap-N``.
            kind: ``disk``, ``full``, ``internal`` or ``volume``.
            report: told how much of the memory is written.
            options: any of these.

                - ``description``: free text. ``tags``: pairs of a key and a value, to find it by.
                - ``disks``: names of the disks; None (the default) takes all that the spec does not leave out.
                - ``files``: disk to the path of its new layer, where that is to be a place of the caller's choice.
                - ``max_pause_ms``: with ``full``: refuse rather than pause the guest longer than this.
                - ``compression``: with ``full``: ``none`` or ``zstd``, of the memory's file.
                - ``degrade``: with ``full``: if only the memory fails, keep the disks' snapshot and return that.
                - ``memory``: with ``internal``: whether the guest's memory is saved, too; None if there is a guest.
                - ``quiesce``: ``require``: of frozen file systems or not at all; ``prefer``: if the guest's agent can
                  freeze them, and the snapshot's ``unquiesced`` says why it could not; ``skip`` (the default).
                - ``freeze_window``: seconds they may be frozen, 5 by default.
                - ``volume``: with ``full``: leave the disks to their storage. ``mixed``: where it can, else as usual.
                - ``by``: to test QEMU: the QMP command, ``blockdev-snapshot`` (the default) or
                  ``blockdev-snapshot-sync`` with ``mode: existing`` on the same verified file; with ``internal``
                  ``snapshot-save`` (the default) or ``savevm``.
                - ``lvm_size``: how large thick LVM snapshots are: ``500M``, or ``10%`` of the disk; 20% by default.

        Raises:
            NameTaken: there is a snapshot of that name.
            UsageError: an option that the kind does not heed, or a file for a disk without a new layer or at no place.
            StateError: a disk is read-only, busy with a job, or its storage has no snapshots; a file is there already;
                or the memory cannot be saved as asked.
            OperationPending: a ``volume`` snapshot is taken, but an overlay is not committed back yet.
            StoreMismatch: QEMU's chains are not the store's.
            HostCannot: no space for the memory; the guest runs on, and there is no trace of the attempt.
            QemuGone, DeadlinePassed, QmpError: with ``require``, the guest's agent is not there, silent or refuses.
        """
        return self._snapshot(kind, name, options, report=report)

    @job
    async def _snapshot(
        self, kind: Kind, name: str | None, options: dict[str, Any], *, report: Report = unreported
    ) -> Snapshot:
        request = wishes.requested(kind, name, cast("SnapshotOptions", options))
        if isinstance(request, internal.InternalRequest):
            return await internal.create(self._context, self.name, request, report=report)
        return await create.run(self._context, self.name, request, report=report)

    @job
    async def save(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        description: str = "",
        compression: Compression = "none",
        report: Report = unreported,
    ) -> Snapshot:
        """Take a full snapshot and end QEMU; :meth:`restore` continues the machine from there.

        Args:
            file: path of the state file; None stores it beside the machine's images.
            name: the snapshot's name; None takes the next free ``saved-N``.
            description: free text.
            compression: of the memory's file.
            report: told how much of the memory is written.

        Raises:
            StateError: it does not run, or the file exists.
            HostCannot: no space; the guest runs on.
        """
        request = asked.to_save(file, name, description, compression)
        return await save.save(self._context, self.name, request, report=report)

    async def restore(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        discard: bool = False,
        paused: bool = False,
        after: bool = True,
    ) -> Reverted:
        """Let the machine go on where it was saved, whatever it does now, and whatever was written since.

        Args:
            file: a file that :meth:`save` wrote, for this machine; None takes the latest full snapshot.
            discard: do not keep what was written since.
            paused: leave the vCPUs stopped.
            after: set the guest's clock and announce its network cards.

        Raises:
            NotFoundError: the machine has no full snapshot.
            StateError: the file is another machine's or its snapshot is gone, or the machine's hardware has changed.
            StoreMismatch: the file is damaged.
        """
        request = asked.to_restore(file, discard=discard, paused=paused, after=after)
        return await save.restore(self._context, self.name, request)

    async def add_layers(self, *, disks: Sequence[str] | None = None, files: Files | None = None) -> tuple[Layer, ...]:
        """Put a new empty layer on every disk as :meth:`snapshot` does, but list no snapshot; returns those layers.

        Args:
            disks: names of the disks; None takes all that the spec does not leave out.
            files: as for :meth:`snapshot`.

        Raises:
            StateError: a disk is read-only or busy with a job.
            StoreMismatch: QEMU's chains are not the store's.
        """
        return await create.add_layers(self._context, self.name, asked.layers(disks, files))

    async def revert(
        self,
        snapshot: Snapshot | str,
        *,
        discard: bool = False,
        state: Run | None = None,
        hardware: HardwareOf = "now",
        after: bool = True,
        by: LoadBy | None = None,
    ) -> Reverted:
        """Revert to a snapshot: new empty layers on its points become active. A running guest is ended for it.

        After a full snapshot the guest continues where it was; after one of the disks it boots, if the machine ran.

        Disks that the snapshot does not include are unchanged. Data written since is kept as an automatic snapshot,
        ``auto-N``; without such data there is none.

        Args:
            snapshot: the snapshot, or its name.
            discard: remove the data written since instead.
            state: ``running`` or ``paused`` afterwards; None leaves the machine running, paused or stopped as it was,
                and running after a full snapshot.
            hardware: ``snapshot`` gives the machine the spec again that it had when the snapshot was taken.
            after: with a full snapshot, set the guest's clock and announce its network cards.
            by: to test QEMU: ``loadvm`` or ``snapshot-load`` for snapshots inside the layers that the guest writes to.

        Raises:
            NotFoundError: there is none of that name.
            StateError: it is consumed, a job holds a disk, or its memory is of other hardware.
            StoreMismatch: QEMU's chains or the files are not the store's.
        """
        request = asked.to_revert(snapshot, discard=discard, state=state, hardware=hardware, after=after, by=by)
        return await revert.run(self._context, self.name, request)

    async def push(self, name: str | None = None, *, description: str = "") -> Snapshot:
        """Take a snapshot as :meth:`snapshot` does, and mark it as one to come back to with :meth:`pop`.

        Args:
            name: its name; None takes the next free ``snap-N``.
            description: free text.

        Raises:
            NameTaken: there is a snapshot of that name.
            QmpsnapError: as :meth:`snapshot`.
        """
        return await create.run(self._context, self.name, asked.to_push(name, description))

    @job
    async def pop(self, *, discard: bool = False, bandwidth: int = 0, report: Report = unreported) -> Reverted:
        """Go back to the current snapshot, without what was written since, and delete it.

        Its parent is current then.

        Args:
            discard: agree to that where :meth:`push` did not make it.
            bandwidth: bytes per second that each job copies at most; 0 is without limit.
            report: told about the progress of jobs.

        Raises:
            StateError: there is no current snapshot, :meth:`push` did not make it, or it cannot be gone back to.
        """
        limit = limited(bandwidth)
        return await stack.pop(self._context, self.name, discard=discard, bandwidth=limit, report=report)

    @job
    async def commit(
        self,
        disk: str,
        *,
        base: Snapshot | str | None = None,
        top: Snapshot | str | None = None,
        consume: bool = False,
        bandwidth: int = 0,
        report: Report = unreported,
    ) -> Committed:
        """Merge the layers above ``base`` up to ``top`` into ``base``; the guest runs on.

        Args:
            disk: the disk.
            base: layer id, or a snapshot or its name; None is the lowest layer of the chain.
            top: layer id, or a snapshot or its name; None is the active layer.
            consume: agree that snapshots whose content ``base`` or a layer between holds become unreadable.
            bandwidth: bytes per second that the job copies at most; 0 is without limit.
            report: told about the job's progress.

        Raises:
            StateError: base is above top, others read what would change, or snapshots would be lost unasked.
            HostCannot: not enough space; if it runs out on the way, the job is paused and can go on.
        """
        request = asked.to_commit(disk, base=base, top=top, consume=consume, bandwidth=bandwidth)
        return outcomes.Committed.of(await commit.run(self._context, self.name, request, report=report))

    @job
    async def stream(
        self, disk: str, *, base: Snapshot | str | None = None, bandwidth: int = 0, report: Report = unreported
    ) -> Streamed:
        """Let the active layer absorb those between it and ``base``; no snapshot is lost, and the guest runs on.

        Args:
            disk: the disk.
            base: layer id, or a snapshot or its name: the active layer's backing afterwards; None absorbs everything.
            bandwidth: bytes per second that the job copies at most; 0 is without limit.
            report: told about the job's progress.

        Raises:
            StateError: nothing lies between.
            HostCannot: not enough space.
        """
        request = asked.to_stream(disk, base=base, bandwidth=bandwidth)
        return outcomes.Streamed.of(await commit.run(self._context, self.name, request, report=report))

    @job
    async def mirror(  # its options, as a user names them
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
        report: Report = unreported,
    ) -> Mirrored:
        """Copy a disk; the guest runs on, and no snapshot is harmed.

        Args:
            disk: the disk.
            target: absolute path of the copy, or the URI of an NBD export (``finish`` only).
            mode: ``pivot``: the guest goes on with the copy. ``finish``: it stays, and the copy is the caller's.
            shallow: copy the active layer only; the copy has the same backing.
            reuse: overwrite the image that is at ``target``, exactly as large as the disk.
            format: of the copy; None is qcow2 for a new image, and what its header says for one that is there.
            write_blocking: the guest's writes wait for the copy, so that it cannot be outrun.
            bandwidth: bytes per second that the job copies at most; 0 is without limit.
            by: to test QEMU: ``drive-mirror``, to the same verified file (``mode: existing``).
            report: told about the job's progress.

        Raises:
            ImageRefused: the image to reuse does not fit.
            StateError: something is at the target, or another process has it open.
            HostCannot: not enough space (on the way: the job is paused and can go on).
        """
        copied: dict[str, Any] = {"mode": mode, "shallow": shallow, "reuse": reuse, "format": format}
        request = asked.to_mirror(disk, target, **copied, write_blocking=write_blocking, bandwidth=bandwidth, by=by)
        return outcomes.Mirrored.of(await mirror.run(self._context, self.name, request, report=report))

    @job
    async def delete_snapshots(
        self,
        *names: Snapshot | str,
        children: bool = False,
        metadata: bool = False,
        flatten: bool = False,
        bandwidth: int = 0,
        by: DeleteBy | None = None,
        report: Report = unreported,
    ) -> Deleted:
        """Delete snapshots, moving as few bytes as possible.

        Args:
            names: the snapshots, or their names.
            children: also those that grew from them.
            metadata: only the names; the layers stay.
            flatten: first, as :meth:`flatten`, clones in a Ceph cluster that depend on them.
            bandwidth: bytes per second that each job copies at most; 0 is without limit.
            by: to test QEMU: ``delvm`` for snapshots inside the layers that the guest writes to.
            report: told about each job's progress.

        Raises:
            NotFoundError: one is not there; nothing was deleted.
            StateError: clones in a Ceph cluster depend on one, or LVM snapshots.
        """
        how = asked.to_delete(names, children=children, metadata=metadata, flatten=flatten, bandwidth=bandwidth, by=by)
        return outcomes.Deleted.of(await delete.run(self._context, self.name, how, report=report))
