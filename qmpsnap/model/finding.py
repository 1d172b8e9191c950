"""What `check` finds: each kind of damage has a code that stays, what it means, and what repair does about it."""

from typing import Final

from msgspec import Struct

from qmpsnap.model.names import JobId, LayerId, NodeName


class Kind(Struct, frozen=True):
    """One kind of finding: the invariant of docs/explanation/how-it-works.md that does not hold, and one sentence each.

    ``repair`` is what ``--repair`` does; empty when it does nothing.
    """

    invariant: str
    means: str
    repair: str = ""


_ASIDE: Final = "It is moved to the machine's quarantine folder, with a note."
_PRIVATE: Final = "Its mode becomes 0600, that of a folder 0700."

KINDS: Final[dict[str, Kind]] = {
    "store-older": Kind(
        "I4",
        "The store is an old copy: images on disk are newer than its records, and acting on them would damage the"
        " images.",
    ),
    "machine-lost": Kind(
        "I4",
        "The store is an old copy or was rebuilt without that machine. It is not known which layers the machine"
        " reads, so none is merged or removed.",
    ),
    "record-missing": Kind(
        "I3",
        "The machine's record, from which a lost store can be rebuilt, is missing or differs from the store.",
        "It is written again from the store.",
    ),
    "layer-missing": Kind(
        "I3", "A recorded layer's file does not exist or is not an image: everything that reads it is lost."
    ),
    "home-moved": Kind(
        "I3",
        "The home was moved or copied: headers and records name its former folder. Nothing is changed before the"
        " home is relocated, which keeps names, descriptions and the tree.",
    ),
    "layer-replaced": Kind(
        "I3",
        "Another file has the recorded layer's path, with unknown content. Put the recorded file back; if this is"
        " a copy of it, relocating the home accepts it.",
    ),
    "backing-differs": Kind(
        "I3",
        "The image's header names a different backing file than the store: other programs read different content."
        " After a move or copy, relocating the home corrects it.",
    ),
    "backing-format-differs": Kind(
        "I3",
        "The image's header names no backing format or a different one than the store: other programs guess it,"
        " and take a raw file that begins like an image for that image. Only a deep check finds this.",
    ),
    "layers-circular": Kind(
        "I3", "A recorded layer is its own backing file, directly or through others: the store was damaged or edited."
    ),
    "layer-misplaced": Kind(
        "I3",
        "A snapshot, disk or layer is recorded on a layer of another disk: the store was damaged or edited. A"
        " revert to it would give the other disk's content. Only a deep check finds this.",
    ),
    "parent-younger": Kind(
        "I3",
        "A snapshot is older than its recorded parent: the store was damaged or edited. Only a deep check finds this.",
    ),
    "size-differs": Kind(
        "I3",
        "Another program resized the image; new overlays on it would truncate or grow the disk.",
        "The new size of an active layer that has grown is recorded; the layers below keep theirs.",
    ),
    "image-corrupt": Kind("I3", "QEMU marked this image corrupt and refuses to write to it."),
    "image-damaged": Kind("I3", "qemu-img check found damage: reads through this layer may return wrong data."),
    "image-unread": Kind("I3", "qemu-img could not check this image, for the given reason: its integrity is unknown."),
    "image-leaks": Kind(
        "I3",
        "Clusters of the image are allocated but unused: they only take space.",
        "qemu-img check -r leaks reclaims them while the image is not open.",
    ),
    "table-lost": Kind(
        "I3",
        "Clusters of the image are allocated but no table names them, and a lost table may have: they may hold the"
        " only copy of written data. They are not reclaimed; copy the image before you try a repair.",
    ),
    "image-in-use": Kind("I4", "Another process than this machine's QEMU has the image open for writing."),
    "frozen-written": Kind(
        "I1",
        "A frozen image was written to (for example by a QEMU started on the images from before a snapshot), or"
        " its time was changed: its snapshots may not read as they were taken.",
    ),
    "unreferenced-file": Kind("I3", "The store does not know this file among the machine's images.", _ASIDE),
    "volume-left": Kind(
        "I6",
        "The store does not know this snapshot or clone of an RBD image or logical volume, which has the machine's"
        " name. Remove it with rbd or lvremove if nothing needs it.",
        "One that is unfinished is removed.",
    ),
    "volume-invalid": Kind(
        "I1", "A thick LVM snapshot has run full: the snapshot that reads it is lost. Delete that snapshot."
    ),
    "part-left": Kind("I6", "An unfinished file is left over; no open operation needs it.", _ASIDE),
    "mode-open": Kind("I3", "Other users can read this file or reach files in this folder.", _PRIVATE),
    "home-open": Kind(
        "I3",
        "Another user owns part of the home, or can write to it or to a folder above it, and could make QEMU run"
        " any program as the user who starts a machine. Root does not use such a home; no other user uses one that"
        " belongs to somebody else.",
        "What belongs to this user becomes writable for this user only.",
    ),
    "tag-missing": Kind("I1", "The image lacks the tag of an internal snapshot."),
    "state-file-missing": Kind("I1", "The file with a snapshot's memory does not exist or cannot be read."),
    "state-file-replaced": Kind(
        "I1", "Another file has the path of a snapshot's memory; relocating the home accepts one with the same digest."
    ),
    "state-file-damaged": Kind("I1", "The file with a snapshot's memory has changed; it will not be loaded."),
    "state-file-unread": Kind(
        "I1", "The file with a snapshot's memory could not be read to its end: its integrity is unknown."
    ),
    "template-damaged": Kind(
        "I1",
        "The template of a snapshot's memory has changed: forks that run on it may be wrong, and no others are made"
        " from it. Only a deep check finds this.",
        "It is removed; the next fork makes another one.",
    ),
    "variables-missing": Kind(
        "I1",
        "The file with the machine's UEFI variables, or a snapshot's copy of them or of the TPM's state, does not"
        " exist.",
    ),
    "writable-shared": Kind("I4", "An active layer has another reader, whose content would change with it."),
    "writable-frozen": Kind("I4", "QEMU has a frozen layer open for writing."),
    "graph-differs": Kind("I5", "QEMU's chain differs from the store's; changes to the disk are refused."),
    "disk-unplugged": Kind(
        "I5",
        "QEMU has no device for a disk of the machine: snapshots do not include it, and changes to its layers are"
        " refused. The next start attaches it again.",
    ),
    "disk-attached": Kind(
        "I5",
        "The guest writes to a device that is no disk of the machine: no snapshot includes it, and a revert"
        " detaches it.",
    ),
    "device-attached": Kind(
        "I5",
        "Somebody has plugged a device into QEMU that is not the machine's: memory is not saved beside it, as no other"
        " QEMU would have it, and the next start lacks it.",
    ),
    "nic-unplugged": Kind(
        "I5",
        "QEMU has no device for a network card of the machine: memory is neither saved nor loaded without it. The next"
        " start attaches it again, unless it is detached from the machine, too.",
    ),
    "operation-open": Kind("I6", "An interrupted operation has not been recovered yet.", "It is recovered."),
    "machine-busy": Kind("I6", "Another controller is working on the machine; check again when it is done."),
    "worker-left": Kind(
        "I6",
        "A helper is still running without a user: a QEMU without a guest, or a TPM without its QEMU.",
        "It is ended.",
    ),
    "job-left": Kind(
        "I6", "QEMU has a job that belongs to no open operation.", "A concluded job of qmpsnap's is dismissed."
    ),
    "node-left": Kind(
        "I6", "QEMU has an image open that no disk of the machine reads.", "An unused node of qmpsnap's is closed."
    ),
    "guest-frozen": Kind("I10", "The guest's file systems are frozen: its programs block.", "They are thawed."),
    "guest-held": Kind("I10", "QEMU has paused the guest, after a migration or because a disk request failed."),
    "tpm-ended": Kind(
        "I10",
        "The program that emulates the guest's TPM has ended: the TPM fails, and memory is not saved without it, until"
        " the machine is stopped and started. Its state on the disk is as it was.",
    ),
    "monitor-silent": Kind("I10", "QEMU runs but does not answer; its open images could not be checked."),
}
"""Every code there is; docs/reference/findings.md lists them."""


class Finding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that does not hold.

    Attributes:
        code: a key of :data:`KINDS`.
        text: what exactly was found, one sentence, for people; no code reads it.
        disk, layer, file, job, node: what it is about, by which repair knows it.
        repairable: ``--repair`` would do what the kind says; of some kinds only our own are touched.
    """

    code: str
    machine: str
    text: str
    disk: str | None = None
    layer: LayerId | None = None
    file: str | None = None
    job: JobId | None = None
    node: NodeName | None = None
    repairable: bool = False

    @property
    def kind(self) -> Kind:
        """What the code stands for."""
        return KINDS[self.code]

    @property
    def repair(self) -> str:
        """What ``--repair`` would do about this one; empty for nothing."""
        return self.kind.repair if self.repairable else ""
