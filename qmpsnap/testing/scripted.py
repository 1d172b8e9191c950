"""A monitor that speaks QMP from a transcript, so that a test reads as what was said and what came back.

The transcript is a list of turns in order: what the client must send, or what the monitor does by itself. A client
that says anything else than expected ends the test with both lines in the message.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

from anyio.from_thread import start_blocking_portal

GREETING: dict[str, Any] = {
    "QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}
}
"""What a QEMU 7.2 says first."""


@dataclass(frozen=True)
class Expect:
    """The client must say this now.

    Attributes:
        command: its name.
        arguments: all of them; None or an empty object where there are none, and ``...`` takes any.
    """

    command: str
    arguments: Mapping[str, Any] | EllipsisType | None = None


@dataclass(frozen=True)
class Reply:
    """Answer the last command with a value, or an earlier one: ``to`` counts back from it."""

    value: Any = field(default_factory=dict)
    to: int = 0


@dataclass(frozen=True)
class Refuse:
    """Answer the last command with an error, of QEMU's class ``kind`` (``GenericError``)."""

    kind: str
    text: str


@dataclass(frozen=True)
class Event:
    """Send an event, of the second ``at``."""

    name: str
    data: Mapping[str, Any] | None = None
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


class Scripted:
    """What a scripted monitor has done.

    Attributes:
        said: what clients have sent, messages as they came.
        failure: why the transcript was not followed.
        told: set when the last turn for a client is done.
        hung_up: set when a client is let go.
    """

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.failure: BaseException | None = None
        self._heard = ""
        self._awaited = ""
        self.told = asyncio.Event()
        self.hung_up = asyncio.Event()

    async def play(self, turns: Sequence[Turn], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Play these turns to one client."""
        try:
            for turn in turns:
                if isinstance(turn, Close):
                    return
                await self._take(turn, reader, writer)
            self.told.set()
            said = await self._hear(reader)  # it is not left to wait for an answer that never comes
            _require_nothing(json.dumps(said) if said else self._heard)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.told.set()
            self.hung_up.set()
            writer.close()

    def verify(self) -> None:
        """Make sure that the transcript was followed to its end; :func:`scripted` does it behind its block.

        Raises:
            AssertionError: it was not.
        """
        if isinstance(self.failure, Exception):
            raise self.failure
        if self._awaited:
            raise AssertionError(f"expected {self._awaited}, which the client has not said")

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
                if not isinstance(said, dict):
                    raise AssertionError(f"the client said {said!r}, which is no command")  # noqa: TRY004 - as all that the transcript does not have
                return said

    async def _take(self, turn: Turn, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        match turn:
            case Expect(command, arguments):
                self._awaited = command
                said = await self._hear(reader)
                self._awaited = ""
                self.said.append(said)
                same = arguments is ... or (said.get("arguments") or {}) == (arguments or {})
                if said.get("execute") != command or not same:
                    expected = f"{command} with arguments {arguments!r}"
                    raise AssertionError(f"expected {expected}, but the client {_words(said)}")
            case Reply(value, back):
                await _send(writer, {"return": value, "id": self.said[-1 - back].get("id")})
            case Refuse(kind, text):
                await _send(writer, {"error": {"class": kind, "desc": text}, "id": self.said[-1].get("id")})
            case Event(name, data, second):
                stamp = {"seconds": second, "microseconds": 2}
                await _send(writer, {"event": name, "timestamp": stamp, **({} if data is None else {"data": data})})
            case Raw(data):
                writer.write(data)
                await writer.drain()


def _require_nothing(left: str) -> None:
    if left:
        raise AssertionError(f"the client said more than the transcript has: {left}")


def _words(said: Mapping[str, Any]) -> str:
    return f"said {said.get('execute')} with arguments {said.get('arguments')!r}" if said else "hung up"


async def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    present = {name: value for name, value in message.items() if name != "id" or value is not None}
    writer.write(json.dumps(present).encode() + b"\n")
    await writer.drain()


@asynccontextmanager
async def scripted(path: str | os.PathLike[str], *turns: Turn) -> AsyncIterator[Scripted]:
    """A monitor at ``path`` that plays the turns, up to each ``Close`` to one client.

    The socket's file must not exist yet; it stays.

    Raises:
        AssertionError: a client said something else, or nobody has connected.
    """
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
    except Exception as error:
        if isinstance(monitor.failure, AssertionError):  # of which the client's is a consequence
            raise monitor.failure from error
        raise
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    monitor.verify()
    if turns and not tasks:
        raise AssertionError(f"nobody has connected to {path}")


@contextmanager
def scripted_sync(path: str | os.PathLike[str], *turns: Turn) -> Iterator[Scripted]:
    """The same for a test without asyncio: the monitor plays in a thread of its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(scripted(path, *turns)) as monitor:
        yield monitor
