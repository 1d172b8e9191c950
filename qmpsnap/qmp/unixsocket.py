"""Connecting to a unix socket without waiting, however long its path.

By what Python's ``socket`` is made of: all of that takes longer to load than the answer of a reading verb.
"""

from __future__ import annotations

import _socket
import contextlib
import os

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from qmpsnap.host.files import Name

SOCKET_PATH_LIMIT = 107
"""Bytes a unix socket's path may have."""


def connect(path: Name) -> _socket.socket:
    """A connected, non-blocking unix socket; ``BlockingIOError``: the listener's backlog is full.

    A path too long for a socket is reached through its folder's descriptor.
    """
    place, name = os.path.split(os.fspath(path))
    folder = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    endpoint = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    fits = len(os.fsencode(path)) <= SOCKET_PATH_LIMIT
    try:
        endpoint.setblocking(False)
        endpoint.connect(str(path) if fits else f"/proc/self/fd/{folder}/{name}")
    except BaseException:
        endpoint.close()
        raise
    finally:
        os.close(folder)
    return endpoint


def listens(path: Name) -> bool:
    """Whether somebody answers there."""
    with contextlib.suppress(OSError):
        connect(path).close()
        return True
    return False
