"""Commands and files of a guest, as callers of the API have them."""

from __future__ import annotations

import codecs
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import anyio

from qmpsnap.errors import ProcessError, QmpsnapError, UsageError
from qmpsnap.host.threads import to_end
from qmpsnap.machine import agent_files
from qmpsnap.machine.agent import Agent, Completed
from qmpsnap.model.machines.record import Machine
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp import commands

WAIT: Final = 1.0
"""Seconds that an agent may take to open its port, in a guest that has booted."""
_ASKING: Final = 0.5
"""Seconds in which a QEMU that nobody else talks to says whether the port is open."""

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SURROUNDED: Final = (
    'while [ "$1" != -- ]; do export "$1"; shift; done; shift; if [ -n "$1" ]; then cd -- "$1" || exit 126; fi;'
    ' shift; exec "$@"'
)
"""Runs a program with variables of its own (``NAME=VALUE ... --``) in a folder (an empty word: where the agent is).

The agent's own ``env`` would take all other variables away, ``PATH`` with them.
"""


def surrounded(words: Sequence[str], *, env: Mapping[str, str], cwd: str | None) -> list[str]:
    """The program with these variables, in that folder of the guest."""
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise UsageError(f"{name!r} cannot be a variable of a command", hint="use letters, digits and underscores")
    if cwd is not None and (not cwd.startswith("/") or "\0" in cwd):
        raise UsageError(f"{cwd!r} is not an absolute path in the guest", hint="write the path from / on")
    if not env and cwd is None:
        return list(words)
    assignments = [f"{name}={value}" for name, value in env.items()]
    return ["/bin/sh", "-c", _SURROUNDED, "sh", *assignments, "--", cwd or "", *words]


async def listens(context: Context, machine: Machine) -> bool | None:
    """Whether something in the guest has the agent's port open; None where QEMU does not say so at once."""
    with anyio.move_on_after(_ASKING):
        try:
            async with context.monitor(machine, look=True) as qemu:
                return await commands.agent_listens(qemu) if qemu else None
        except QmpsnapError:
            pass
    return None


async def run(
    connect: Callable[[float], AbstractAsyncContextManager[Agent]],
    words: Sequence[str],
    *,
    timeout: float,
    encoding: str | None,
    stdin: bytes = b"",
    output: agent_files.Hear | None = None,
) -> Completed[str] | Completed[bytes]:
    """Run a command, and decode its output, unless ``output`` is given that."""
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise UsageError(str(error), hint="use encoding='utf-8', or None for bytes") from error
    async with connect(timeout) as guest:
        if output:
            done = await agent_files.heard(guest, words, output, deadline=timeout, stdin=stdin)
        else:
            done = await guest.run(words, deadline=timeout, stdin=stdin)
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
