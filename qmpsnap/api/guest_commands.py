"""Commands and files of a guest, as callers of the API have them."""

from __future__ import annotations

import codecs
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from qmpsnap.errors import ProcessError, UsageError
from qmpsnap.host.threads import to_end
from qmpsnap.machine import agent_files
from qmpsnap.machine.agent import Agent, Completed


async def run(
    connect: Callable[[float], AbstractAsyncContextManager[Agent]],
    words: Sequence[str],
    *,
    timeout: float,
    encoding: str | None,
) -> Completed[str] | Completed[bytes]:
    """Run a command, and decode its output."""
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise UsageError(str(error), hint="use encoding='utf-8', or None for bytes") from error
    async with connect(timeout) as guest:
        done = await guest.run(words, deadline=timeout)
    if encoding is None:
        return done
    return Completed[str](
        exit_status=done.exit_status,
        stdout=done.stdout.decode(encoding, errors="replace"),
        stderr=done.stderr.decode(encoding, errors="replace"),
        truncated=done.truncated,
    )


def failed(command: str | Sequence[str], done: Completed[str] | Completed[bytes], *, machine: str) -> ProcessError:
    """The error of a command that ended with another status than 0."""
    said = done.stderr if isinstance(done.stderr, str) else done.stderr.decode(errors="replace")
    return ProcessError(
        f"{command!r} ended with exit status {done.exit_status} in the guest of {machine}: {said.strip()}",
        exit_status=done.exit_status,
        stdout=done.stdout,
        stderr=done.stderr,
        machine=machine,
    )


async def fetch(guest: Agent, source: str, target: Path, *, timeout: float) -> int:
    """Copy a file from the guest, over one that is there once it is whole."""
    part = await to_end(_beside, target)
    try:
        size = await agent_files.get(guest, source, part, deadline=timeout)
        await to_end(os.replace, part, target)
    except BaseException:
        await to_end(part.unlink, True)
        raise
    return size


def _beside(target: Path) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.absolute().parent)
    os.close(descriptor)
    return Path(name)
