"""A monitor that speaks QMP from a transcript, so that a test reads as what was said and what came back.

The transcript is a list of turns in order: what the client must send, or what the monitor does by itself. A client
that says anything else than expected ends the test with both lines in the message.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpsnap.qmp.session import Bell

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}


@dataclass(frozen=True)
class Expect:
    """The client must say this now; ``arguments`` None means: none given."""

    command: str
    arguments: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reply:
    """Answer the last command, or an earlier one: ``to`` counts back from it."""

    value: Any = field(default_factory=dict)
    to: int = 0


@dataclass(frozen=True)
class Refuse:
    """Answer the last command with QEMU's error."""

    kind: str
    text: str


@dataclass(frozen=True)
class Event:
    """Send an event, of this second."""

    name: str
    at: int = 1


@dataclass(frozen=True)
class Raw:
    """Send these bytes as they are."""

    data: bytes


@dataclass(frozen=True)
class Close:
    """Hang up; what follows is for the next client."""


Turn = Expect | Reply | Refuse | Event | Raw | Close

HELLO: tuple[Turn, ...] = (
    Raw(json.dumps(GREETING).encode() + b"\n"),
    Expect("qmp_capabilities", {}),
    Reply(),
)
"""Greeting and negotiation, as QEMU does them."""


class Deaf:
    """The part of a fake monitor that hears no events, for what must not wait for any."""

    def listen(self, *events: str) -> AbstractAsyncContextManager[Bell]:
        raise AssertionError(f"nobody should listen to {events} here")

    async def send_descriptor(self, descriptor: int) -> None:
        raise AssertionError(f"nobody should send {descriptor} here")


class Scripted:
    """What a scripted monitor has done; its end is awaited, never guessed."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.failure: BaseException | None = None
        self._heard = ""
        self.told = asyncio.Event()
        self.hung_up = asyncio.Event()

    async def play(self, turns: Sequence[Turn], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for turn in turns:
                if isinstance(turn, Close):
                    return
                await self._take(turn, reader, writer)
            self.told.set()
            left = self._heard + (await reader.read()).decode()
            assert not left, f"the client said more than the transcript has: {left}"
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.told.set()
            self.hung_up.set()
            writer.close()

    async def _hear(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        """The client's next message: JSON, with or without a line's end, as QEMU takes it; empty when it hung up."""
        while True:
            try:
                said, end = json.JSONDecoder().raw_decode(self._heard)
            except ValueError:
                if not (more := await reader.read(65536)):
                    return {}
                self._heard += more.decode()
            else:
                self._heard = self._heard[end:].lstrip()
                assert isinstance(said, dict)
                return said

    async def _take(self, turn: Turn, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        match turn:
            case Expect(command, arguments):
                said = await self._hear(reader)
                self.said.append(said)
                assert (said.get("execute"), said.get("arguments")) == (command, arguments)
            case Reply(value, back):
                await _send(writer, {"return": value, "id": self.said[-1 - back].get("id")})
            case Refuse(kind, text):
                await _send(writer, {"error": {"class": kind, "desc": text}, "id": self.said[-1].get("id")})
            case Event(name, second):
                await _send(writer, {"event": name, "timestamp": {"seconds": second, "microseconds": 2}})
            case Raw(data):
                writer.write(data)
                await writer.drain()


async def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    present = {name: value for name, value in message.items() if name != "id" or value is not None}
    writer.write(json.dumps(present).encode() + b"\n")
    await writer.drain()


@asynccontextmanager
async def scripted(path: Path, *turns: Turn) -> AsyncIterator[Scripted]:
    """A monitor at ``path`` that plays the turns, up to each ``Close`` to one client; its failure is the test's."""
    monitor = Scripted()
    tasks: list[asyncio.Task[None]] = []
    left = list(turns)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = next((number for number, turn in enumerate(left, 1) if isinstance(turn, Close)), len(left))
        part, left[:] = left[:end], left[end:]
        tasks.append(asyncio.create_task(monitor.play(part, reader, writer)))

    server = await asyncio.start_unix_server(accept, path)
    try:
        yield monitor
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(monitor.failure, Exception):
        raise monitor.failure
