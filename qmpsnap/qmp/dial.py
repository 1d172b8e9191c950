"""Connecting to QEMU's unix sockets, however long the path."""

import os
import socket
from pathlib import Path

import anyio

SOCKET_PATH_LIMIT = 107
"""Bytes a unix socket's path may have."""


async def dial(path: Path) -> socket.socket:
    """A connected, non-blocking unix socket; waits for ever while the listener's backlog is full.

    A path too long for a socket is reached through its folder's descriptor.

    Raises:
        OSError: there is no such socket, or nobody listens.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    fits = len(os.fsencode(path)) <= SOCKET_PATH_LIMIT
    try:
        endpoint.setblocking(False)
        while True:
            try:
                endpoint.connect(str(path) if fits else f"/proc/self/fd/{folder}/{path.name}")
            except BlockingIOError:  # QEMU's backlog is full: somebody else is waiting there, too
                await anyio.sleep(0.05)
            else:
                return endpoint
    except BaseException:
        endpoint.close()
        raise
    finally:
        os.close(folder)
