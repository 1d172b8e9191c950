"""The QEMU guest agent: commands in the guest, with a deadline on each; what it answers is data, never trusted.

Commands: ``guest-sync-delimited``, ``guest-ping``, ``guest-set-time``, ``guest-get-time``, ``guest-exec``,
``guest-exec-status``, ``guest-fsfreeze-freeze``, ``guest-fsfreeze-status``, ``guest-fsfreeze-thaw``, ``guest-fstrim``
(QGA's own schema).
"""

import base64
import binascii
import json
import socket
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
from anyio.abc import SocketAttribute, UNIXSocketStream
from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, QemuGone, QmpError, UsageError
from qmpsnap.hint import call, option
from qmpsnap.qmp import parked
from qmpsnap.qmp.dial import dial

REPLY_LIMIT = 64 << 20
"""Bytes a reply may have; the agent keeps :data:`CAPTURED` of each stream, base64 makes it a third more."""

CAPTURED = 16 << 20
"""Bytes of a command's stdout, and of its stderr, that the agent keeps (QGA's ``GUEST_EXEC_MAX_OUTPUT``)."""


STDIN_LIMIT = 32 << 20
"""Bytes of standard input that a command can be given: the agent's parser takes 64 MiB of JSON at once."""

KEEP = 1.0
"""Seconds that a connection is kept for the next command of this process.

The agent looks for a new one every 100 ms only; a command alone takes less.
"""
_AT_ONCE = 0.5
"""Seconds in which an agent that runs has answered on a host that is not busy; then QEMU is asked for its port."""
_PORT = 0.1
"""Seconds between two looks at a port that is closed."""

_EXITS = range(1 << 32)
"""Exit statuses: Windows has 32 bits of them."""
_QUOTED = 500
"""Characters of the guest's own words in an error."""


MOUNTS_LIMIT = 100_000
"""File systems that may be frozen: the number of mounts that Linux allows."""


Said = TypeVar("Said", str, bytes)


class Completed(Struct, Generic[Said], frozen=True, kw_only=True):
    """A command that ended in the guest, with its output as text or as bytes.

    Attributes:
        exit_status: its exit status, or 128 + the signal that killed it.
        truncated: which of ``stdout`` and ``stderr`` it has said more on than the agent keeps (:data:`CAPTURED`).
    """

    exit_status: int
    stdout: Said
    stderr: Said
    truncated: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """The former name of ``exit_status``, for one release."""
        warnings.warn("Completed.status is now exit_status", DeprecationWarning, stacklevel=2)
        return self.exit_status

    def require_whole(self, machine: str) -> None:
        """Make sure that all the command said is here."""
        if self.truncated:
            raise QmpError(
                f"the command ended with exit status {self.exit_status} in the guest of {machine}, but its"
                f" {' and '.join(self.truncated)} is truncated: the guest agent keeps {CAPTURED >> 20} MiB of each",
                hint="write the output to a file in the guest, or accept the rest with " + option("allow_truncated"),
                effect="applied",
                machine=machine,
            )


class Port(Struct, frozen=True):
    """The guest's end of the channel, as QEMU knows it.

    Attributes:
        listens: whether something in the guest has it open; None where QEMU cannot be asked now.
        wait: seconds that may pass until something has.
    """

    listens: Callable[[], Awaitable[bool | None]]
    wait: float


class Trimmed(Struct, frozen=True, kw_only=True):
    """A file system of the guest after a trim: the bytes it gave back to its disk, or why it could not (``error``)."""

    path: str
    trimmed: int | None = None
    error: str | None = None


