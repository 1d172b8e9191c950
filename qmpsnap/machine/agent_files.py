"""Files of the guest through its agent: ``guest-file-open``, ``-read``, ``-write``, ``-flush``, ``-close``.

What a command says is one, too, where somebody wants it while it runs, or more of it than the agent keeps.
"""

import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal

import anyio

from qmpsnap.errors import QmpError, QmpsnapError
from qmpsnap.hint import option
from qmpsnap.host.threads import bounded, to_end, to_read
from qmpsnap.machine.agent import Agent, Completed

Stream = Literal["stdout", "stderr"]
STREAMS: Final[tuple[Stream, ...]] = ("stdout", "stderr")
Hear = Callable[[Stream, bytes], object]
"""Is given what a command says, in the order of each stream."""

CHUNK: Final = 1 << 20
"""Bytes in one request; the agent takes up to 48 MiB, and a reply is read as a whole."""
_CLOSING: Final = 5.0
"""Seconds in which the agent closes a file after a failure, or its handle is left to it."""


async def put(guest: Agent, content: Path | bytes, target: str, *, deadline: float) -> int:
    """Write a file of the guest, over one that is there; returns its size."""
    end = anyio.current_time() + deadline
    done = 0
    async with _opened(guest, target, "w", end) as handle:
        while part := await _part(content, done):
            written = 0
            while written < len(part):
                said = await guest.execute(
                    "guest-file-write",
                    {"handle": handle, "buf-b64": base64.b64encode(part[written:]).decode()},
                    deadline=_left(end),
                )
                count = said.get("count") if isinstance(said, dict) else None
                if type(count) is not int or not 0 < count <= len(part) - written:
                    raise guest.nonsense("guest-file-write")
                written += count
            done += len(part)
        await guest.execute("guest-file-flush", {"handle": handle}, deadline=_left(end))
    return done


async def get(guest: Agent, source: str, target: Path, *, deadline: float) -> int:
    """Write what a file of the guest holds into a new file; returns its size."""
    end = anyio.current_time() + deadline
    done = 0
    async with _opened(guest, source, "r", end) as handle:
        while True:
            said = await guest.execute("guest-file-read", {"handle": handle, "count": CHUNK}, deadline=_left(end))
            part, over = _read(guest, said)
            await to_end(_append, target, part)
            done += len(part)
            if over or not part:
                return done


_PLACE: Final = 'd=$(mktemp -d) && : >"$d/stdout" && : >"$d/stderr" && printf %s "$d"'
_WITH_FILES: Final = 'd=$1; shift; exec "$@" >"$d/stdout" 2>"$d/stderr"'
_ENDED: Final = '[ -z "$2" ] || kill -s PIPE "$2"; rm -rf "$1"'
_SHORT, _PAUSE = 0.005, 0.25
"""Seconds between two looks, at least and at most."""


async def heard(guest: Agent, words: Sequence[str], hear: Hear, *, deadline: float, stdin: bytes) -> Completed[bytes]:
    """Run a program, and pass on what it says while it runs, which files of the guest have until its end.

    Its output is not kept here. A program that is not waited for any more, as when ``hear`` raises, gets ``SIGPIPE``.
    """
    end = anyio.current_time() + deadline
    made = await guest.run(["/bin/sh", "-c", _PLACE], deadline=deadline)
    folder = made.stdout.decode(errors="replace")
    if made.exit_status or not folder.startswith("/"):
        said = made.stderr.decode(errors="replace").strip()
        raise QmpError(f"the guest has no room for the command's output: {said[:200]}", effect="none")
    handles: dict[Stream, int] = {}
    pid: object = None
    try:
        for name in STREAMS:
            handles[name] = await _open(guest, f"{folder}/{name}", "r", end)
        into_files = ["/bin/sh", "-c", _WITH_FILES, "sh", folder, *words]
        pid = await guest.begin(into_files, stdin=stdin, deadline=_left(end))
        pause = _SHORT
        while (left := end - anyio.current_time()) > 0:
            done = await guest.ended(pid, deadline=left)  # before the reading, which has all that was said then
            found = [await _pass_on(guest, handle, partial(hear, name), end) for name, handle in handles.items()]
            if done:
                pid = None
                return done
            pause = _SHORT if any(found) else min(pause * 1.5, _PAUSE)
            await anyio.sleep(pause)
        raise guest.late(deadline, words[0], hint="it was ended; wait longer with " + option("timeout", "SECONDS"))
    finally:
        await bounded(_CLOSING, _remove(guest, folder, tuple(handles.values()), pid))


async def _remove(guest: Agent, folder: str, handles: Iterable[int], pid: object) -> None:
    """Remove the files of a command's output; a program that still runs ends as one whose reader has gone."""
    with contextlib.suppress(QmpsnapError):
        await guest.synchronise(deadline=_CLOSING)  # past an answer that nobody waits for any more
        for handle in handles:
            await guest.execute("guest-file-close", {"handle": handle}, deadline=_CLOSING)
        words = ["sh", folder, *([str(pid)] if type(pid) is int else [])]
        await guest.run(["/bin/sh", "-c", _ENDED, *words], deadline=_CLOSING)


async def _pass_on(guest: Agent, handle: int, hear: Callable[[bytes], object], end: float) -> bool:
    """Pass on what was added to a file, up to its end; whether that was anything."""
    found = False
    while True:
        said = await guest.execute("guest-file-read", {"handle": handle, "count": CHUNK}, deadline=_left(end))
        part, over = _read(guest, said)
        if part:
            hear(part)
            found = True
        if over or not part:
            return found


@asynccontextmanager
async def _opened(guest: Agent, path: str, mode: str, end: float) -> AsyncIterator[int]:
    handle = await _open(guest, path, mode, end)
    try:
        yield handle
    except QmpError:  # an answer that came leaves the conversation in order
        await bounded(_CLOSING, guest.execute("guest-file-close", {"handle": handle}, deadline=_CLOSING))
        raise
    await guest.execute("guest-file-close", {"handle": handle}, deadline=_left(end))


async def _open(guest: Agent, path: str, mode: str, end: float) -> int:
    handle = await guest.execute("guest-file-open", {"path": path, "mode": mode}, deadline=_left(end))
    if type(handle) is not int:
        raise guest.nonsense("guest-file-open")
    return handle


def _read(guest: Agent, said: object) -> tuple[bytes, bool]:
    if not isinstance(said, dict):
        raise guest.nonsense("guest-file-read")
    try:
        return base64.b64decode(said["buf-b64"], validate=True), bool(said["eof"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise guest.nonsense("guest-file-read") from error


async def _part(content: Path | bytes, start: int) -> bytes:
    if isinstance(content, bytes):
        return content[start : start + CHUNK]
    return await to_read(_part_of, content, start)


def _part_of(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(CHUNK)


def _append(path: Path, part: bytes) -> None:
    with path.open("ab") as file:
        file.write(part)


def _left(end: float) -> float:
    return max(0.1, end - anyio.current_time())
