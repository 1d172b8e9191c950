"""Where a session's machines live: one home for all of its workers, which goes with the session's first process."""

import contextlib
import fcntl
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from qmpsnap.pytest_plugin import reaper

KEY = pytest.StashKey["Place"]()
_MEMORY = "/dev/shm"  # noqa: S108 - a folder of this session's own below it
_SENT = "qmpsnap_place"
_reapers: list[int] = []


class Place(NamedTuple):
    """A folder that is there from the first test that needs a machine until the end of the process ``pid``."""

    folder: str
    templates: str
    pid: int

    @classmethod
    def new(cls) -> Self:
        """Of this process; nothing is created yet."""
        name = f"qmpsnap-{secrets.token_hex(4)}"
        named = os.environ.get("QMPSNAP_TEMPLATES")
        return cls(
            folder=os.path.join(tempfile.gettempdir(), name),  # noqa: PTH118
            templates=os.path.join(named or _MEMORY, name),  # noqa: PTH118
            pid=os.getpid(),
        )

    @classmethod
    def of(cls, config: pytest.Config) -> "Place":
        """The session's, which workers of xdist are given by its first process."""
        if KEY not in config.stash:
            sent = getattr(config, "workerinput", {}).get(_SENT)
            is_here = sent and os.path.isdir(f"/proc/{sent[-1]}")  # noqa: PTH112 - else that is another host
            config.stash[KEY] = cls._make(sent) if sent and is_here else cls.new()
        return config.stash[KEY]

    def send(self, workerinput: dict[str, object]) -> None:
        """Let a worker have the same place."""
        workerinput[_SENT] = tuple(self)

    def make(self) -> Path:
        """Create the folder if it is not there; from now on it is removed when the process ends, however it does.

        An existing one of another user is refused, as a file system is.
        """
        folder = Path(self.folder)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if folder.stat().st_uid != os.geteuid():
                raise
            return folder
        nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        argv = [sys.executable, "-I", reaper.__file__, str(self.pid), self.folder, self.templates]
        _reapers.append(os.posix_spawn(sys.executable, argv, os.environ, file_actions=nothing, setsid=True))
        return folder

    def folder_for(self, size: int) -> str:
        """Where the template of a machine with that many bytes of memory goes."""
        from qmpsnap.machine import templates  # slow to load

        named = bool(os.environ.get("QMPSNAP_TEMPLATES"))
        return self.templates if named or templates.roomy(size) else f"{self.folder}/templates"

    @contextmanager
    def locked(self, key: str) -> Iterator[Path]:
        """The file in which the workers tell each other of a machine, for one of them at a time."""
        folder = self.make() / "pytest"
        folder.mkdir(exist_ok=True)
        with (folder / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder / f"{key}.json"

    def clear(self) -> None:
        """Remove all of it, if this is the process that it belongs to."""
        if self.pid == os.getpid():
            if os.path.lexists(self.folder):
                reaper.clear((self.folder, self.templates))
            while _reapers:
                pid = _reapers.pop()
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
