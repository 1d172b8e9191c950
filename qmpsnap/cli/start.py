"""The console script: what Ctrl-C, SIGTERM and SIGHUP do until a command's own process has taken over.

While the command line is loaded nothing has begun, and they end the process as they end any other. From then on the
first one is a ``KeyboardInterrupt``, and the report of what it left is not interrupted by a second one: that ends the
process. A shell starts background jobs with SIGINT ignored, and then nothing but SIGKILL could end them: it is heeded
all the same. An ignored SIGHUP or SIGTERM (``nohup``) stays ignored.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    import signal
    from types import FrameType
    from typing import NoReturn
else:
    import _signal as signal  # the same without its enums: Ctrl-C while those are loaded would be a traceback

SAME = 0.1
"""Seconds within which two SIGINTs are one: ``timeout`` sends it to its process and to the group."""

_OF_TYPES = "msgspec/_utils.py"
"""What msgspec's own code calls in Python."""
_AGAIN = 0.001
"""Seconds until a SIGINT that came at the wrong time comes again."""


def run() -> NoReturn:
    """Load the command line and run it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qmpsnap.cli import main

    for number in interrupting():
        signal.signal(number, _first)
    main.run()


def interrupting() -> tuple[signal.Signals, ...]:
    """The signals that interrupt a command: those that nobody has ignored before it began."""
    others = (signal.SIGTERM, signal.SIGHUP)
    return signal.SIGINT, *(number for number in others if signal.getsignal(number) is not signal.SIG_IGN)


def postponed(frame: FrameType | None) -> bool:
    """Whether SIGINT came while a module was being loaded or msgspec looked at a type; then it comes again in a moment.

    msgspec crashes when an exception is raised in the middle of a class statement, as CPython raises it there, and can
    crash where it asks Python for the annotations of the types that it decodes for the first time.
    """
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_code.co_filename.endswith(_OF_TYPES):
            break
        frame = frame.f_back
    if frame:
        signal.signal(signal.SIGALRM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    return frame is not None


def _first(number: int, frame: FrameType | None) -> None:
    if postponed(frame):
        return
    heard = time.monotonic()

    def second(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGHUP and time.monotonic() - heard > SAME:
            try:  # noqa: SIM105 - contextlib would have to be loaded
                os.write(2, b"qmpsnap: interrupted twice and ended at once\n")
            except OSError:
                pass
            os._exit(128 + signal.SIGINT)

    for each in interrupting():
        signal.signal(each, second)
    signal.default_int_handler(number, frame)
