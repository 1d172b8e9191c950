"""What is kept of a failed test's machine: its logs, and all of it as it was, in one file."""

import contextlib
import re
import shlex
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.api.machine_handle import MachineHandle
from qmpsnap.errors import QmpsnapError
from qmpsnap.machine.starting import logs
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.lifecycle import bundle
from qmpsnap.qmp.session import TAPS

FAILED = "failed"
"""The snapshot of the failed machine."""
BUNDLE = "machine.bundle"
_KEPT = 2000
"""Messages of each machine that stay."""


class Transcript:
    """The last messages of each machine's monitor, in lines."""

    def __init__(self) -> None:
        self._of: dict[str, deque[str]] = {}

    def add(self, machine: str, arrow: str, message: str) -> None:
        """Take a message; see :data:`qmpsnap.qmp.session.Tap`."""
        line = f"{datetime.now(UTC):%H:%M:%S.%f} {arrow} {message}"
        self._of.setdefault(machine, deque(maxlen=_KEPT)).append(line)

    def take(self, machine: str) -> list[str]:
        """What there is of a machine, which is forgotten."""
        return list(self._of.pop(machine, ()))


@contextmanager
def transcribed() -> Iterator[Transcript]:
    """Listen to every monitor for the block."""
    transcript = Transcript()
    TAPS.append(transcript.add)
    try:
        yield transcript
    finally:
        TAPS.remove(transcript.add)


async def keep(machine: MachineHandle, folder: Path, messages: Sequence[str], *, test: str, whole: bool) -> str:
    """Write it all into a new folder; returns lines that say what is there. The machine is stopped afterwards.

    Args:
        machine: of the test; it may have any state, or none.
        folder: does not exist yet.
        messages: of its monitor.
        test: by whose name the machine is to be called when it is resumed.
        whole: also disks and memory.
    """
    folder.mkdir()
    said = [f"logs of machine {machine.name}: {folder}"]
    context = machine._context  # noqa: SLF001 - of the same library
    _copy_logs(context, machine.name, folder)
    (folder / "qmp.log").write_text("".join(f"{line}\n" for line in messages))
    if not whole:
        return "\n".join([*said, "disks and memory were not kept: qmpsnap_keep_failed others were"])
    memory = True
    try:
        await machine.snapshot(FAILED, kind="full")
    except QmpsnapError as error:
        memory = False
        said.append(f"its memory could not be kept: {error.message}")
    try:
        await _exported(context, machine, folder / BUNDLE)
    except QmpsnapError as error:
        return "\n".join([*said, f"its disks could not be kept: {error.message}"])
    line = _resuming(folder / BUNDLE, test, memory=memory)
    (folder / "resume").write_text(f"#!/bin/sh\n{line}\n")
    return "\n".join([*said, f"{'resume' if memory else 'boot'} it: {line}"])


def _copy_logs(context: Context, name: str, folder: Path) -> None:
    for log in logs.NAMES:
        with contextlib.suppress(OSError):
            shutil.copyfile(context.home.log_dir(name) / log, folder / log)


async def _exported(context: Context, machine: MachineHandle, target: Path) -> None:
    record = await machine.record()
    if record.origin and record.origin.ephemeral:  # else it would be gone once it is stopped
        await context.astore.apply(machine.name, Change(origin=replace(record.origin, ephemeral=False, owner=None)))
    if await machine.is_running():
        await machine.stop(force=True)
    await bundle.export(context, machine.name, target)


def _resuming(file: Path, test: str, *, memory: bool) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", test.lower()).strip("-")[:50].rstrip("-") or FAILED
    bring = ["qmpsnap", "import", "bundle", str(file), "--name", name]
    go_on = ["qmpsnap", "snapshot", "revert", name, FAILED] if memory else ["qmpsnap", "start", name]
    return f"{shlex.join(bring)} && {shlex.join(go_on)}"
