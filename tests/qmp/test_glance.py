"""A quick look at monitors: those that answer tell their state, the others cost one short wait together."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from qmpsnap.cli.hints import as_typed
from qmpsnap.qmp import runstate, status_poll

GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'


@pytest.fixture(autouse=True)
def long_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy host holds those up who do answer, and that must not decide a test."""
    monkeypatch.setattr(status_poll, "DEADLINE", 1.0)


@contextmanager
def qemu(path: Path, answers: dict[str, Any]) -> Iterator[Path]:
    """A monitor that greets, says something on its own, and answers what it has an answer to."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            client, _ = listener.accept()
            gone = contextlib.suppress(BrokenPipeError, ConnectionResetError)  # it leaves once it has heard enough
            with gone, client, client.makefile() as lines:
                client.sendall(GREETING + b'{"event": "RESUME", "timestamp": {}}\r\n')
                for line in lines:
                    asked = json.loads(line)
                    if asked["execute"] in answers:
                        answer = {"return": answers[asked["execute"]], "id": asked["id"]}
                        client.sendall(json.dumps(answer).encode() + b"\r\n")

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield path
        thread.join(5)


@pytest.mark.parametrize(
    ("status", "io", "told"),
    [
        ("running", [{"device": ""}], "running"),
        ("paused", [], "paused"),
        ("io-error", [{"device": "", "io-status": "ok"}, {"device": "", "io-status": "nospace"}], "paused: no space"),
        ("io-error", [{"device": "", "io-status": "failed"}], "paused: I/O error"),
    ],
)
def test_what_qemu_says_in_our_words(tmp_path: Path, status: str, io: list[Any], told: str) -> None:
    answers = {"qmp_capabilities": {}, "query-status": {"status": status}, "query-block": io}
    with qemu(tmp_path / "qmp", answers) as path:
        assert status_poll.states({"web": path}) == {"web": told}


def test_who_says_nothing_or_nonsense_holds_nobody_up(tmp_path: Path) -> None:
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / "silent"))
    silent.listen(1)
    odd = {"qmp_capabilities": {}, "query-status": "fine", "query-block": 7}
    half: dict[str, Any] = {"qmp_capabilities": {}}
    well = {"qmp_capabilities": {}, "query-status": {"status": "running"}, "query-block": []}
    with silent, qemu(tmp_path / "a", odd) as a, qemu(tmp_path / "b", half) as b, qemu(tmp_path / "c", well) as c:
        before = time.monotonic()
        sockets = {"silent": tmp_path / "silent", "nobody": tmp_path / "nobody", "odd": a, "half": b, "well": c}
        assert status_poll.states(sockets) == {"well": "running"}
        assert time.monotonic() - before < 20 * status_poll.DEADLINE


def test_only_what_a_guest_cannot_help_has_a_remedy() -> None:
    assert runstate.remedy("paused", "web") == ""
    assert "qmpsnap resume web" in as_typed(runstate.remedy(runstate.NO_SPACE, "web"))
    assert "qmpsnap resume web" in as_typed(runstate.remedy(runstate.FAILED, "web"))
