"""The guard as the process it is: it thaws when it is asked to, when its starter has died, and when time is up.

The agent at the other end is a scripted one, and most of what it says is wrong.
"""

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.machine import guard

LONG = 30.0
"""Seconds no test waits for."""

Pair = tuple[socket.socket, socket.socket]


@contextmanager
def guarding(window: float) -> Iterator[Pair]:
    """A guard that watches: our end of it, and the agent's end of the connection that it was given."""
    ours, theirs = socket.socketpair()
    channel, guests = socket.socketpair()
    with ours, theirs, channel, guests:
        channel.setblocking(False)
        for end in (ours, guests):
            end.settimeout(LONG)
        fds = [theirs.fileno(), channel.fileno()]
        argv = [sys.executable, "-I", "-S", guard.__file__, "thaw", *map(str, fds), str(window)]
        subprocess.run(argv, pass_fds=fds, check=True, timeout=LONG, start_new_session=True)
        theirs.close()
        channel.close()
        assert ours.recv(1) == b"r"
        yield ours, guests


def asked(guests: socket.socket) -> dict[str, Any]:
    """The next request that the agent gets."""
    line = b""
    while not line.endswith(b"\n"):
        part = guests.recv(1)
        assert part, "the guard has gone"
        line += part
    found: dict[str, Any] = json.loads(line.lstrip(b"\xff"))
    return found


def asked_to_thaw(guests: socket.socket) -> int:
    """The random number before the request for a thaw."""
    sync = asked(guests)
    assert sync["execute"] == "guest-sync-delimited"
    assert asked(guests) == {"execute": "guest-fsfreeze-thaw"}
    return int(sync["arguments"]["id"])


def answer(guests: socket.socket, number: int, said: bytes) -> None:
    guests.sendall(b'\xff{"return": %d}\n%s\n' % (number, said))


def ended(guests: socket.socket) -> None:
    """The guard has closed the connection: it is gone, or going."""
    assert guests.recv(1) == b""


def test_it_thaws_when_it_is_asked_and_says_how_many() -> None:
    with guarding(LONG) as (ours, guests):
        ours.send(b"f")
        ours.send(b"t")
        answer(guests, asked_to_thaw(guests), b'{"return": 3}')
        assert ours.recv(16) == b"t3\n"
        ended(guests)


def test_it_thaws_when_its_starter_has_died() -> None:
    with guarding(LONG) as (ours, guests):
        ours.send(b"f")
        ours.close()
        answer(guests, asked_to_thaw(guests), b'{"return": 1}')
        ended(guests)


def test_it_thaws_when_the_window_is_over() -> None:
    with guarding(0.2) as (ours, guests):
        before = time.monotonic()
        ours.send(b"f")
        number = asked_to_thaw(guests)
        assert time.monotonic() - before >= 0.2
        answer(guests, number, b'{"return": 1}')
        assert ours.recv(16) == b"t1\n"


def test_a_guest_that_was_never_frozen_is_left_alone() -> None:
    with guarding(0.01) as (ours, guests):
        ours.close()
        ended(guests)


def test_an_agent_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "AGAIN", 0.05)
    channel, guests = socket.socketpair()
    with ThreadPoolExecutor() as pool, channel, guests:
        channel.setblocking(False)
        guests.settimeout(LONG)
        thawing = pool.submit(guard.thaw, channel)
        first, second = asked_to_thaw(guests), asked_to_thaw(guests)
        assert first != second
        answer(guests, first, b'{"error": {"class": "GenericError"}}')
        answer(guests, second, b'{"return": 2}')
        assert thawing.result(LONG) == 2


