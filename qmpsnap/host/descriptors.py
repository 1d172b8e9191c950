"""Descriptors 0 to 2 are never free: a file opened as one of them would be taken for our input or get our messages."""

import os
import sys

_FILES = 3


def fill() -> None:
    """Put ``/dev/null`` on each of descriptors 0 to 2 that is closed, for us and for whatever we start."""
    for descriptor in range(_FILES):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # as the lowest free one, which is this


def open_streams() -> None:
    """Give Python its standard streams back, which are None where it found their descriptors closed."""
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor, for as long as we live
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
