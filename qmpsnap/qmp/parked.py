"""Connections that stay open for a moment, for whoever needs the same one next."""

import os
import socket
import threading
from pathlib import Path
from typing import NamedTuple


class _Parked(NamedTuple):
    descriptor: int
    timer: threading.Timer | None


_parked: dict[Path, _Parked] = {}
_lock = threading.Lock()


def keep(path: Path, endpoint: socket.socket, seconds: float | None) -> None:
    """Keep the connection to the socket at ``path`` for so many seconds, whatever its event loop does meanwhile.

    None keeps it until it is taken or let go.
    """
    found = _Parked(endpoint.detach(), None)
    if seconds is not None:
        found = found._replace(timer=threading.Timer(seconds, lambda: _end(path, found)))
    with _lock:
        before, _parked[path] = _parked.get(path), found
    if before:
        _opened(before).close()
    if found.timer:
        found.timer.daemon = True
        found.timer.start()


def taken(path: Path) -> socket.socket | None:
    """The connection that is kept, for the caller alone from now on."""
    with _lock:
        found = _parked.pop(path, None)
    return _opened(found) if found else None


def let_go(path: Path) -> None:
    """Close the connection, if one is kept."""
    if endpoint := taken(path):
        endpoint.close()


def _opened(found: _Parked) -> socket.socket:
    if found.timer:
        found.timer.cancel()
    return socket.socket(fileno=found.descriptor)


def _end(path: Path, found: _Parked) -> None:
    with _lock:
        if _parked.get(path) is not found:
            return
        del _parked[path]
    os.close(found.descriptor)
