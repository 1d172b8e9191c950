"""Questions to files that may hang, asked by another process: a thread could not end, nor could its process."""

from __future__ import annotations

import os
import select
import time

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 1.0
"""Seconds that all files of a home together may take to be looked at by what needs no image."""


def asked(work: Callable[[int], object], *, seconds: float) -> bytes:
    """What ``work`` has written to the descriptor that it is given, within that time; nobody waits for more.

    It runs in a copy of this process, which has no other thread and must not use the store.
    """
    told, tell = os.pipe()
    try:
        helper = os.fork()
    except OSError:  # no more processes: then nothing is asked
        os.close(told)
        os.close(tell)
        return b""
    if not helper:
        _answer(work, tell)
    os.close(tell)
    end, said, piece = time.monotonic() + seconds, b"", b"more"
    with open(told, "rb", buffering=0) as stream:  # noqa: PTH123 - a descriptor
        while piece and select.select([stream], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = stream.read(1 << 16)
            said += piece
    if piece:  # it has not ended, nor may ever
        import signal

        os.kill(helper, signal.SIGKILL)
    os.waitpid(helper, os.WNOHANG if piece else 0)
    return said


def _answer(work: Callable[[int], object], tell: int) -> None:
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # which others may wait for the end of
            os.dup2(nothing, stream)
        work(tell)
    finally:
        os._exit(0)
