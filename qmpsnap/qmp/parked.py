"""Connections that stay open for a moment, for whoever needs the same one next."""

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import NamedTuple


class _Parked(NamedTuple):
    loop: asyncio.AbstractEventLoop
    endpoint: socket.socket
    holding: "asyncio.Task[None]"


_parked: dict[Path, _Parked] = {}


def keep(path: Path, endpoint: socket.socket, seconds: float) -> None:
    """Keep the connection to the socket at ``path`` for so many seconds, at most as long as the event loop."""
    let_go(path)
    loop = asyncio.get_running_loop()
    _parked[path] = _Parked(loop, endpoint, loop.create_task(_hold(path, endpoint, seconds)))


def taken(path: Path) -> socket.socket | None:
    """The connection that is kept, for the caller alone from now on."""
    found = _parked.pop(path, None)
    if found is None:
        return None
    if found.loop is asyncio.get_running_loop():
        return found.endpoint
    found.endpoint.close()  # another thread's or a former loop's
    return None


def let_go(path: Path) -> None:
    """Close the connection, if one is kept."""
    if found := _parked.pop(path, None):
        found.endpoint.close()


async def _hold(path: Path, endpoint: socket.socket, seconds: float) -> None:
    with contextlib.suppress(asyncio.CancelledError):  # the loop ends
        await asyncio.sleep(seconds)
    found = _parked.get(path)
    if found and found.endpoint is endpoint:
        let_go(path)