class Agent:
    """One conversation with the agent, from :func:`connect`."""

    def __init__(self, stream: UNIXSocketStream, machine: str) -> None:
        self._stream = stream
        self._machine = machine
        self._buffer = bytearray()

    @property
    def channel(self) -> socket.socket:
        """The connection itself, for the guard, which continues the conversation."""
        return self._stream.extra(SocketAttribute.raw_socket)  # noqa: S610 - not Django's

    async def close(self) -> None:
        """Leave the channel to others."""
        await self._stream.aclose()

    async def synchronise(self, *, deadline: float) -> None:
        """Wait until the agent answers with our random number, past whatever an earlier client left in the channel."""
        import secrets

        number = secrets.randbits(62)
        request = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}}).encode()
        with self._bounded(deadline, "guest-sync"):
            await self._stream.send(b"\xff" + request + b"\n")
            while True:
                await self._read_until(b"\xff")
                answer = _decode(await self._read_until(b"\n"))
                if answer.get("return") == number:
                    return

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, *, deadline: float = 10) -> Any:
        """Run one agent command and return what it returned."""
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        with self._bounded(deadline, command):
            await self._stream.send(json.dumps(request).encode() + b"\n")
            answer = _decode(await self._read_until(b"\n"))
        if "return" not in answer and "error" not in answer:
            raise self.nonsense(command)
        if "error" in answer:
            error = answer["error"] if isinstance(answer["error"], dict) else {}
            raise QmpError(
                f"the guest agent refused {command}: {str(error.get('desc', 'no reason given'))[:_QUOTED]}",
                machine=self._machine,
                qmp_class=str(error.get("class", "GenericError"))[:_QUOTED],
            )
        return answer["return"]

    async def set_time(self, nanoseconds: int, *, deadline: float = 10) -> None:
        """Set the guest's clock (``guest-set-time``) to nanoseconds since the epoch, UTC."""
        await self.execute("guest-set-time", {"time": nanoseconds}, deadline=deadline)

    async def get_time(self, *, deadline: float = 10) -> int:
        """The guest's clock (``guest-get-time``) in nanoseconds since the epoch, UTC."""
        said = await self.execute("guest-get-time", deadline=deadline)
        if type(said) is not int or not 0 <= said < 1 << 63:
            raise self.nonsense("guest-get-time")
        return said

    async def freeze(self, *, deadline: float) -> int:
        """Freeze the guest's file systems (``guest-fsfreeze-freeze``); returns how many there were."""
        return self._count("guest-fsfreeze-freeze", await self.execute("guest-fsfreeze-freeze", deadline=deadline))

    async def thaw(self, *, deadline: float) -> int:
        """Thaw the guest's file systems (``guest-fsfreeze-thaw``); returns how many were frozen."""
        return self._count("guest-fsfreeze-thaw", await self.execute("guest-fsfreeze-thaw", deadline=deadline))

    async def freeze_status(self, *, deadline: float = 10) -> str:
        """``thawed`` or ``frozen``: what the agent remembers to have done last (``guest-fsfreeze-status``)."""
        status = await self.execute("guest-fsfreeze-status", deadline=deadline)
        if status not in ("thawed", "frozen"):
            raise self.nonsense("guest-fsfreeze-status")
        return str(status)

    async def fstrim(self, *, minimum: int = 0, deadline: float = 60) -> tuple[Trimmed, ...]:
        """Let the guest give its disks back what its file systems do not use (``guest-fstrim``)."""
        found = await self.execute("guest-fstrim", {"minimum": minimum}, deadline=deadline)
        paths = found.get("paths") if isinstance(found, dict) else None
        if not isinstance(paths, list):
            raise self.nonsense("guest-fstrim")
        return tuple(self._trimmed(one) for one in paths)

    def _trimmed(self, said: Any) -> Trimmed:
        if isinstance(said, dict) and isinstance(path := said.get("path"), str):
            if isinstance(error := said.get("error"), str):
                return Trimmed(path=path, error=error)
            if type(trimmed := said.get("trimmed")) is int and 0 <= trimmed < 1 << 63:
                return Trimmed(path=path, trimmed=trimmed)
        raise self.nonsense("guest-fstrim")

    def _count(self, command: str, said: Any) -> int:
        if type(said) is not int or not 0 <= said <= MOUNTS_LIMIT:
            raise self.nonsense(command)
        return said

    def nonsense(self, command: str) -> QmpError:
        """What is raised for an answer that makes no sense."""
        return QmpError(
            f"the guest agent of {self._machine} gave an invalid answer to {command}; whether it took effect is"
            " unknown",
            effect="unknown",
            machine=self._machine,
        )

    async def run(self, command: Sequence[str], *, deadline: float, stdin: bytes = b"") -> Completed[bytes]:
        """Run a program in the guest and wait for its end; no shell unless the command names one.

        The program is not ended by the ``deadline``, which is in seconds for the whole.
        """
        end = anyio.current_time() + deadline
        pid = await self.begin(command, stdin=stdin, deadline=deadline)
        pause = 0.005
        while (left := end - anyio.current_time()) > 0:
            if done := await self.ended(pid, deadline=left):
                return done
            await anyio.sleep(pause)
            pause = min(pause * 1.5, 0.25)
        hint = "it keeps running in the guest; wait longer with " + option("timeout", "SECONDS")
        raise self.late(deadline, command[0], hint=hint)

    async def begin(self, command: Sequence[str], *, stdin: bytes = b"", deadline: float) -> object:
        """Start a program in the guest (``guest-exec``); returns its id there."""
        if len(stdin) > STDIN_LIMIT:
            raise UsageError(
                f"standard input has {len(stdin)} bytes, but a guest command is given at most {STDIN_LIMIT}",
                hint="copy it to a file in the guest first",
                machine=self._machine,
            )
        arguments: dict[str, Any] = {"path": command[0], "arg": list(command[1:]), "capture-output": True}
        if stdin:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        started = await self.execute("guest-exec", arguments, deadline=deadline)
        return started.get("pid") if isinstance(started, dict) else None

    async def ended(self, pid: object, *, deadline: float) -> Completed[bytes] | None:
        """What a program said, once it has ended (``guest-exec-status``); None while it runs, or nobody answers."""
        try:
            status = await self.execute("guest-exec-status", {"pid": pid}, deadline=deadline)
        except DeadlinePassed:  # of one look, which is no deadline that anybody has set
            return None
        return self._completed(status) if isinstance(status, dict) and status.get("exited") else None

    def _completed(self, status: dict[str, Any]) -> Completed[bytes]:
        try:
            code = int(status["exitcode"]) if "exitcode" in status else 128 + int(status.get("signal", 0))
            return Completed(
                exit_status=_EXITS.index(code),  # itself, or ValueError
                stdout=base64.b64decode(status.get("out-data", ""), validate=True),
                stderr=base64.b64decode(status.get("err-data", ""), validate=True),
                truncated=tuple(
                    name for name, key in (("stdout", "out"), ("stderr", "err")) if status.get(f"{key}-truncated")
                ),
            )
        except (TypeError, ValueError, OverflowError, binascii.Error) as error:
            raise QmpError(
                f"the guest agent of {self._machine} gave an invalid answer", machine=self._machine
            ) from error

    async def _read_until(self, mark: bytes) -> bytes:
        searched = 0
        while (end := self._buffer.find(mark, searched)) < 0:
            if len(self._buffer) > REPLY_LIMIT:
                raise QmpError(f"the guest agent of {self._machine} gave an endless answer", machine=self._machine)
            searched = len(self._buffer)
            self._buffer += await self._stream.receive()
        found = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return found

    @contextmanager
    def _bounded(self, seconds: float, what: str) -> Iterator[None]:
        try:
            with anyio.fail_after(seconds):
                yield
        except TimeoutError as error:
            raise self.late(seconds, what) from error
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            raise QemuGone(
                f"the agent's channel of machine {self._machine} closed during {what}",
                hint=call("state", self._machine) + " shows the state",
                effect="unknown",
                machine=self._machine,
            ) from error

    def deaf(self, waited: float) -> DeadlinePassed:
        """What is raised when nothing in the guest has the agent's port open."""
        return DeadlinePassed(
            f"no guest agent runs in machine {self._machine}: the guest did not open its port within {waited:.3g} s",
            hint="start qemu-guest-agent in the guest; while it boots, wait longer with " + option("wait", "SECONDS"),
            machine=self._machine,
        )

    def late(self, deadline: float, what: str, *, hint: str = "") -> DeadlinePassed:
        """What is raised when the agent has not done something within ``deadline`` seconds."""
        return DeadlinePassed(
            f"the guest agent of machine {self._machine} did not finish {what} within {deadline:g} s",
            hint=hint or "check that qemu-guest-agent runs in the guest",
            effect="unknown",
            machine=self._machine,
        )


