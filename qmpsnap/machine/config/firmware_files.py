"""What a guest's firmware keeps beside the disks: UEFI's variables and, of a machine with a TPM, that one's state.

Both are copied, compared and removed together, by the path of the variables. The TPM is swtpm's, which has a folder of
its own; a copy of the variables tells by its name that the state, empty for a TPM that nobody has used, is beside it.
"""

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qmpsnap.errors import HostCannot, StateError
from qmpsnap.host.files import make_folder, opened_folder, replace_durably, sync_folder
from qmpsnap.model.home import TPM, VARIABLES, WITH_TPM

STATE: Final = "tpm2-00.permall"
"""What swtpm writes there whenever the TPM's state changes: another file, renamed over this one."""
PID: Final = "pid"
"""In which it writes its process."""
_OTHERS: Final = (PID, "tpm2-00.volatilestate", "tpm2-00.savestate", "TMP2-00.permall", ".lock", f"{STATE}.part")
"""What else it may leave, of no use to the next one."""
NOTICES: Final = 1.0
"""Seconds in which a TPM ends by itself once its QEMU has. It does not if no QEMU has ever talked to it."""
ENDING: Final = 10.0
"""Seconds from QEMU's end to that of its TPM, at the latest by our kill."""
_LOOK: Final = 0.01


def tpm_state(variables: str | Path) -> Path | None:
    """Where the TPM's state is; None for a copy of the variables that has none beside it."""
    path = Path(variables)
    if path.name == VARIABLES:
        return path.parent / TPM / STATE
    return path.with_suffix(".tpm") if path.stem.endswith(WITH_TPM) else None


def copies(variables: str) -> tuple[str, ...]:
    """The files of a copy: that of the variables, and of the TPM's state."""
    state = tpm_state(variables)
    return (variables, str(state)) if state else (variables,)


def missing(variables: str | None) -> tuple[str, ...]:
    """Which files of a copy are not there."""
    return tuple(path for path in copies(variables) if not Path(path).is_file()) if variables else ()


def content(variables: str | Path) -> tuple[bytes, bytes]:
    """Variables and TPM state, which is empty where there is none; raises ``OSError``."""
    return Path(variables).read_bytes(), _state(variables)


def copy_variables(source: str, target: str) -> None:
    """Copy a UEFI variable store, and the TPM's state where both have one, durably over whatever ``target`` was.

    Raises:
        HostCannot: it cannot be read or written.
        StateError: the TPM of the machine's last QEMU still runs.
    """
    try:
        _copy_state(source, target)
        replace_durably(target, Path(source).read_bytes())
    except OSError as error:
        raise HostCannot(f"the variable store {source} cannot be copied: {error.strerror}") from error


def copy_variables_once(source: str, target: str) -> None:
    """The same, unless that was done already: by now ``source`` may have been replaced."""
    if not Path(target).exists():
        copy_variables(source, target)
        return
    try:
        sync_folder(Path(target).parent)  # the process that made it may have died right before
    except OSError as error:
        raise HostCannot(f"the folder of {target} cannot be synced: {error.strerror}") from error


def forget_variables(path: str) -> None:
    """Remove a copy of a variable store, an unfinished one, too."""
    for name in copies(path):
        for each in (name, f"{name}.part"):
            Path(each).unlink(missing_ok=True)


def remove_tpm(folder: Path) -> None:
    """Remove a machine's TPM, unless somebody has put other files into its folder."""
    if folder.is_dir() and not folder.is_symlink():
        end_left(folder)
        _clear(folder, STATE, *_OTHERS)
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def tpm_held(folder: Path) -> Iterator[int]:
    """The folder of a TPM, locked: that of an earlier QEMU has ended, if need be by us.

    The lock is the descriptor's, so that an emulator that inherits it has it for as long as it runs.

    Raises:
        StateError: it has not ended.
    """
    with opened_folder(folder) as descriptor:
        since = time.monotonic()
        while not _locked(descriptor):
            if time.monotonic() > since + NOTICES:
                _kill(folder)
            if time.monotonic() > since + ENDING:
                raise StateError(
                    f"the TPM emulator that works in {folder} has not ended with its QEMU",
                    hint=f"end it: fuser -k {folder}",
                )
            time.sleep(_LOOK)
        yield descriptor


def tpm_runs(folder: Path) -> bool:
    """Whether an emulator works in the folder."""
    try:
        with opened_folder(folder) as descriptor:
            return not _locked(descriptor, fcntl.LOCK_SH)  # who else looks keeps nobody from it
    except OSError:
        return False


def end_left(folder: Path) -> None:
    """End an emulator whose QEMU has ended, or was never there; raises ``StateError`` as :func:`tpm_held`."""
    if tpm_runs(folder):
        with tpm_held(folder):
            pass


def clear_leftovers(folder: Path) -> None:
    """Remove what an earlier emulator has left besides the state."""
    _clear(folder, *_OTHERS)


def _state(variables: str | Path) -> bytes:
    path = tpm_state(variables)
    try:
        return path.read_bytes() if path else b""
    except FileNotFoundError:
        return b""


def _copy_state(source: str, target: str) -> None:
    there, to = tpm_state(source), tpm_state(target)
    if not there or not to:
        return
    if Path(target).name != VARIABLES:
        replace_durably(to, _state(source))
        return
    make_folder(to.parent)
    state = there.read_bytes()
    with tpm_held(to.parent):  # or its last write would come after ours
        clear_leftovers(to.parent)
        if state:
            replace_durably(to, state)
        else:
            to.unlink(missing_ok=True)
            sync_folder(to.parent)


def _kill(folder: Path) -> None:
    """End the emulator by the file in which it has written its process, if that is still it."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / PID).read_text())
        handle = os.pidfd_open(pid)
        try:
            held = any(Path(each).samefile(folder) for each in Path(f"/proc/{pid}/fd").iterdir() if each.exists())
            if held and Path(f"/proc/{pid}/comm").read_text().strip() == "swtpm":
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _locked(descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
