"""The QEMU that runs the original of an imported machine, whoever has started it."""

from pathlib import Path

from qmpsnap.errors import HostCannot, NotFoundError, UsageError
from qmpsnap.model.text import is_text


def running(uuid: str) -> int | None:
    """The process of a QEMU that was told this UUID, also inside another argument; None if there is none to be seen."""
    wanted = uuid.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().lower().split(b"\0")
        except OSError:  # it has ended
            continue
        # A QEMU that lies in a folder with its own libraries is started by their loader.
        program = words[0].rpartition(b"/")[2]
        if program.startswith((b"qemu", b"kvm", b"ld-")) and any(wanted in word for word in words[1:]):
            return int(entry.name)
    return None


def launched(pid: int) -> tuple[list[str], str, tuple[str, ...]]:
    """The words that a process was started with, the folder that it is in now, and the files that it has open."""
    proc = Path(f"/proc/{pid}")
    try:
        words = (proc / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
        folder = str((proc / "cwd").readlink())
        opened = {_target(descriptor) for descriptor in (proc / "fd").iterdir()}
    except PermissionError as error:
        raise HostCannot(f"process {pid} belongs to another user", hint="try again as that user or as root") from error
    except (OSError, OverflowError) as error:
        raise NotFoundError(f"there is no process {pid}") from error
    if any(not is_text(word) for word in words):
        raise UsageError(f"the command line of process {pid} is not UTF-8 text")
    return words, folder, tuple(sorted(opened - {""}))


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:  # closed meanwhile
        return ""
