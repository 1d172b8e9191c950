"""The serial console: a terminal attached to the guest's first serial port."""

import contextlib
import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

DETACH = b"\x1d"
"""Ctrl-]: leaves the guest as it is."""


def attach(endpoint: socket.socket, *, terminal_in: int, terminal_out: int) -> None:
    """Pass bytes both ways until Ctrl-], the end of input or the end of QEMU; a terminal is made raw for it."""
    endpoint.setblocking(True)
    # A QEMU that ends with input unread resets the connection: an end like any other.
    with _raw(terminal_in), contextlib.suppress(ConnectionError):
        listening = [endpoint.fileno(), terminal_in]
        while True:
            ready, _, _ = select.select(listening, [], [])
            if endpoint.fileno() in ready:
                if not (output := endpoint.recv(65536)):
                    return
                _write_all(terminal_out, output)
            if terminal_in in ready:
                typed = os.read(terminal_in, 4096)
                if not typed:
                    # A file or pipe has ended, not the guest: go on printing what it still says for a moment.
                    _drain(endpoint, terminal_out)
                    return
                before, detach, _ = typed.partition(DETACH)
                endpoint.sendall(before)
                if detach:
                    return


def _drain(endpoint: socket.socket, terminal_out: int, *, quiet_seconds: float = 0.5) -> None:
    endpoint.settimeout(quiet_seconds)
    try:
        while output := endpoint.recv(65536):
            _write_all(terminal_out, output)
    except TimeoutError:
        return


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    with contextlib.suppress(OSError):  # a user without stderr knows how to leave
        print("attached; Ctrl-] leaves the console", file=sys.stderr, flush=True)  # noqa: T201 - to a terminal
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
