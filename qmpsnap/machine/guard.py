"""A separate process that resumes or thaws a guest if the command that paused it was killed, is stopped or hangs.

Run as ``python -I -S guard.py``, with nothing but Python's own library, so that it is there in milliseconds. It has one
end of a socket pair whose other end its starter alone has, and says ``r`` on it once it watches.

``recover FD MACHINE FOLDER``: ``d`` says that all is well. The end of the stream without it says that the starter has
died; then this process becomes ``qmpsnap recover MACHINE``, of the package in FOLDER.

``thaw FD AGENT WINDOW``: ``f`` says that the guest's file systems are about to be frozen; ``t`` asks for the thaw; the
end of the stream, and WINDOW seconds after ``f``, do so as well. Thawing is this process's affair alone, on the
connection AGENT that its starter has used so far: the answer is ``tN``, N being the file systems that were thawed.
"""

import os
import sys

if sys.argv[1:2] != ["recover"]:  # which does without, and is there in half the time
    import contextlib
    import json
    import select
    import socket
    import time

THAW_LIMIT = 60.0
"""Seconds after which a guest that does not answer is left to the next command."""
AGAIN = 2.0
"""Seconds after which an agent that has not answered is asked again."""
STREAMS = 3
"""So many descriptors may be no other file's: it would be read as input, or be sent messages."""
LINE_LIMIT = 1 << 16
"""Bytes of a line that may be an answer; a longer one is none."""


def hold(watch: int, machine: str, package: str) -> None:
    """See that a guest runs on whose vCPUs are stopped: recovery knows the rules."""
    if _heard(watch):
        return
    os.close(watch)
    places = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    argv = [sys.executable, "-P", "-m", "qmpsnap", "recover", machine]
    os.execve(argv[0], argv, {**os.environ, "PYTHONPATH": os.pathsep.join(places)})  # noqa: S606 - no shell wanted


def _heard(watch: int) -> bytes:
    try:
        return os.read(watch, 1)
    except ConnectionResetError:  # the starter has died with something unread
        return b""


def freeze(watch: "socket.socket", agent: "socket.socket", window: float) -> None:
    """See that the guest's file systems are thawed."""
    until: float | None = None
    while True:
        left = None if until is None else until - time.monotonic()
        said = watch.recv(1) if wait(watch, select.POLLIN, left) else b"late"
        if said == b"f":
            until = time.monotonic() + window
        elif until is None:
            return  # never frozen
        else:
            break  # asked for, late, or nobody is there any more
    count = thaw(agent)
    with contextlib.suppress(OSError):  # the starter may be stopped with it open, and nobody else gets the channel then
        agent.shutdown(socket.SHUT_RDWR)
    if count is not None:
        with contextlib.suppress(OSError):  # nobody may be there to be told
            watch.send(b"t%d\n" % count)


def thaw(agent: "socket.socket") -> int | None:
    """Ask until the agent has thawed; how many file systems that were, None when it has not said so."""
    end, asked, ear, again = time.monotonic() + THAW_LIMIT, set(), Ear(), 0.0
    while (now := time.monotonic()) < end:
        if now >= again:
            number = int.from_bytes(os.urandom(8), "big") >> 2
            asked.add(number)
            sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
            words = b"\xff%s\n%s\n" % (json.dumps(sync).encode(), b'{"execute": "guest-fsfreeze-thaw"}')
            if not send(agent, words, end):
                return None
            again = now + AGAIN
        if not wait(agent, select.POLLIN, min(again, end) - now):
            continue
        try:
            said = agent.recv(65536)  # so much is gone through before the clock is looked at again
        except BlockingIOError:
            continue
        except OSError:
            return None
        if not said:
            return None  # QEMU has closed the channel
        if (count := ear.hear(said, asked)) is not None:
            return count
    return None


def send(agent: "socket.socket", words: bytes, end: float) -> bool:
    """Send all of it; False when that cannot be done."""
    while words and time.monotonic() < end:
        wait(agent, select.POLLOUT, 1.0)
        try:
            words = words[agent.send(words) :]
        except BlockingIOError:
            continue
        except OSError:
            return False
    return not words


def wait(end: "socket.socket", event: int, seconds: float | None) -> bool:
    """Whether something can be read or sent within that time, for ever with None."""
    poll = select.poll()  # select() knows no descriptor beyond its 1024
    poll.register(end, event)
    return bool(poll.poll(None if seconds is None else max(0.0, seconds * 1000)))


class Ear:
    """What an agent says, as it comes, every byte looked at once: the answer is the line after one of our numbers."""

    def __init__(self) -> None:
        self.line = b""  # from its last delimiter on: what it was cut off in before is no text
        self._ours = False  # the line before was one of our numbers

    def hear(self, said: bytes, asked: set[int]) -> int | None:
        """The thaw's result once it is there; of what follows it nothing is kept."""
        *ends, begun = said.split(b"\n")
        for end in ends:
            self._add(end)
            marked = self.line.startswith(b"\xff")
            found = result(self.line[marked:]) if len(self.line) <= LINE_LIMIT else None
            self.line = b""
            if self._ours and not marked and found is not None and 0 <= found < 1 << 31:
                return found
            self._ours = marked and found in asked
        self._add(begun)
        return None

    def _add(self, part: bytes) -> None:
        _, mark, rest = part.rpartition(b"\xff")
        self.line = (mark + rest if mark else self.line + rest)[: LINE_LIMIT + 1]


def result(line: bytes) -> int | None:
    """The number that a line returns; None for any other line."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = said.get("return") if isinstance(said, dict) else None
    return found if type(found) is int else None


def main(mode: str, watched: str, *rest: str) -> None:
    """Say that it watches, and do so; the starter's own child ends at once, so that nobody has to wait for this one."""
    for descriptor in range(STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if os.fork():
        os._exit(0)
    os.write(int(watched), b"r")
    if mode == "recover":
        hold(int(watched), *rest)
    else:
        watch = socket.socket(fileno=int(watched))
        # Its descriptor is shared with the starter, for whom it must stay non-blocking.
        freeze(watch, socket.socket(fileno=int(rest[0])), float(rest[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
