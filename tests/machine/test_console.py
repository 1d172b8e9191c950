"""The serial console: bytes go both ways, Ctrl-] lets go, and the terminal is afterwards what it was before."""

import os
import pty
import select
import socket
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qmpsnap.machine.console import DETACH, attach

BOUND = 20.0
"""Seconds after which a wait has failed."""


class Console:
    """``attach`` at work in a thread, between a guest (a socket) and a terminal (descriptors)."""

    def __init__(self, guest: socket.socket, keyboard: int, screen: int, thread: threading.Thread) -> None:
        self.guest = guest
        self.keyboard = keyboard
        self._screen = screen
        self._thread = thread
        self.failed: list[BaseException] = []

    def type(self, data: bytes) -> None:
        os.write(self.keyboard, data)

    def hears(self, count: int) -> bytes:
        """The next bytes that the guest gets."""
        heard = b""
        while len(heard) < count and (more := self.guest.recv(count - len(heard))):
            heard += more
        return heard

    def shows(self, count: int) -> bytes:
        """The next bytes on the screen."""
        shown = b""
        while len(shown) < count:
            assert select.select([self._screen], [], [], BOUND)[0], f"only {shown!r} was shown"
            shown += os.read(self._screen, count - len(shown))
        return shown

    def has_ended(self) -> bool:
        self._thread.join(BOUND)
        return not self._thread.is_alive() and not self.failed


@contextmanager
def attached(terminal_in: int, terminal_out: int, *, keyboard: int, screen: int) -> Iterator[Console]:
    ours, guest = socket.socketpair()
    guest.settimeout(BOUND)

    def run() -> None:
        try:
            attach(ours, terminal_in=terminal_in, terminal_out=terminal_out)
        except BaseException as error:  # noqa: BLE001 - told by has_ended
            console.failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    console = Console(guest, keyboard, screen, thread)
    with ours, guest:
        thread.start()
        try:
            yield console
        finally:
            guest.close()
            thread.join(BOUND)


@pytest.fixture
def piped() -> Iterator[Console]:
    """Input and output are pipes."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    with attached(in_read, out_write, keyboard=in_write, screen=out_read) as console:
        yield console
    for descriptor in (in_read, in_write, out_read, out_write):
        try:
            os.close(descriptor)
        except OSError:
            continue  # closed by the test


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal: the side that people sit at, and the side that programs have."""
    human, program = pty.openpty()
    yield human, program
    os.close(human)
    os.close(program)


# --- pipes ----------------------------------------------------------------------------------------------------------


def test_bytes_go_both_ways_as_they_are(piped: Console) -> None:
    piped.guest.sendall(b"login: \xff\0\r\n")
    assert piped.shows(11) == b"login: \xff\0\r\n"
    piped.type(b"root\n\x03\x04\xff")
    assert piped.hears(8) == b"root\n\x03\x04\xff"


def test_much_at_once_is_shown_whole(piped: Console) -> None:
    data = os.urandom(1 << 20)
    sender = threading.Thread(target=piped.guest.sendall, args=(data,), daemon=True)
    sender.start()
    assert piped.shows(len(data)) == data
    sender.join(BOUND)


def test_what_is_typed_before_ctrl_bracket_is_sent_and_what_comes_after_is_not(piped: Console) -> None:
    piped.type(b"halt" + DETACH + b"more")
    assert piped.has_ended()
    assert piped.hears(4) == b"halt"
    piped.guest.setblocking(False)
    with pytest.raises(BlockingIOError):
        piped.guest.recv(1)


def test_the_end_of_the_guest_is_the_end(piped: Console) -> None:
    piped.guest.sendall(b"bye")
    piped.guest.close()
    assert piped.shows(3) == b"bye"
    assert piped.has_ended()


def test_a_guest_that_ends_with_input_unread_is_the_end_too(piped: Console) -> None:
    piped.type(b"unread")
    assert piped.guest.recv(6, socket.MSG_PEEK | socket.MSG_WAITALL) == b"unread"
    piped.guest.close()  # resets the connection
    assert piped.has_ended()


def test_after_the_end_of_the_input_the_guest_is_still_listened_to(piped: Console) -> None:
    piped.type(b"poweroff\n")
    os.close(piped.keyboard)
    assert piped.hears(9) == b"poweroff\n"
    piped.guest.sendall(b"going down")
    piped.guest.close()
    assert piped.shows(10) == b"going down"
    assert piped.has_ended()


def test_after_the_end_of_the_input_a_silent_guest_is_left(piped: Console) -> None:
    os.close(piped.keyboard)
    assert piped.has_ended()


# --- a terminal -----------------------------------------------------------------------------------------------------


def test_a_terminal_is_raw_while_attached_and_afterwards_as_before(
    terminal: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    human, program = terminal
    before = termios.tcgetattr(program)
    assert before[3] & termios.ICANON
    with attached(program, program, keyboard=human, screen=human) as console:
        console.guest.sendall(b"ready")
        assert console.shows(5) == b"ready"  # whoever shows this has made it raw before
        local = termios.tcgetattr(program)[3]
        assert not local & (termios.ICANON | termios.ECHO | termios.ISIG)
        console.type(b"\x03\x1a")  # Ctrl-C and Ctrl-Z are the guest's
        assert console.hears(2) == b"\x03\x1a"
        console.type(DETACH)
        assert console.has_ended()
    assert termios.tcgetattr(program) == before
    assert capsys.readouterr().err == "attached; Ctrl-] leaves the console\n"


def test_a_terminal_is_as_before_also_when_the_guest_ends(terminal: tuple[int, int]) -> None:
    human, program = terminal
    before = termios.tcgetattr(program)
    with attached(program, program, keyboard=human, screen=human) as console:
        console.guest.sendall(b"x")
        assert console.shows(1) == b"x"
        console.guest.close()
        assert console.has_ended()
    assert termios.tcgetattr(program) == before
