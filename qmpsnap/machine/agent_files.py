"""Files of the guest through its agent: ``guest-file-open``, ``-read``, ``-write``, ``-flush``, ``-close``."""

import base64
import binascii
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio

from qmpsnap.errors import QmpError
from qmpsnap.host.threads import bounded, to_end, to_read
from qmpsnap.machine.agent import Agent

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


@asynccontextmanager
async def _opened(guest: Agent, path: str, mode: str, end: float) -> AsyncIterator[int]:
    handle = await guest.execute("guest-file-open", {"path": path, "mode": mode}, deadline=_left(end))
    if type(handle) is not int:
        raise guest.nonsense("guest-file-open")
    try:
        yield handle
    except QmpError:  # an answer that came leaves the conversation in order
        await bounded(_CLOSING, guest.execute("guest-file-close", {"handle": handle}, deadline=_CLOSING))
        raise
    await guest.execute("guest-file-close", {"handle": handle}, deadline=_left(end))


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
