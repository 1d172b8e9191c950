"""What a program does with one machine but for its snapshots and layers: start, stop, look, run a command, jobs."""

from __future__ import annotations

import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpsnap.api import forks
from qmpsnap.api.job import Running, job
from qmpsnap.api.later import Later
from qmpsnap.errors import QmpError, QmpsnapError, StateError
from qmpsnap.host.borders import border
from qmpsnap.host.outstanding import briefly
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.ops.base import requests
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.session.session import working
from qmpsnap.ops.snapshot import fold
from qmpsnap.qmp import commands
from qmpsnap.qmp.jobs import unreported

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from qmpsnap.machine import agent
    from qmpsnap.machine.agent import Agent, Completed, Trimmed
    from qmpsnap.machine.starting import logs
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.machines.record import Machine, Process
    from qmpsnap.model.operations.operation import Operation
    from qmpsnap.ops.base import free_space
    from qmpsnap.ops.base.context import Context
    from qmpsnap.ops.check import check as checking
    from qmpsnap.ops.check.check import Checked
    from qmpsnap.ops.lifecycle import dry_run, pausing, power, undefine
    from qmpsnap.ops.lifecycle.dry_run import Forgotten
    from qmpsnap.ops.outside import compare
    from qmpsnap.ops.outside.compare import ChainView
    from qmpsnap.ops.snapshot import nvram
    from qmpsnap.qmp.commands import JobInfo
    from qmpsnap.qmp.jobs import Report
else:
    agent, logs = Later("machine.agent"), Later("machine.starting.logs")
    free_space, nvram = Later("ops.base.free_space"), Later("ops.snapshot.nvram")
    checking, compare = Later("ops.check.check"), Later("ops.outside.compare")
    dry_run, pausing = Later("ops.lifecycle.dry_run"), Later("ops.lifecycle.pausing")
    power, undefine = Later("ops.lifecycle.power"), Later("ops.lifecycle.undefine")


