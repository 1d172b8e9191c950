"""A command's work is done by a process of its own, so that the command can always end.

A thread that waits for storage that hangs cannot always be ended, nor the process that it is in, not even by kill -9.
So the process that was started works in a child, and only watches it: it ends when the child has ended or says that it
has, when the child's first thread hangs, or at a second Ctrl-C or SIGTERM. The child ends with it, as soon as the
kernel lets it; until then it keeps its locks, so that nobody works beside a request that may still be carried out.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final, NoReturn

from qmpsnap.cli import output
from qmpsnap.cli.start import SAME, interrupting, postponed
from qmpsnap.errors import Interrupted, QmpsnapError, StorageHangs
from qmpsnap.host import storage_wait
from qmpsnap.host.outstanding import briefly, helpers, storage_hangs

_LOOK: Final = 1.0
"""Seconds between two looks at the child's first thread."""
_BY_KERNEL: Final = 0x80
"""SI_KERNEL, the ``si_code`` of what a terminal sends; all of its foreground group get that."""
_ENDING: Final = 0.4
"""Seconds in which a child that nothing holds up has ended: then the journal has its last word."""
_READING: Final = 0.5
"""Seconds for the store, which may be what hangs."""


class _Session:
    """What is known of this command; there is one in a process."""

    def __init__(self) -> None:
        self.wanted = False
        self.machine: str | None = None
        self.form: output.Format = "table"
        self.answer = -1
        """In the child: the descriptor to which it writes its exit code."""
        self.word = -1
        """The descriptor of a pipe with one byte, which both processes have: who reads it reports how this ends."""
        self.left = False
        """In the child: the command has ended, and it goes on by itself."""


_session = _Session()


def want() -> None:
    """Let :func:`split` do so: called by the console script alone, which is a process of its own."""
    _session.wanted = True


def about(machine: str | None, form: "output.Format") -> None:
    """Record what the command works on, for messages that its child can no longer print."""
    _session.machine, _session.form = machine, form


def split() -> None:
    """Go on in a child, once; this process does not come back from here."""
    if not _session.wanted:
        return
    _session.wanted = False
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    told, answer = os.pipe()
    watched, life = os.pipe()
    _session.word, given = os.pipe()
    os.write(given, b"1")
    os.close(given)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*interrupting(), signal.SIGCHLD))
    try:
        child = os.fork()
    except OSError:  # no more processes: then without
        child = -1
    if child > 0:
        os.close(answer)
        os.close(watched)
        _Parent(child, told, life).supervise()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio replaces no other
    for number in interrupting()[1:]:
        signal.signal(number, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    if child == 0:
        signal.signal(signal.SIGINT, _Once(signal.default_int_handler))
        _session.answer = answer
        with contextlib.suppress(RuntimeError):  # no more threads: then it is only killed
            # It inherits what is blocked, so that every signal is the first thread's, which can let it wait.
            threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(told)
    os.close(life)


def may_report() -> bool:
    """Whether this process reports how the command ends, and no other has or will; asked once."""
    return _session.word < 0 or bool(os.read(_session.word, 1))


def leave() -> None:
    """In the child: let the command end with exit code 0, and go on without it and without its terminal."""
    if _session.answer < 0:  # there could be no child
        return
    _session.left = True
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os.setsid()
    _let_go_of_streams()
    _tell_parent(0)


def end(code: int) -> None:
    """In the child: end with that exit code, whatever its threads wait for."""
    if _session.left:
        _end_after_helpers(code)
    if _session.answer < 0:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _let_go_of_streams()
    _tell_parent(code)
    _end_after_helpers(code)


def _tell_parent(code: int) -> None:
    os.write(_session.answer, bytes([code & 0xFF]))
    os.kill(os.getppid(), signal.SIGCHLD)  # else it would hear of our end only when the last thread has ended


class _Once:
    """The child's handler of SIGINT: what a second one means is its parent's to say."""

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self._handler = handler
        self.heard = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.heard and not postponed(frame):
            self.heard = True
            self._handler(number, frame)


def by_asyncio() -> None:
    """In the child, before asyncio: let asyncio replace the handler of SIGINT, which it does with Python's own alone.

    asyncio's cancels the first task. An exception from amid its loop would cancel the monitor's tasks as well, and
    nobody could end the job that QEMU is at; and one from amid what asyncio and anyio load and set up before would be
    lost, or leave a loop without its end. So signals wait until :func:`once`.
    """
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, _Once) and not handler.heard:
        signal.pthread_sigmask(signal.SIG_BLOCK, interrupting())
        signal.signal(signal.SIGINT, signal.default_int_handler)


