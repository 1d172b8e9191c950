"""Which of QEMU's commands a verb uses, where there are several for the same."""

from typing import Literal

By = Literal["blockdev-snapshot", "blockdev-snapshot-sync"]
"""The QMP command that puts an overlay on top: of a node that is open already, or of a file that it opens itself."""

MirrorBy = Literal["blockdev-mirror", "drive-mirror"]
"""The QMP command that copies a disk: to a node that is open already, or to a file that it opens itself."""

SaveBy = Literal["snapshot-save", "savevm"]
LoadBy = Literal["snapshot-load", "loadvm"]
DeleteBy = Literal["blockdev-snapshot-delete-internal-sync", "delvm"]
"""The command for snapshots inside images: QMP's, or that of the human monitor, which takes every disk of QEMU's."""
