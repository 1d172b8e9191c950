"""For tests of programs that talk to QEMU: a monitor that speaks QMP from a transcript, without any QEMU.

::

    async with scripted(path, *HELLO, Expect("query-status"), Reply({"status": "paused"})):
        assert await my_program.is_paused(path)

The test fails if the program says anything else than the transcript has, or does not connect.
"""

from qmpsnap.testing.scripted import (
    GREETING,
    HELLO,
    Close,
    Event,
    Expect,
    Raw,
    Refuse,
    Reply,
    Scripted,
    Turn,
    scripted,
    scripted_sync,
)

__all__ = [
    "GREETING",
    "HELLO",
    "Close",
    "Event",
    "Expect",
    "Raw",
    "Refuse",
    "Reply",
    "Scripted",
    "Turn",
    "scripted",
    "scripted_sync",
]