@border
class MachineLife:
    """A machine as it starts, runs and ends; :class:`qmpsnap.MachineHandle` has the verbs that change its layers."""

    def __init__(self, context: Context, name: str, running: Running | None = None) -> None:
        self._context = context
        self._running: Running = set() if running is None else running
        self.name = name

    async def record(self) -> Machine:
        """The machine as the store has it."""
        return await blocking(self._context.store.machine, self.name)

    async def start(self, *, paused: bool = False, allow_extra: bool = False) -> Process:
        """Start QEMU and return once its monitor answers.

        Args:
            paused: leave the vCPUs stopped.
            allow_extra: agree to the ``extra`` arguments that the store has of it now, as after a rebuild.

        Raises:
            StateError: it runs already, or nobody has agreed to its ``extra`` arguments.
            StoreMismatch: an image is not the one the store knows.
            QemuGone: QEMU ended at once.
        """
        return await power.start(self._context, self.name, paused=paused, allow_extra=allow_extra)

    async def stop(self, *, force: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Switch the guest off, waiting up to ``timeout`` seconds (60).

        With ``force`` QEMU is ended then, or at once where no ``timeout`` is given.

        Raises:
            StateError: it does not run, nobody can tell whether it does, or its vCPUs are stopped and ``force`` is not
                given.
            DeadlinePassed: the guest did not switch itself off.
        """
        await power.stop(self._context, self.name, force=force, timeout=timeout)
        await forks.sweep(self._context)

    async def pause(self) -> None:
        """Stop the guest's vCPUs; its QEMU stays, and :meth:`resume` lets it run on.

        Raises:
            StateError: it does not run.
        """
        await pausing.pause(self._context, self.name)

    async def resume(self) -> str:
        """Let a paused guest run on, also one that QEMU has paused because a disk was full or failed.

        Returns:
            The run state then: ``suspended`` for a guest that slept when it was paused.

        Raises:
            StateError: it is not paused.
            HostCannot: the disk is still full, or fails still: it was paused again at once.
        """
        return await pausing.resume(self._context, self.name)

    async def wakeup(self) -> None:
        """Wake a guest that has put itself to sleep (ACPI S3).

        Raises:
            StateError: it does not sleep.
            DeadlinePassed: it still sleeps after some seconds.
        """
        await pausing.wakeup(self._context, self.name)

    async def is_running(self) -> bool:
        """Whether a QEMU that can be seen from here runs for the machine, whatever state its guest is in."""
        return self._context.process(await self.record()) is not None

    async def state(self) -> str:
        """QEMU's word for the run state (``running``, ``paused`` ...), or ``stopped``, or ``unknown``.

        ``unknown``: one may run that cannot be seen from here (another PID namespace, a container, another user's).
        ``paused: no space`` and ``paused: I/O error`` are a guest's that QEMU has paused over a failed request,
        ``suspended`` is one's that sleeps (ACPI S3).
        """
        return await compare.state(self._context, await self.record())

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots, oldest first."""
        return await blocking(self._context.store.snapshots, self.name)

    async def chains(self, disk: str | None = None) -> tuple[ChainView, ...]:
        """The layers of every disk (or one) as the store, QEMU and the files see them."""
        return await compare.chains(self._context, self.name, disk)

    async def shortage(self) -> tuple[str, ...]:
        """A sentence for every file system that may fill up under the guest; QEMU pauses a guest that hits its end."""
        chains = await blocking(self._context.store.chains, self.name)
        return await to_read(
            lambda: briefly(lambda: free_space.shortage(chains), (free_space.UNKNOWN,), seconds=free_space.PATIENCE)
        )

    async def left_out(self) -> tuple[str, ...]:
        """A sentence on what the guest writes to and no snapshot holds: the UEFI variables of an adopted machine."""
        return await nvram.left_out(self._context, await self.record())

    async def run(
        self,
        command: str | Sequence[str],
        *,
        deadline: float = 60,
        check: bool = True,
        allow_truncated: bool = False,
    ) -> Completed:
        """Run a command in the guest through its agent.

        Args:
            command: program and arguments, or a line for the guest's ``/bin/sh``.
            deadline: seconds to wait for its end.
            check: raise when it ends with another status than 0.
            allow_truncated: take what the agent has kept, 16 MiB of stdout and of stderr, where there was more.

        Raises:
            StateError: the guest's vCPUs are stopped, or the machine was adopted.
            QmpError: the guest refused, with ``check`` the command failed, or it has said more than the agent keeps.
            DeadlinePassed: no agent, or the command takes longer.
        """
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        async with self._agent(deadline) as guest:
            done = await guest.run(words, deadline=deadline)
        if check and done.status:
            raise QmpError(
                f"{command!r} ended with status {done.status} in the guest of {self.name}:"
                f" {done.stderr.decode(errors='replace').strip()}",
                effect="applied",
                machine=self.name,
            )
        if not allow_truncated:
            done.require_whole(self.name)
        return done

    async def fstrim(self, *, minimum: int = 0, deadline: float = 60) -> tuple[Trimmed, ...]:
        """Let the guest give its disks back what its file systems do not use; one entry per file system.

        Args:
            minimum: bytes that a free range must have at least.
            deadline: seconds to wait for all of them.

        Raises:
            StateError: the guest's vCPUs are stopped, or the machine was adopted.
            QmpError: the guest refused.
            DeadlinePassed: no agent, or it takes longer.
        """
        async with self._agent(deadline) as guest:
            return await guest.fstrim(minimum=minimum, deadline=deadline)

    @asynccontextmanager
    async def _agent(self, deadline: float) -> AsyncIterator[Agent]:
        requests.require_time(deadline, "the deadline")
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
        async with agent.connect(socket, machine=self.name, deadline=deadline) as guest:
            yield guest

    async def jobs(self) -> tuple[JobInfo, ...]:
        """The jobs that the machine's QEMU has, also of a verb that is at work; none when it is stopped.

        Raises:
            QemuGone, DeadlinePassed: QEMU runs and does not answer.
        """
        async with self._context.monitor(await self.record(), look=True) as qemu:
            return await commands.query_jobs(qemu) if qemu else ()

    @job
    async def wait(self, *, report: Report = unreported) -> list[Operation]:
        """See every job of an interrupted operation to its end; returns those operations as they were.

        Raises:
            LockHeld: another controller works on the machine.
            OperationPending: one cannot be ended now.
            HostCannot: a job is paused, as there is no space.
        """
        pending = await blocking(lambda: self._context.store.operations(self.name, only_open=True))
        async with working(self._context, self.name, "job wait", alone=False, unfinished="carry on", report=report):
            return list(pending)

    async def cancel(self) -> list[Operation]:
        """Cancel every job of an interrupted operation: the chains stay as they are.

        Raises:
            LockHeld: another controller works on the machine: it is for that to cancel.
            OperationPending: one cannot be ended now.
        """
        pending = await blocking(lambda: self._context.store.operations(self.name, only_open=True))
        async with working(self._context, self.name, "job cancel", alone=False, unfinished="cancel"):
            return list(pending)

    async def recover(self) -> list[Operation]:
        """End what an earlier operation left open; returns those operations as they were.

        Raises:
            LockHeld: another controller works on the machine.
            OperationPending: one cannot be ended now; the hint says what helps.
        """
        store = self._context.store
        pending = await blocking(lambda: store.operations(self.name, only_open=True))
        async with working(self._context, self.name, "recover", alone=False) as session:
            await fold.run(session)
            with contextlib.suppress(QmpsnapError):  # what was open has ended all the same, and `check` says so
                await blocking(store.records.keep, self.name)  # an undefine that failed may have removed it
            return list(pending)

    async def check(self, *, deep: bool = False, repair: bool = False) -> Checked:
        """Whether all holds that is promised of the machine; what does not is in ``findings``.

        Args:
            deep: also read every image's tables and every state file.
            repair: put right what can be without losing anything; files are moved to quarantine, none is deleted.

        Raises:
            ForeignHost: it is another host's.
            LockHeld: with ``repair``: another controller works on it.
        """
        return await checking.run(self._context, self.name, deep=deep, mend=repair)

    async def preview_undefine(self, *, disks: undefine.Fate | None = None) -> Forgotten:
        """The files that :meth:`undefine` would keep or remove now; refused as that would be."""
        return await dry_run.forgotten(self._context, self.name, disks=disks)

    async def undefine(self, *, disks: undefine.Fate | None = None, told: undefine.Told | None = None) -> list[str]:
        """Forget the machine and its snapshots; see :func:`qmpsnap.ops.lifecycle.undefine.run`."""
        return await undefine.run(self._context, self.name, disks=disks, told=told)