def once() -> None:
    """In the child, inside of asyncio: let the handler that this has set hear of one SIGINT only."""
    handler = signal.getsignal(signal.SIGINT)
    if _session.answer >= 0 and callable(handler):
        signal.signal(signal.SIGINT, _Once(handler))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupting())


def _end_with(life: int) -> None:
    """The child's thread that ends it as soon as its parent has ended, or asks for it, unless it has left that."""
    os.read(life, 1)
    if _session.left:
        return
    _let_go_of_streams()
    _end_after_helpers(128 + signal.SIGINT)


def _end_after_helpers(code: int) -> NoReturn:
    """End, once no program that was started for a change can change anything more; the lock is kept as long."""
    while helpers():
        time.sleep(_LOOK)
    os._exit(code & 0xFF)


def _let_go_of_streams() -> None:
    """Close what others may wait for the end of: a child that cannot end yet has it open otherwise."""
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)


class _Parent:
    def __init__(self, child: int, told: int, life: int) -> None:
        self._child, self._told, self._life = child, told, life
        self._watch = storage_wait.Watch(child, child)
        self._interrupted = 0.0
        os.set_blocking(told, False)

    def supervise(self) -> NoReturn:
        """Wait for the end of the child, and end as it did."""
        while True:
            self._end_as_child()
            heard = signal.sigtimedwait((*interrupting(), signal.SIGCHLD), _LOOK)
            if heard and heard.si_signo != signal.SIGCHLD:
                self._interrupt(heard)
            elif not heard and (wait := self._watch.hangs(storage_wait.deadline())):
                self._give_up(wait)

    def _end_as_child(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if code := os.read(self._told, 1):
                os._exit(code[0])
        pid, status = os.waitpid(self._child, os.WNOHANG)
        if pid and os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL, signal.SIGSTOP) else None
            os.kill(os.getpid(), number)
            os._exit(128 + number)
        if pid and os.WIFEXITED(status):
            os._exit(os.waitstatus_to_exitcode(status))

    def _interrupt(self, heard: signal.struct_siginfo) -> None:
        now = time.monotonic()
        if not self._interrupted:
            self._interrupted = now
            if heard.si_signo != signal.SIGINT or heard.si_code != _BY_KERNEL:
                os.kill(self._child, signal.SIGINT)
        # A terminal that goes away may say so twice, and so may the shell in it: that is no second wish.
        elif heard.si_signo != signal.SIGHUP and now - self._interrupted > SAME:
            self._end_at_once(Interrupted("interrupted twice and ended at once"))

    def _has_ended(self) -> bool:
        """Whether the child ends soon, so that nothing it has recorded is recorded later; it has closed its streams."""
        end = time.monotonic() + _ENDING
        while time.monotonic() < end:
            if os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
            time.sleep(SAME / 10)
        return False

    def _end_reported(self, code: int) -> NoReturn:
        end = time.monotonic() + _ENDING
        while time.monotonic() < end:
            self._end_as_child()
            time.sleep(SAME / 10)
        os._exit(code)

    def _give_up(self, wait: storage_wait.Wait) -> None:
        self._end_at_once(storage_hangs(wait, storage_wait.deadline(), effect="unknown"))

    def _end_at_once(self, error: QmpsnapError) -> NoReturn:
        """End without the child, and say what it leaves open; one that is just reporting its own end is let do so."""
        if not may_report():
            self._end_reported(error.exit_code)
        wait = storage_wait.waits_of(self._child)
        os.close(self._life)
        ended = self._has_ended()
        from qmpsnap.cli.interrupted import Left, left_open

        machine = _session.machine
        error.machine, error.effect = machine, "unknown"
        if machine:
            unknown = Left("whether an operation is open is unknown")
            left = briefly(lambda: left_open(machine, self._child), unknown, seconds=_READING)
            error.add(left.said)
            error.operation = left.operation
            if left.effect and ended:
                error.effect = left.effect
            else:
                error.hint = f"qmpsnap recover {machine} completes or undoes it"
        if wait and not isinstance(error, StorageHangs):
            error.add(f"process {self._child} keeps the lock until {wait} is answered")
        output.report(error, _session.form)
        os._exit(error.exit_code)
