"""Guards: processes of their own that see a guest go on which we hold, whatever becomes of us (``guard.py``)."""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
from anyio import to_thread

from qmpsnap.errors import DeadlinePassed, HostCannot
from qmpsnap.host.threads import completed, to_end
from qmpsnap.machine import guard

_PACKAGE = str(Path(guard.__file__).parents[2])
"""Where this very qmpsnap lies, however it was found."""

START_DEADLINE = 10.0
"""Seconds until a guard must be there; it takes some tens of milliseconds."""


class Watch:
    """Our end of a guard, from :func:`watching` or :func:`over_agent`."""

    def __init__(self, end: socket.socket, child: "subprocess.Popen[bytes]") -> None:
        self._end = end
        self._child = child
        self._ready = False

    async def ready(self) -> None:
        """Return once the guard watches; before that nothing may be held."""
        if self._ready:
            return
        if await self.hear(1, deadline=START_DEADLINE) != b"r":
            raise HostCannot("the guard process that resumes the guest has ended")
        self._ready = True

    async def hear(self, size: int, *, deadline: float) -> bytes:
        """What the guard says next, empty when it has ended."""
        try:
            with anyio.fail_after(deadline):
                await anyio.wait_readable(self._end)
                return self._end.recv(size)
        except TimeoutError as error:
            raise DeadlinePassed(
                f"the guard process that resumes the guest did not answer for {deadline:g} s"
            ) from error
        except OSError:
            return b""

    def say(self, word: bytes) -> None:
        """Tell the guard something, without waiting."""
        with suppress(OSError):  # it has ended; a caller that wants an answer will notice
            self._end.send(word)

    async def leave(self, word: bytes = b"d") -> None:
        """Tell the guard a last word, if there is one, and let go of it."""
        if word:
            self.say(word)
        self._end.close()
        await completed(to_thread.run_sync(self._child.wait))  # only what has started it: that ends at once


@asynccontextmanager
async def watching(machine: str, *, run_dir: Path, environment: Mapping[str, str]) -> AsyncIterator[Watch]:
    """For the block: if we die in it, ``recover`` resumes the guest by its rules.

    The guard starts while the block does other things; await :meth:`Watch.ready` before the guest is paused.
    """
    watch = await _start(["recover"], [], [machine, _PACKAGE], run_dir=run_dir, environment=environment)
    try:
        yield watch
    finally:
        await watch.leave()


async def over_agent(channel: socket.socket, *, window: float, run_dir: Path) -> Watch:
    """A guard that thaws on this connection to the guest's agent, unasked ``window`` seconds after ``f``.

    The caller leaves it. The conversation is synchronised, and nobody else reads from it once the guard thaws.
    """
    watch = await _start(["thaw"], [channel.fileno()], [f"{window}"], run_dir=run_dir, environment={})
    try:
        await watch.ready()
    except BaseException:
        await watch.leave()
        raise
    return watch


async def _start(
    mode: Sequence[str],
    inherited: Sequence[int],
    rest: Sequence[str],
    *,
    run_dir: Path,
    environment: Mapping[str, str],
) -> Watch:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    passed = [theirs.fileno(), *inherited]
    argv = [sys.executable, "-I", "-S", guard.__file__, *mode, *map(str, passed), *rest]

    def spawn() -> "subprocess.Popen[bytes]":
        null = subprocess.DEVNULL
        return subprocess.Popen(
            argv,
            cwd=run_dir,
            env={**os.environ, **environment},
            stdin=null,
            stdout=null,
            stderr=null,
            pass_fds=passed,
            start_new_session=True,
        )

    try:
        child = await to_end(spawn)
    except BaseException as error:
        ours.close()
        if isinstance(error, OSError):
            raise HostCannot(f"{sys.executable} cannot be run: {error}") from error
        raise
    finally:
        theirs.close()
    return Watch(ours, child)
