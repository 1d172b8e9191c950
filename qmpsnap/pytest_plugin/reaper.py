"""Ends and removes what a test session has left, once its process is gone, however that has ended.

Run by its path, with nothing but the standard library: ``reaper.py PID FOLDER...``.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence

POLL = 0.5
"""Seconds between two looks whether the session has removed everything itself."""
PATIENCE = 20.0
"""Seconds until processes that do not end, and files that cannot be removed, are left."""


def clear(folders: Sequence[str]) -> None:
    """End every QEMU that works below one of the folders, and remove them."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        working = list(_working_in(folders))
        for descriptor in working:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], 1.0)
            os.close(descriptor)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if not working and not any(map(os.path.lexists, folders)):
            return
        time.sleep(0.02)


def _working_in(folders: Sequence[str]) -> Iterator[int]:
    """A descriptor of each process whose working folder is below one of these, or was before it was removed."""
    below = tuple(f"{folder}/" for folder in folders)
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/cwd").startswith(below):  # noqa: PTH115
                    descriptor = os.pidfd_open(int(entry))
                    if os.readlink(f"/proc/{entry}/cwd").startswith(below):  # noqa: PTH115 - still the same process
                        yield descriptor
                    else:
                        os.close(descriptor)


def main(pid: int, folders: Sequence[str]) -> None:
    """Wait for the end of a process, or until the first folder is gone; then clear what is left."""
    os.chdir("/")
    with contextlib.suppress(ProcessLookupError):
        watched = select.poll()
        watched.register(os.pidfd_open(pid), select.POLLIN)
        while os.path.lexists(folders[0]) and not watched.poll(POLL * 1000):
            pass
    clear(folders)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