@pytest.mark.parametrize("closed", ["the channel", "nothing"])
def test_it_does_not_outlive_its_purpose(monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    monkeypatch.setattr(guard, "THAW_LIMIT", LONG if closed == "the channel" else 0.1)
    channel, guests = socket.socketpair()
    with channel, guests:
        channel.setblocking(False)
        if closed == "the channel":
            guests.close()
        assert guard.thaw(channel) is None


def test_it_leaves_the_connection_non_blocking() -> None:
    with guarding(LONG) as (ours, guests):
        guests.setblocking(False)
        ours.send(b"f")
        ours.send(b"t")
        select.select([guests], [], [], LONG)
        guests.settimeout(LONG)
        answer(guests, asked_to_thaw(guests), b'{"return": 0}')
        assert ours.recv(16) == b"t0\n"


@pytest.mark.parametrize(
    ("said", "count"),
    [
        (b'\xff{"return": 7}\n{"return": 2}\n', 2),
        (b'{"return": 9}\n\xff\xff{"return": 7}\n{"return": 0}\n', 0),
        (b'\xff{"return": 8}\n{"return": 2}\n', None),
        (b'\xff{"return": 7}\n{"return": 2}', None),
        (b'\xff{"return": 7}\n{"return": -1}\n', None),
        (b'\xff{"return": 7}\n{"return": true}\n', None),
        (b'\xff{"return": 7}\n{"return": "2"}\n', None),
        (b'\xff{"return": 7}\n{"return": [2]}\n', None),
        (b'\xff{"return": 7}\n{"return": %s}\n' % (b"9" * 5000), None),
        (b'\xff{"return": 7}\n%s\n' % (b"[" * 100_000), None),
        (b'\xff{"return": 7}\n{"error": {}}\n\xff{"return": 7}\n{"return": 1}\n', 1),
        (b'\xff{"return": true}\n{"return": 2}\n', None),
    ],
)
def test_only_a_number_after_our_own_number_is_an_answer(said: bytes, count: int | None) -> None:
    assert guard.Ear().hear(said, {7}) == count


@given(st.lists(st.sampled_from([b"\xff", b"\n", b'{"return": 7}', b'{"return": 2}', b"{", b"garbage", b"\0"])))
def test_no_bytes_make_it_stumble_and_it_does_not_matter_how_they_come(parts: list[bytes]) -> None:
    count = guard.Ear().hear(b"".join(parts), {7})
    assert count in (None, 2, 7)
    ear = guard.Ear()
    assert next((found for part in parts if (found := ear.hear(part, {7})) is not None), None) == count


def test_bytes_without_end_are_neither_kept_nor_gone_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    real = json.loads

    def counting(line: bytes) -> Any:
        parsed.append(len(line))
        return real(line)

    monkeypatch.setattr(json, "loads", counting)
    channel, guests = socket.socketpair()
    with ThreadPoolExecutor() as pool, channel, guests:
        channel.setblocking(False)
        guests.settimeout(LONG)
        thawing = pool.submit(guard.thaw, channel)
        number = asked_to_thaw(guests)
        parsed.clear()  # the request was read by this test
        said = b"\xff" * (1 << 16) + b"\n"
        guests.sendall(said)
        answer(guests, number, b'{"return": 2}')
        assert thawing.result(LONG) == 2
    assert (len(parsed), sum(parsed) < 2 * len(said)) == (3, True)


def test_a_line_that_is_too_long_is_no_answer_and_not_kept() -> None:
    ear = guard.Ear()
    ear.hear(b'\xff{"return": 7}\n{"return": 2}', {7})
    for _ in range(3):
        ear.hear(b" " * guard.LINE_LIMIT, {7})
        assert len(ear.line) <= guard.LINE_LIMIT + 1
    assert ear.hear(b"\n", {7}) is None
    assert ear.hear(b'%s\xff{"return": 7}\n{"return": 3}\n' % (b"x" * guard.LINE_LIMIT), {7}) == 3


def test_it_loads_nothing_of_ours_and_nothing_large() -> None:
    program = (
        "import sys; sys.argv = ['-']; import runpy; runpy.run_path(sys.stdin.readline().strip()); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        input=f"{guard.__file__}\n",
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert not {"qmpsnap", "asyncio", "anyio", "subprocess", "ssl"} & loaded
