"""Following a mirror that its guest may outrun."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from qmpsnap.errors import QmpError
from qmpsnap.model.names import JobId
from qmpsnap.qmp import jobs
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.session import COMMAND_DEADLINE, Bell

JOB = JobId("qs.1.vda")


class _Silence:
    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    async def wait(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class Outrun:
    """A mirror whose rest is told by a list; the last entry is said for ready, None while nothing is known."""

    def __init__(self, left: Sequence[int | None], *, changes: bool) -> None:
        self._left = list(left)
        self._changes = changes
        self.said: list[str] = []

    async def send_descriptor(self, descriptor: int) -> None:
        raise AssertionError(f"nobody should send {descriptor} here")

    @asynccontextmanager
    async def listen(self, *events: str) -> AsyncIterator[Bell]:
        assert events
        yield _Silence()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        deadline: float = COMMAND_DEADLINE,  # noqa: ARG002 - the protocol's
    ) -> Any:
        if command == "query-jobs":
            left = self._left.pop(0)
            progress = {"current-progress": 0, "total-progress": 0}
            if left is not None:
                progress = {"current-progress": 100, "total-progress": 100 + left}
            state = "running" if self._left else "ready"
            return [{"id": JOB, "type": "mirror", "status": state, **progress}]
        self.said.append(command)
        assert arguments == {"id": JOB, "type": "mirror", "copy-mode": "write-blocking"}
        if not self._changes:
            raise QmpError("no such command", qmp_class="CommandNotFound")
        return {}


@pytest.mark.parametrize(("state", "changes"), [("blocking", True), ("outrun", False)])
async def test_without_progress_the_writes_are_made_to_wait(
    monkeypatch: pytest.MonkeyPatch, state: str, *, changes: bool
) -> None:
    monkeypatch.setattr(jobs, "WAKE", 0.01)
    told: list[str] = []
    qemu = Outrun([50, 50, 50, 0], changes=changes)
    info = await jobs.follow_mirror(qemu, JOB, "ready", patience=0, report=lambda job: told.append(job.status))
    assert info.status == "ready"
    assert qemu.said == ["block-job-change"]
    assert told == ["running", state, state, "ready"]


async def test_with_progress_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "WAKE", 0.01)
    qemu = Outrun([None, None, 50, 40, 30, 0], changes=True)
    await jobs.follow_mirror(qemu, JOB, "ready", patience=0)
    assert qemu.said == []


class _Of:
    """A QEMU of a version."""

    def __init__(self, version: str) -> None:
        major, minor, micro = map(int, version.split("."))
        self._answer = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": ""}

    async def execute(self, command: str, *_: Any, **__: Any) -> Any:
        assert command == "query-version"
        return self._answer


@pytest.mark.parametrize(
    ("version", "misses"),
    [
        ("7.2.22", False),
        ("8.0.0", True),
        ("8.2.2", True),
        ("9.2.4", True),
        ("10.0.8", True),
        ("10.0.9", False),
        ("10.0.13", False),
        ("10.1.0", True),
        ("10.2.2", True),
        ("11.0.0", False),
        ("11.1.3", False),
    ],
)
async def test_which_qemus_miss_first_writes(version: str, misses: bool) -> None:  # noqa: FBT001 - a parameter
    qemu: Any = _Of(version)
    assert await jobs.misses_first_writes(qemu) is misses


@pytest.mark.parametrize(
    ("status", "total", "tracks"),
    [
        ("created", 0, False),
        ("running", 0, False),
        ("paused", 0, False),
        ("running", 1, True),
        ("paused", 1, True),
        ("ready", 0, True),
        ("concluded", 0, True),
    ],
)
def test_when_a_mirror_tracks_writes(status: str, total: int, tracks: bool) -> None:  # noqa: FBT001 - a parameter
    info = JobInfo(id=JOB, type="mirror", status=status, current_progress=0, total_progress=total)
    assert jobs.tracks_writes(info) is tracks
