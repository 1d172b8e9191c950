"""Connecting to QEMU's unix sockets, however long the path."""

import socket
from pathlib import Path

import anyio

from qmpsnap.qmp import unixsocket


async def dial(path: Path) -> socket.socket:
    """A connected, non-blocking unix socket, or ``OSError``; waits for ever while the listener's backlog is full."""
    while True:
        try:
            return socket.socket(fileno=unixsocket.connect(path).detach())
        except BlockingIOError:  # QEMU's backlog is full: somebody else is waiting there, too
            await anyio.sleep(0.05)