@asynccontextmanager
async def connect(
    path: Path, *, machine: str, deadline: float = 10, port: Port | None = None, keep: float = 0
) -> AsyncIterator[Agent]:
    """A conversation with the agent behind the socket at ``path``, synchronised, closed with the block.

    QEMU's agent channel has one client at a time; the agent must have answered after ``deadline`` seconds. Where a
    ``port`` is given that nothing in the guest opens, it is not waited for longer than that says. After a block that
    has ended well the next conversation of this process finds the connection open for ``keep`` seconds.
    """
    begun = anyio.current_time()
    async with AsyncExitStack() as stack:

        async def synchronised(endpoint: socket.socket) -> Agent:
            agent = Agent(await stack.enter_async_context(await UNIXSocketStream.from_socket(endpoint)), machine)
            if port is None or not await _answers_at_once(agent, port, begun=begun, deadline=deadline):
                await agent.synchronise(deadline=max(_PORT, begun + deadline - anyio.current_time()))
            return agent

        kept = parked.taken(path)
        try:
            agent = await synchronised(kept or await _dialled(path, machine=machine, deadline=deadline))
        except QemuGone:
            if not kept:
                raise
            agent = await synchronised(await _dialled(path, machine=machine, deadline=deadline))  # it had ended
        yield agent
        if keep:
            parked.keep(path, agent.channel.dup(), keep)


async def _dialled(path: Path, *, machine: str, deadline: float) -> socket.socket:
    try:
        with anyio.fail_after(deadline):
            return await dial(path)
    except TimeoutError as error:
        raise DeadlinePassed(
            f"the agent's channel of machine {machine} was not free within {deadline:g} s",
            hint="end the other clients of the guest agent",
            machine=machine,
        ) from error
    except OSError as error:
        raise QemuGone(
            f"machine {machine} has no agent channel or is not running",
            hint="the spec needs 'agent: true'; " + call("state", machine) + " shows the state",
            machine=machine,
        ) from error


async def _answers_at_once(agent: Agent, port: Port, *, begun: float, deadline: float) -> bool:
    """Whether the agent is synchronised; if not, its port is open now, or nobody can tell."""
    try:
        await agent.synchronise(deadline=min(_AT_ONCE, deadline))
    except DeadlinePassed:
        wait = min(port.wait, deadline)
        while await port.listens() is False:
            if anyio.current_time() - begun > wait:
                raise agent.deaf(wait) from None
            await anyio.sleep(_PORT)
        return False
    return True


def _decode(line: bytes) -> dict[str, Any]:
    """The JSON object in a line, or an empty one: a line the agent was cut off in is not an answer."""
    try:
        # What was cut off may have a delimiter of its own before the one that counts: no text has that byte.
        answer = json.loads(line.rpartition(b"\xff")[2])
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}
