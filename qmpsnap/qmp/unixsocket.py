"""Connecting to a unix socket without waiting, however long its path; without asyncio, for quick callers."""

import os
import socket
from pathlib import Path

SOCKET_PATH_LIMIT = 107
"""Bytes a unix socket's path may have."""


def connect(path: Path) -> socket.socket:
    """A connected, non-blocking unix socket; ``BlockingIOError``: the listener's backlog is full.

    A path too long for a socket is reached through its folder's descriptor.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    fits = len(os.fsencode(path)) <= SOCKET_PATH_LIMIT
    try:
        endpoint.setblocking(False)
        endpoint.connect(str(path) if fits else f"/proc/self/fd/{folder}/{path.name}")
    except BaseException:
        endpoint.close()
        raise
    finally:
        os.close(folder)
    return endpoint
