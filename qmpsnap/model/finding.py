"""What `check` finds: each kind of damage has a code that stays, what it means, and what repair does about it."""

from typing import Final

from msgspec import Struct

from qmpsnap.model.names import LayerId


class Kind(Struct, frozen=True):
    """One kind of finding.

    Attributes:
        invariant: of docs/explanation/how-it-works.md.
        means: one sentence for whoever has never met it.
        repair: what ``--repair`` does, one sentence; empty when it does nothing.
    """

    invariant: str
    means: str
    repair: str = ""


_ASIDE: Final = "It is moved to the machine's quarantine folder, with a note."
_COPY: Final = "qmpsnap relocate compares it, and takes it over with --accept-copies"
_PRIVATE: Final = "Its mode becomes 0600, a folder's 0700."

KINDS: Final[dict[str, Kind]] = {
    "store-older": Kind(
        "I4",
        "The store is an old copy: images on disk were made after what it knows, and writing by its record would"
        " damage them.",
    ),
    "machine-lost": Kind(
        "I4",
        "The store is an old copy, or was made again without that machine: which layers it reads is not known, so none"
        " is merged or removed.",
    ),
    "record-missing": Kind(
        "I3",
        "The file that a lost store could be made again from is missing, or is another machine's.",
        "It is written again from the store.",
    ),
    "layer-missing": Kind("I3", "A recorded layer's file is not there or is no image: all that reads it is lost."),
    "home-moved": Kind(
        "I3",
        "The home was moved or copied: headers and records name the folder it was in. Nothing is changed until qmpsnap"
        " relocate lets it go on where it is; that keeps names, texts and tree.",
    ),
    "layer-replaced": Kind(
        "I3",
        "Another file is where the recorded layer's should be; it may hold anything. Put the recorded one back; should"
        f" this be a copy of it: {_COPY}.",
    ),
    "backing-differs": Kind(
        "I3",
        "The image's header names another backing than the one recorded: other tools read another content. After a"
        " move or copy qmpsnap relocate puts it right.",
    ),
    "backing-format-differs": Kind(
        "I3",
        "The image's header names no format of its backing, or another than the one recorded: other tools guess it, and"
        " take a raw one that begins like an image for that image. It is found with --deep.",
    ),
    "layers-circular": Kind(
        "I3",
        "The store has it that a layer reads itself, by way of those below it: it was damaged, or written by hand.",
    ),
    "layer-misplaced": Kind(
        "I3",
        "A snapshot, a disk or a layer is recorded on a layer of another disk: the store was damaged, or written by"
        " hand. Whoever goes back to it has the other disk's content. It is found with --deep.",
    ),
    "parent-younger": Kind(
        "I3",
        "A snapshot is recorded as grown from one that was taken after it: the store was damaged, or written by hand."
        " It is found with --deep.",
    ),
    "size-differs": Kind(
        "I3",
        "The image was resized behind qmpsnap; new layers on it would cut or lengthen the disk.",
        "The size of a layer that a guest writes to and that has grown is recorded; each layer below keeps its own.",
    ),
    "image-corrupt": Kind("I3", "QEMU has found damage in this image and marked it; it refuses to write to it."),
    "image-damaged": Kind("I3", "qemu-img check has found damage: what reads this layer may read wrong data."),
    "image-unread": Kind(
        "I3", "qemu-img could not check this image, for the reason it gives: whether it is whole is not known."
    ),
    "image-leaks": Kind(
        "I3",
        "Clusters of the image are marked as used and are not: they only take space.",
        "qemu-img check -r leaks gives them back, as nobody has the image open.",
    ),
    "table-lost": Kind(
        "I3",
        "Clusters of the image are marked as used, no table names them, and a table looks lost that may have: they may"
        " be the only copy of what was written. They are not given back; copy the image before you try anything on it.",
    ),
    "image-in-use": Kind("I4", "Another process has the image open for writing, and it is not this machine's QEMU."),
    "frozen-written": Kind(
        "I1",
        "Something has written to a frozen image, as a QEMU that was started on the images of before a snapshot, or has"
        " given its file another time: what reads it may not read as at its moment.",
    ),
    "unreferenced-file": Kind("I3", "The file lies among the machine's images and the store does not know it.", _ASIDE),
    "part-left": Kind("I6", "An unfinished file is left; no operation is open that could need it.", _ASIDE),
    "mode-open": Kind("I3", "Other users can read it, or reach what is in it.", _PRIVATE),
    "home-open": Kind(
        "I3",
        "Another user can write to the home, or to a folder that it lies in, or owns a part of it: they could have QEMU"
        " run anything as the user who starts a machine. Root uses no such home, and nobody one of another user's.",
        "What is this user's becomes writable for nobody else.",
    ),
    "tag-missing": Kind("I1", "The image does not have the tag that an internal snapshot lies under."),
    "state-file-missing": Kind("I1", "The file with a snapshot's memory is not there, or cannot be read."),
    "state-file-replaced": Kind(
        "I1", "Another file is where a snapshot's memory should be; qmpsnap relocate takes over one with its digest."
    ),
    "state-file-damaged": Kind("I1", "The file with a snapshot's memory is not what it was; it will not be loaded."),
    "state-file-unread": Kind(
        "I1", "The file with a snapshot's memory could not be read to its end: whether it is whole is not known."
    ),
    "variables-missing": Kind("I1", "The file with the machine's UEFI variables, or a snapshot's copy, is not there."),
    "writable-shared": Kind("I4", "A layer that a guest writes to has another reader, whose content would change."),
    "writable-frozen": Kind("I4", "QEMU has a frozen layer open for writing."),
    "graph-differs": Kind("I5", "QEMU's chain is not the one that the store has; what changes it is refused."),
    "disk-unplugged": Kind(
        "I5",
        "QEMU has no device for a disk of the machine: snapshots are taken without it, and what would change it is"
        " refused. A QEMU that is started has it again.",
    ),
    "disk-attached": Kind(
        "I5",
        "The guest writes to something that is no disk of the machine: it is in no snapshot, and gone after a revert.",
    ),
    "operation-open": Kind(
        "I6", "An operation was interrupted and has not been ended yet.", "It is ended as recover does."
    ),
    "machine-busy": Kind("I6", "Another controller works on the machine now; look again when it has ended."),
    "worker-left": Kind("I6", "A helper QEMU is left that nobody waits for.", "It is ended."),
    "job-left": Kind(
        "I6", "QEMU has a job that belongs to no open operation.", "One of ours that is over is dismissed."
    ),
    "node-left": Kind(
        "I6", "QEMU has an image open that no disk of the machine reads.", "One of ours that nobody uses is closed."
    ),
    "guest-frozen": Kind("I10", "The guest's file systems are frozen: its programs wait.", "They are thawed."),
    "guest-held": Kind("I10", "QEMU holds the guest: after a migration, or because a request to a disk failed."),
    "monitor-silent": Kind("I10", "QEMU runs and does not answer; what it has open could not be looked at."),
}
"""Every code there is; docs/reference/findings.md lists them."""


class Finding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that does not hold.

    Attributes:
        code: a key of :data:`KINDS`.
        text: what exactly was found, one sentence.
        repairable: ``--repair`` would do what the kind says; of some kinds only our own are touched.
    """

    code: str
    machine: str
    text: str
    disk: str | None = None
    layer: LayerId | None = None
    file: str | None = None
    repairable: bool = False

    @property
    def kind(self) -> Kind:
        """What the code stands for."""
        return KINDS[self.code]

    @property
    def repair(self) -> str:
        """What ``--repair`` would do about this one; empty for nothing."""
        return self.kind.repair if self.repairable else ""
