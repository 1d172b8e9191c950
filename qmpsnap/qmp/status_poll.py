"""One quick look at the monitors of many machines, without asyncio: one that does not answer at once is left alone.

Nothing depends on the answer, so nothing waits for it: a monitor that is busy or a QEMU that hangs costs the caller
:data:`DEADLINE` once, however many there are.
"""

from __future__ import annotations

import select
import time

from qmpsnap.qmp import runstate, unixsocket

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Mapping, Sequence
    from typing import Any

    from qmpsnap.host.files import Name

DEADLINE = 0.1
"""Seconds for all of them together."""

_LIMIT = 4 << 20
"""Bytes of an answer that are looked at."""

_FIRST = ("qmp_capabilities", "query-status")
_THEN = ("query-block",)
"""Only where the state alone does not say it all."""
_ANSWER, _STATUS = b'"id": "query-status"', b'"status": "'
"""As QEMU writes it: to look for that is quicker than to load what reads JSON, which is for all else."""


def states(sockets: Mapping[str, Name]) -> dict[str, str]:
    """The run state of those machines whose QEMU answers at once, by a machine's name as its monitor is given."""
    poll, talks = select.poll(), {}
    for name, path in sockets.items():
        try:
            endpoint = unixsocket.connect(path)
        except OSError:
            continue
        talks[endpoint.fileno()] = _Talk(name, endpoint)
        poll.register(endpoint, select.POLLIN)
    found: dict[str, str] = {}
    end = time.monotonic() + DEADLINE
    try:
        while any(not talk.over for talk in talks.values()):
            ready = poll.poll(max(0.0, end - time.monotonic()) * 1000)
            for number, _ in ready:
                talks[number].hear()
                if talks[number].over:
                    poll.unregister(number)
            if not ready:
                break
        found = {talk.name: state for talk in talks.values() if (state := talk.state())}
    finally:
        for talk in talks.values():
            talk.endpoint.close()
    return found


class _Talk:
    def __init__(self, name: str, endpoint: socket) -> None:
        self.name = name
        self.endpoint = endpoint
        self.over = False
        self._next = [_FIRST, _THEN]
        self._heard = b""

    def hear(self) -> None:
        """Take in what has come; ask once QEMU has greeted us."""
        try:
            more = self.endpoint.recv(1 << 16)
            self._heard += more
            self.over = not more or len(self._heard) > _LIMIT or bool(self._status()) or self._is_told()
            last = b"" if self._next == [_FIRST, _THEN] else _ANSWER
            if self._next and not self.over and any(last in line for line in self._lines()):
                self._ask(self._next.pop(0))
        except OSError:
            self.over = True

    def _ask(self, commands: Sequence[str]) -> None:
        questions = "".join(f'{{"execute": "{command}", "id": "{command}"}}\n' for command in commands)
        self.endpoint.send(questions.encode())  # far less than any socket's buffer

    def state(self) -> str:
        """The run state, or an empty string when that was not told."""
        if status := self._status():
            return status
        answers = self._answers()
        try:
            io = [drive.get("io-status", "ok") for drive in answers["query-block"]]
            return runstate.worded(str(answers["query-status"]["status"]), io)
        except (KeyError, TypeError, AttributeError):
            return ""

    def _lines(self) -> list[bytes]:
        return self._heard.split(b"\n")[:-1]

    def _status(self) -> str:
        """The run state as the answer has it, where no drive has a say in it; empty where that was not told."""
        for line in self._lines():
            if _ANSWER in line:
                status = line.partition(_STATUS)[2].partition(b'"')[0].decode(errors="replace")
                return "" if status == runstate.IO_ERROR else status
        return ""

    def _is_told(self) -> bool:
        return not self._next and all(word in self._answers() for word in (*_FIRST, *_THEN))

    def _answers(self) -> dict[str, Any]:
        import json

        found = {}
        for line in self._lines():
            try:
                said = json.loads(line)
                found[str(said["id"])] = said["return"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # the greeting, an event, or what no QEMU says
        return found
