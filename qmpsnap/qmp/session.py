"""A session with QEMU's monitor: deadlines on everything, foreign errors translated once.

The only importer of ``qemu.qmp``. A monitor serves one client: a second one connects and hears nothing, exactly like
a QEMU that is stopped, so connecting, the greeting and every command have a deadline of their own.
"""

import asyncio
import contextlib
import logging
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import anyio
from qemu.qmp import ConnectError, ExecuteError, QMPClient
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message
from qemu.qmp.qmp_client import GreetingError

from qmpsnap.errors import DeadlinePassed, QemuGone, QmpError
from qmpsnap.hint import call
from qmpsnap.host.threads import completed
from qmpsnap.qmp.dial import dial

CONNECT_DEADLINE = 5.0
"""Seconds for connecting, greeting and capabilities together."""

COMMAND_DEADLINE = 30.0
"""Seconds a command may take: a snapshot waits for the guest's requests in flight."""

_GREETINGS = 5
"""Times we take something else for what an earlier client left behind."""

_FLUSH = 2.0
"""Seconds that QEMU has to take the rest of what was said to it, as we let go."""

_LONGEST = 1 << 20
"""Lines that one message of a monitor with ``pretty=on`` may have."""

# qemu.qmp reports replies that come after we stopped waiting; we have said so ourselves by then.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

Tap = Callable[[str, str, str], None]
"""Is told of each message to (``-->``) and from (``<--``) a monitor: the machine, that arrow, and the message."""
TAPS: list[Tap] = []
"""Those who listen to all sessions of this process."""


class Bell(Protocol):
    """Rings when one of the events came that it listens to; what really happened, a query tells."""

    times: list[tuple[str, float]]
    """Name and time of every event that was waited for: QEMU's own clock, seconds since the epoch."""

    async def wait(self, seconds: float) -> None:
        """Return at the next event, or after ``seconds``."""


class Monitor(Protocol):
    """What the layers above need of a monitor; a scripted one stands in for QEMU where an order cannot be had."""

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float = COMMAND_DEADLINE
    ) -> Any:
        """Run one QMP command and return what it returned.

        Raises:
            QmpError: QEMU refused it; it had no effect.
            DeadlinePassed: no answer within ``deadline`` seconds; effect unknown.
            QemuGone: the monitor closed first; effect unknown.
        """

    async def send_descriptor(self, descriptor: int) -> None:
        """Send an open file along with the next command, ``getfd`` or ``add-fd``; ours stays open."""

    def listen(self, *events: str) -> AbstractAsyncContextManager[Bell]:
        """Listen to these events for the length of the block."""


class Session:
    """One client on one monitor socket, from :func:`connect`."""

    def __init__(self, client: QMPClient, machine: str, peer: int) -> None:
        self._client = client
        self._machine = machine
        self.peer = peer
        """Pid of the process that listens on the socket, as the kernel tells it."""

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float = COMMAND_DEADLINE
    ) -> Any:
        """Run one QMP command; see :meth:`Monitor.execute`."""
        if command == "query-version" and (greeting := self._client.greeting):
            return greeting.QMP.version  # the same as is answered
        try:
            with anyio.fail_after(deadline):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise DeadlinePassed(
                f"QEMU of machine {self._machine} did not answer {command} within {deadline:g} s;"
                " whether it took effect is unknown",
                hint=call("state", self._machine)
                + " shows the state once QEMU answers again; if it never does, "
                + call("stop", self._machine, force=True),
                effect="unknown",
                machine=self._machine,
            ) from error
        except ExecuteError as error:
            raise QmpError(
                f"QEMU refused {command}: {error}",
                machine=self._machine,
                qmp_class=error.error_class,
            ) from error
        except Exception as error:  # see `connect`
            raise QemuGone(
                f"the monitor of machine {self._machine} closed during {command}",
                hint=call("state", self._machine) + " shows the state",
                effect="unknown",
                machine=self._machine,
            ) from error

    async def send_descriptor(self, descriptor: int) -> None:
        """Send an open file along with the next command; see :meth:`Monitor.send_descriptor`."""
        try:
            self._client.send_fd_scm(descriptor)
        except Exception as error:  # see `connect`
            raise QemuGone(f"the monitor of machine {self._machine} closed", machine=self._machine) from error

    @asynccontextmanager
    async def listen(self, *events: str) -> AsyncIterator[Bell]:
        """Listen to these events; see :meth:`Monitor.listen`."""
        with self._client.listener(events) as listener:
            yield _EventBell(listener)


class _EventBell:
    def __init__(self, listener: EventListener) -> None:
        self._listener = listener
        self.times: list[tuple[str, float]] = []

    async def wait(self, seconds: float) -> None:
        events = []
        # A listener never hears of QEMU's end: the caller's next query does.
        with anyio.move_on_after(seconds):
            events.append(await self._listener.get())
        for event in (*events, *self._listener.clear()):
            self.times.append((str(event.get("event")), _seconds(event)))


