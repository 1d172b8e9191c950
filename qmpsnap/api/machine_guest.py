"""What a program does in the guest of a machine, through its agent."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from qmpsnap.api.machine_base import MachineBase
from qmpsnap.api.old_names import was
from qmpsnap.errors import StateError
from qmpsnap.host.borders import border
from qmpsnap.host.threads import to_end
from qmpsnap.later import Later
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.ops.base import requests

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from qmpsnap.api import guest_commands
    from qmpsnap.machine import agent, agent_files
    from qmpsnap.machine.agent import Agent, Completed, Trimmed
    from qmpsnap.machine.starting import logs
    from qmpsnap.ops.lifecycle import pausing
else:
    guest_commands, agent_files = Later("api.guest_commands"), Later("machine.agent_files")
    agent, logs, pausing = Later("machine.agent"), Later("machine.starting.logs"), Later("ops.lifecycle.pausing")


@border
class MachineGuest(MachineBase):
    """A machine as the host of a guest that runs commands."""

    @overload
    async def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        encoding: str = "utf-8",
        check: bool = True,
        allow_truncated: bool = False,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        wait: float | None = None,
        output: Callable[[Literal["stdout", "stderr"], bytes], object] | None = None,
    ) -> Completed[str]: ...

    @overload
    async def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        encoding: None,
        check: bool = True,
        allow_truncated: bool = False,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        wait: float | None = None,
        output: Callable[[Literal["stdout", "stderr"], bytes], object] | None = None,
    ) -> Completed[bytes]: ...

    @was(deadline="timeout")
    async def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60,
        encoding: str | None = "utf-8",
        check: bool = True,
        allow_truncated: bool = False,
        stdin: str | bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        wait: float | None = None,
        output: Callable[[Literal["stdout", "stderr"], bytes], object] | None = None,
    ) -> Completed[str] | Completed[bytes]:
        """Run a command in the guest through its agent.

        The connection to the agent stays open for a second, for the next command of this process; other programs wait
        for it.

        Args:
            command: program and arguments, or a line for the guest's ``/bin/sh``.
            timeout: seconds to wait for its end.
            encoding: of its output; None returns bytes. Bytes that do not decode are replaced.
            check: raise when it ends with another status than 0.
            allow_truncated: take what the agent has kept, 16 MiB of stdout and of stderr, where there was more.
            stdin: its standard input, at most 32 MiB; text is sent as UTF-8.
            env: variables that it has besides those of the agent; needs a ``/bin/sh`` in the guest.
            cwd: absolute path of the folder in the guest in which it runs; needs a ``/bin/sh`` in the guest.
            wait: seconds to wait for an agent where nothing in the guest has opened its port (QMP ``query-chardev``,
                ``frontend-open``). By default a second, or until ``timeout`` seconds after QEMU was started.
            output: is called with what it says while it runs: ``"stdout"`` or ``"stderr"``, and bytes. Then there is no
                limit, and the result has none of it. Files in the guest have it meanwhile (``mktemp -d``), so it needs
                a ``/bin/sh`` there. A command that is not waited for any more, as when this raises, gets ``SIGPIPE``.

        Raises:
            ProcessError: with ``check``: it ended with another status than 0.
            StateError: the guest's vCPUs are stopped, or the machine was adopted.
            QmpError: the guest refused, or the command has said more than the agent keeps.
            DeadlinePassed: no agent, or the command takes longer; it goes on in the guest.
            UsageError: there is no such encoding, variable or folder, or ``stdin`` is too long.
        """
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        words = guest_commands.surrounded(words, env=env or {}, cwd=cwd)
        given = stdin.encode() if isinstance(stdin, str) else stdin
        connect = partial(self._agent, wait=wait)
        done = await guest_commands.run(connect, words, timeout=timeout, encoding=encoding, stdin=given, output=output)
        if check and done.exit_status:
            raise guest_commands.failed(command, done, machine=self.name)
        if not allow_truncated:
            done.require_whole(self.name)
        return done

    async def put(
        self,
        source: str | os.PathLike[str] | bytes,
        target: str,
        *,
        timeout: float = 60,
    ) -> int:
        """Write a file of the guest through its agent, over one that is there; one that fails may be there in part.

        Args:
            source: path of a file of this host, or the content itself.
            target: absolute path in the guest.
            timeout: seconds for all of it.

        Returns:
            Bytes that it has.

        Raises:
            StateError: the guest's vCPUs are stopped, or the machine was adopted.
            QmpError: the guest refused.
            DeadlinePassed: no agent, or it takes longer.
            HostCannot: the file cannot be read.
        """
        async with self._agent(timeout) as guest:
            content = source if isinstance(source, bytes) else Path(source)
            return await agent_files.put(guest, content, target, deadline=timeout)

    async def get(
        self,
        source: str,
        target: str | os.PathLike[str],
        *,
        timeout: float = 60,
    ) -> int:
        """Copy a file of the guest to this host through the guest's agent, whole or not at all.

        Args:
            source: absolute path in the guest.
            target: path on this host; a file that is there is replaced once the other is whole.
            timeout: seconds for all of it.

        Returns:
            Bytes that it has.

        Raises:
            StateError: the guest's vCPUs are stopped, or the machine was adopted.
            QmpError: the guest refused: there is no such file.
            DeadlinePassed: no agent, or it takes longer.
            HostCannot: the file cannot be written.
        """
        async with self._agent(timeout) as guest:
            return await guest_commands.fetch(guest, source, Path(target), timeout=timeout)

    @was(deadline="timeout")
    async def fstrim(self, *, minimum: int = 0, timeout: float = 60) -> tuple[Trimmed, ...]:
        """Let the guest give its disks back what its file systems do not use; one entry per file system.

        Args:
            minimum: bytes that a free range must have at least.
            timeout: seconds to wait for all of them.

        Raises:
            StateError: the guest's vCPUs are stopped, or the machine was adopted.
            QmpError: the guest refused.
            DeadlinePassed: no agent, or it takes longer.
        """
        async with self._agent(timeout) as guest:
            return await guest.fstrim(minimum=minimum, deadline=timeout)

    @asynccontextmanager
    async def _agent(self, seconds: float, *, wait: float | None = None) -> AsyncIterator[Agent]:
        requests.require_time(seconds, "the timeout")
        if wait is not None:
            requests.require_time(wait, "the wait")
        machine = await self.record()
        if machine.adopted:
            raise StateError(
                f"machine {self.name} was adopted: there is no channel to its guest agent",
                hint="use the agent channel that it was launched with",
                machine=self.name,
            )
        await pausing.require_awake(self._context, machine)
        socket = self._context.home.run_dir(self.name) / AGENT_SOCKET
        await to_end(logs.bound, self._context.home, self.name)
        process = await to_end(self._context.process, machine)
        if wait is None:
            booting = process.started + seconds - time.time() if process else 0.0
            wait = max(guest_commands.WAIT, booting)
        port = agent.Port(partial(guest_commands.listens, self._context, machine), wait)
        async with agent.connect(socket, machine=self.name, deadline=seconds, port=port, keep=agent.KEEP) as guest:
            yield guest
