"""What has to be on the disk before anybody counts on it."""

import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Write out which names a folder has; a file's own content is another matter.

    Raises:
        OSError: no such folder, or the disk fails.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
