"""One store, one folder of sockets, whatever ``XDG_RUNTIME_DIR`` says: a link beside the store leads to it.

A shell of a login has that variable, cron and ``su`` have not. Without the link each would look for a machine's QEMU
in a folder of its own, and take for stopped what the other has started.
"""

from __future__ import annotations

import contextlib
import os

from qmpsnap.host import files

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qmpsnap.model.home import Home
    from qmpsnap.model.places import Places

LINK = "run-folder"


def followed(home: Home) -> Home:
    """The places with the run folder that the store's machines have; ``QMPSNAP_HOME`` has its own, without a link."""
    from pathlib import Path

    from msgspec.structs import replace

    return replace(home, run=Path(run_of(home)))


def run_of(home: Home | Places) -> str:
    """The run folder of a home's machines."""
    led = ""
    with contextlib.suppress(OSError):  # one that is gone must not be resolved
        led = "" if home.beneath else os.readlink(f"{home.data}/{LINK}")  # noqa: PTH115
    return led if os.path.isdir(led) else str(home.run)  # noqa: PTH112


def settled(home: Home, *, in_use: Callable[[], Path | None]) -> Home:
    """The same, once it is settled: the first process, or the first after the folder was removed, decides.

    ``in_use`` finds the run folder of a QEMU that runs, where one does.
    """
    if home.beneath or _is_settled(home):
        return followed(home)
    import fcntl

    # A command that needs a run folder reports what is wrong with it.
    with contextlib.suppress(OSError), files.opened_folder(home.data) as folder:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not _is_settled(home):
            chosen = in_use() or home.run
            files.make_folder(chosen)
            (home.data / LINK).unlink(missing_ok=True)
            (home.data / LINK).symlink_to(chosen)
    return followed(home)


def _is_settled(home: Home) -> bool:
    link = home.data / LINK
    return link.is_symlink() and link.is_dir()
