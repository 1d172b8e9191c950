"""What a machine is, changed: its name and spec, the size of its disks, and what is said of its snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qmpsnap.api import asked
from qmpsnap.api.job import job
from qmpsnap.host.borders import border
from qmpsnap.later import Later
from qmpsnap.qmp.jobs import Report, unreported

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qmpsnap.api.job import Running
    from qmpsnap.imports.found import Imported
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.machines.record import Machine
    from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec
    from qmpsnap.model.operations.flatten import FlattenPlan
    from qmpsnap.model.operations.operation import ResizePlan
    from qmpsnap.ops.adoption import take
    from qmpsnap.ops.adoption.take import TakePlan
    from qmpsnap.ops.base.context import Context
    from qmpsnap.ops.devices import attach, detach, nics
    from qmpsnap.ops.devices.attach import Attached
    from qmpsnap.ops.devices.detach import Detached
    from qmpsnap.ops.devices.nics import Nic
    from qmpsnap.ops.lifecycle import change, resize
    from qmpsnap.ops.lifecycle import rename as rename_machine
    from qmpsnap.ops.lifecycle.change import Changed
    from qmpsnap.ops.merge import flatten
    from qmpsnap.ops.snapshot import describe, rename
else:
    attach, detach = Later("ops.devices.attach"), Later("ops.devices.detach")
    nics = Later("ops.devices.nics")
    change, resize = Later("ops.lifecycle.change"), Later("ops.lifecycle.resize")
    flatten, rename_machine = Later("ops.merge.flatten"), Later("ops.lifecycle.rename")
    describe, rename = Later("ops.snapshot.describe"), Later("ops.snapshot.rename")
    take = Later("ops.adoption.take")


@border
class Changing:
    """The part of a machine's handle that changes its name, its spec, its disks, and what is said of its snapshots."""

    name: str
    _context: Context
    _running: Running

    async def set(self, settings: Mapping[str, str] | MachineSpec, *, allow_extra: bool = False) -> Changed:
        """Give a stopped machine another spec; its disks and snapshots stay.

        Args:
            settings: new values by key, as a spec file has them (``{"memory": "4G", "vda.cache": "none"}``; an empty
                one stands for the default), or a whole spec.
            allow_extra: accept the spec's ``extra`` QEMU arguments.

        Returns:
            What is otherwise, and the snapshots whose memory does not fit the new hardware: they can still be reverted
            to with ``hardware="snapshot"``.

        Raises:
            SpecError: a key or value is none that a spec can have.
            StateError: the machine runs.
            UsageError: its name, firmware or disks would be others.
        """
        make = change.made(settings, guest_dir=self._context.home.guest)
        return await change.run(self._context, self.name, make, allow_extra=allow_extra)

    async def launched_as(self) -> Imported:
        """What the command line of an adopted machine's QEMU says, as a proposal for :meth:`take`.

        The guest may have changed that command line, if it has broken out of QEMU. Read the spec before you take it.

        Returns:
            The spec, with the disks that the machine has, the differences to the original, and the options left out.

        Raises:
            StateError: the machine was not adopted, or its QEMU has ended.
            UsageError: the command line is none of a QEMU of x86, or some of its options are in files.
        """
        return await take.proposed(self._context, self.name)

    async def take(self, spec: MachineSpec, *, allow_extra: bool = False) -> TakePlan:
        """Let qmpsnap launch an adopted machine, by this spec; its snapshots stay.

        The QEMU that its owner launched is left alone. Once it has ended, :meth:`start`, :meth:`revert` and all the
        rest work as for a machine that was defined, and its owner must not launch it any more.

        Args:
            spec: with the machine's name and disks, as :meth:`launched_as` has it.
            allow_extra: accept the spec's ``extra`` QEMU arguments.

        Returns:
            The spec as it is recorded, and the process that has to end first.

        Raises:
            StateError: the machine was not adopted.
            UsageError: the spec is another machine's, has other disks, or ``extra`` arguments that nobody accepted.
            ImageRefused: a kernel, initrd, CD image or file for cloud-init is not there, or is none.
        """
        return await take.run(self._context, self.name, spec, allow_extra=allow_extra)

    async def rename(self, new: str) -> Machine:
        """Give a stopped machine another name, and its folder with it; handles of the old name find it no more.

        Its UUID, disks, snapshots and journal stay, and machines that are based on its images read them at their new
        path: forks, and machines whose specs name one of them as a base.

        Args:
            new: the other name.

        Returns:
            The machine as it is recorded now.

        Raises:
            NameRefused: the new name is not allowed.
            NameTaken: there is such a machine, or a folder of that name.
            StateError: the machine, or another one that reads its images, runs; or it was adopted.
            LockHeld: another controller works on one of them.
            HostCannot: with the effect ``unknown``, an image or the store cannot be written; the next command goes on.
        """
        return await rename_machine.run(self._context, self.name, new)

    async def resize(self, disk: str, size: int | str) -> ResizePlan:
        """Let the guest see more bytes of a disk: of its active layer, as the layers below keep their size.

        A guest that runs is told (QAPI ``block_resize``); its partitions and file systems are its own to grow. A revert
        to an earlier snapshot brings the size of that time back.

        Args:
            disk: its name.
            size: bytes, or a text such as ``20G``, or ``+5G`` for so much more; a multiple of 512 bytes.

        Raises:
            UsageError: that is no size.
            NotFoundError: the machine has no such disk.
            StateError: the disk has that size or a larger one, is read-only, or a job works on it.
            QmpError: QEMU refuses; the size is as before.
        """
        return await resize.run(self._context, self.name, resize.requested(disk, size))

    @job
    async def flatten(self, disk: str, *, report: Report = unreported) -> FlattenPlan:
        """Let a clone in a Ceph cluster, as a revert makes one, have a copy of all that it reads of its snapshot.

        Nothing depends on that snapshot then, which can be deleted. The guest runs on. Nothing is done where the image
        is no clone. If it is interrupted, the same call copies the rest.

        Args:
            disk: its name.
            report: told about the progress, in bytes of :attr:`~qmpsnap.FlattenPlan.bytes`.

        Returns:
            What was copied: the clones, their snapshots and the bytes, at most.

        Raises:
            NotFoundError: the machine has no such disk, or its image is gone.
            StateError: the disk lies on no image of a cluster, or the image has snapshots that would keep the tie.
            StorageHangs: the cluster does not answer any more.
        """
        return await flatten.run(self._context, self.name, disk, report=report)

    async def attach_disk(self, disk: Mapping[str, object] | DiskSpec, *, folders: Sequence[Path] = ()) -> Attached:
        """Give a machine one more disk; its snapshots stay. A running QEMU plugs it in (QAPI ``device_add``).

        While it runs, a PCI device (bus ``virtio`` or ``nvme``) needs a free PCIe root port, of which a newly defined
        machine has some, and a SCSI disk a controller. The disk's place is recorded for later starts.

        Snapshots from before do not include the disk: a revert to one of them leaves it as it is. Those with memory
        need the hardware of their time for it, with which the machine does not have the disk.

        Args:
            disk: as a spec file describes one (``{"image": "/srv/data.qcow2"}``, ``{"size": "10G"}``); where it has no
                name, it gets the next free one.
            folders: further folders that its images may lie in.

        Returns:
            The disk, and the snapshots whose memory does not fit the new hardware.

        Raises:
            SpecError: a key or value is none that a disk can have.
            NameTaken: a snapshot has another disk of that name.
            ImageRefused: an image is not what is said of it, or not in an allowed folder.
            StateError: the machine runs and cannot take the disk, or somebody else writes to the image.
            QmpError: QEMU refuses; nothing is changed.
        """
        make = attach.wanted(disk, folder=Path.cwd(), guest_dir=self._context.home.guest)
        return await attach.run(self._context, self.name, make, folders=folders)

    async def detach_disk(self, disk: str, *, timeout: float = 30.0) -> Detached:
        """Take a disk from a machine; no file is removed, and snapshots that include it stay.

        A running QEMU asks its guest to let go of the disk (QAPI ``device_del``) and is waited for
        (``DEVICE_DELETED``). A disk that QEMU has lost already is detached at once.

        If the guest wrote to a layer that qmpsnap created, an automatic snapshot keeps that layer.
        A revert to a snapshot with ``hardware="snapshot"`` brings the disks of its time back.

        Args:
            disk: its name.
            timeout: seconds that the guest of a running machine is waited for.

        Raises:
            NotFoundError: the machine has no such disk.
            StateError: the machine runs, and this disk can only be taken from a stopped one.
            QmpError: the guest refuses (``DEVICE_UNPLUG_GUEST_ERROR``).
            DeadlinePassed: the guest has not answered. The disk stays, but the guest may let go of it later; then the
                next call ends it.
        """
        return await detach.run(self._context, self.name, disk, timeout=timeout)

    async def attach_nic(self, nic: Mapping[str, object] | NicSpec) -> Nic:
        """Give a machine one more network card; a running QEMU plugs it in (QAPI ``netdev_add``, ``device_add``).

        While it runs, the card needs a free PCIe root port. Its place is recorded for later starts.

        Args:
            nic: as a spec file describes one (``{"kind": "tap", "ifname": "tap1"}``; ``{}`` is a user-mode card).

        Returns:
            The card with its number and MAC address, and the snapshots whose memory does not fit the new hardware.

        Raises:
            SpecError: a key or value is none that a card can have.
            StateError: the machine runs and cannot take the card.
            QmpError: QEMU refuses; nothing is changed.
        """
        make = nics.wanted(nic, folder=Path.cwd(), guest_dir=self._context.home.guest)
        return await nics.attach(self._context, self.name, make)

    async def detach_nic(self, nic: str | int, *, timeout: float = 30.0) -> Nic:
        """Take a network card from a machine; a running guest is asked and waited for (QAPI ``device_del``).

        The other cards keep their MAC addresses.

        Args:
            nic: its number, or its MAC address.
            timeout: seconds that the guest of a running machine is waited for.

        Raises:
            NotFoundError: the machine has no such card.
            StateError: the machine runs, and this card can only be taken from a stopped one.
            QmpError: the guest refuses (``DEVICE_UNPLUG_GUEST_ERROR``).
            DeadlinePassed: the guest has not answered. The card stays, but the guest may let go of it later; then the
                next call ends it.
        """
        return await nics.detach(self._context, self.name, nic, timeout=timeout)

    async def rename_snapshot(self, old: str, new: str) -> Snapshot:
        """Give a snapshot another name; returns it as it is now.

        Args:
            old: its name.
            new: the other.

        Raises:
            NameRefused: the new name is not allowed.
            NotFoundError: there is no snapshot ``old``.
            NameTaken: there is a snapshot ``new``.
        """
        return await rename.run(self._context, self.name, old, new)

    async def describe_snapshot(
        self,
        snapshot: Snapshot | str,
        description: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        untag: Sequence[str] = (),
    ) -> Snapshot:
        """Give a snapshot another description, other tags, or both; returns it as it is now.

        Args:
            snapshot: the snapshot, or its name.
            description: free text; None leaves what there is.
            tags: pairs of a key and a value, which are added or replace those of the same keys.
            untag: keys of tags to remove.

        Raises:
            NotFoundError: there is no such snapshot, or a tag to remove is not there.
            UsageError: a description or a tag is not allowed, or nothing is asked for.
        """
        return await describe.run(self._context, self.name, asked.to_describe(snapshot, description, tags, untag))