@asynccontextmanager
async def connect(path: Path, *, machine: str, deadline: float = CONNECT_DEADLINE) -> AsyncIterator[Session]:
    """A session on the monitor socket at ``path``, closed with the block; ``machine`` is its name, for errors.

    ``DeadlinePassed``: somebody listens and says nothing: QEMU is stopped, or another client has the monitor.
    """
    try:
        with anyio.fail_after(deadline):
            client, endpoint, peer = await _greeted(path, machine)
    except TimeoutError as error:
        raise DeadlinePassed(
            f"the monitor of machine {machine} sent no greeting within {deadline:g} s",
            hint=call("check", machine)
            + " names a command at work; else another client is connected to the monitor, or QEMU hangs: "
            + call("stop", machine, force=True),
            machine=machine,
        ) from error
    # qemu.qmp has no type for all that a peer can make it stumble over: it asserts that nobody hangs up right after the
    # greeting, and what ends its reader comes out as it is (a line too long, bytes that are no text, JSON too deep).
    except Exception as error:
        raise QemuGone(
            f"the monitor of machine {machine} does not answer",
            hint=call("start", machine),
            machine=machine,
        ) from error
    try:
        yield Session(client, machine, peer)
    finally:
        await completed(_close(client, endpoint))


class _Client(QMPClient):
    """Messages are only written out for the log if somebody reads that: those of long chains are long.

    A monitor with ``pretty=on`` writes each in lines, of which the last is its closing brace alone.
    """

    async def _do_recv(self) -> Message:
        said = await self._readline()
        if said.rstrip() == b"{":
            lines = [said]
            while lines[-1].rstrip() != b"}" and lines[-1].endswith(b"\n"):
                lines.append(await self._readline())
                if len(lines) > _LONGEST:
                    raise ValueError("a message without an end")
            said = b"".join(lines)
        return Message(said, eager=True)

    def _cb_outbound(self, msg: Message) -> Message:
        self._transcribe("-->", msg)
        return super()._cb_outbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        self._transcribe("<--", msg)
        return super()._cb_inbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _transcribe(self, arrow: str, msg: Message) -> None:
        for tap in TAPS:
            tap(self.name or "", arrow, bytes(msg).decode(errors="replace").strip())


async def _greeted(path: Path, machine: str) -> tuple[QMPClient, socket.socket, int]:
    for attempt in range(_GREETINGS):
        client = _Client(machine)
        client.events.event_filter = _no_event
        endpoint = await dial(path)
        peer = _peer(endpoint)
        try:
            await _negotiate(client, endpoint)
        except ConnectError as error:
            # QEMU may still hold an event for the client before us and send it first: that is no greeting, so again.
            # Anything else that is no greeting comes from no QEMU.
            greeting = error.exc
            if not isinstance(greeting, GreetingError) or not isinstance(greeting.exc, KeyError):
                raise
            if attempt == _GREETINGS - 1:
                raise
            await anyio.sleep(0.01)
        else:
            return client, endpoint, peer
    raise AssertionError("unreachable: the last attempt returns or raises")


async def _negotiate(client: QMPClient, endpoint: socket.socket) -> None:
    """Greet, in a task of its own: qemu.qmp cleans up when it is cancelled once, and a scope cancels until it is left.

    Cancelled while it cleans up it would leave a future that nobody asks, which asyncio prints a traceback for. And it
    may have greeted just when we are cancelled: then nobody else knows that its tasks are there.
    """
    greeting = asyncio.create_task(client.connect(endpoint))
    try:
        await asyncio.wait((greeting,))
        greeting.result()
    except BaseException:
        greeting.cancel()
        await completed(_close(client, endpoint, greeting))
        raise


async def _close(client: QMPClient, endpoint: socket.socket, greeting: "asyncio.Task[None] | None" = None) -> None:
    """Let go of the monitor, whatever its reader has died of: no task, socket or unasked exception is left."""
    ending = asyncio.create_task(_disconnect(client, greeting))
    _, late = await asyncio.wait((ending,), timeout=_FLUSH)
    if late:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            endpoint.shutdown(socket.SHUT_RDWR)  # who does not take what was written: that ends every wait for it
        await asyncio.wait((ending,), timeout=_FLUSH)
    endpoint.close()


async def _disconnect(client: QMPClient, greeting: "asyncio.Task[None] | None") -> None:
    if greeting:
        await asyncio.wait((greeting,))
        _ = greeting.cancelled() or greeting.exception()  # asked
    with contextlib.suppress(Exception):  # the reason was raised to the task that waited for an answer
        await client.disconnect()


def _peer(endpoint: socket.socket) -> int:
    pid, _, _ = struct.unpack("3i", endpoint.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def _seconds(event: Message) -> float:
    stamp = event.get("timestamp")
    if not isinstance(stamp, dict):
        return math.nan
    try:
        return float(stamp.get("seconds", math.nan)) + float(stamp.get("microseconds", 0)) / 1e6
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _no_event(_: Message) -> bool:
    # qemu.qmp's own listener would keep every event for ever: let it accept none.
    return False
