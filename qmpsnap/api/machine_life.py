"""What a program does with one machine but for its snapshots and layers: start, stop, look, jobs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from qmpsnap.api import forks
from qmpsnap.api.job import job
from qmpsnap.api.machine_guest import MachineGuest
from qmpsnap.errors import QmpsnapError
from qmpsnap.host.borders import border
from qmpsnap.host.outstanding import briefly
from qmpsnap.host.threads import to_read
from qmpsnap.later import Later
from qmpsnap.model.machines.state import State
from qmpsnap.ops.base import requests
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.session.session import working
from qmpsnap.ops.snapshot import fold
from qmpsnap.qmp.jobs import unreported

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from qmpsnap.api import events as looks
    from qmpsnap.api.events import Event
    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.machines.record import Process
    from qmpsnap.model.operations.operation import Operation
    from qmpsnap.ops.base import free_space
    from qmpsnap.ops.base.free_space import Shortage
    from qmpsnap.ops.check import check as checking
    from qmpsnap.ops.check.check import Checked
    from qmpsnap.ops.jobs import at_work
    from qmpsnap.ops.jobs.at_work import MachineJob
    from qmpsnap.ops.lifecycle import pausing, power, undefine
    from qmpsnap.ops.outside import compare
    from qmpsnap.ops.outside.compare import ChainView
    from qmpsnap.ops.snapshot import nvram
    from qmpsnap.qmp.jobs import Report
else:
    looks = Later("api.events")
    free_space, nvram = Later("ops.base.free_space"), Later("ops.snapshot.nvram")
    checking, compare = Later("ops.check.check"), Later("ops.outside.compare")
    at_work = Later("ops.jobs.at_work")
    pausing, power = Later("ops.lifecycle.pausing"), Later("ops.lifecycle.power")
    undefine = Later("ops.lifecycle.undefine")


@border
class MachineLife(MachineGuest):
    """A machine as it starts, runs and ends; :class:`qmpsnap.MachineHandle` has the verbs that change its layers."""

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
        process = await power.start(self._context, self.name, paused=paused, allow_extra=allow_extra)
        self._seen = State.PRELAUNCH if paused else State.RUNNING
        return process

    async def stop(self, *, force: bool = False, timeout: float | None = None) -> None:
        """Switch the guest off: its power button is pressed, and QEMU ends once the guest has shut down.

        Args:
            force: end QEMU once ``timeout`` has passed, or at once where none is given; the guest may lose data.
            timeout: seconds to wait for the guest; None is 60.

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
        self._seen = State.PAUSED

    async def resume(self) -> State:
        """Let a paused guest run on, also one that QEMU has paused because a disk was full or failed.

        Returns:
            The run state then: ``suspended`` for a guest that slept when it was paused.

        Raises:
            StateError: it is not paused.
            HostCannot: the disk is still full, or fails still: it was paused again at once.
        """
        self._seen = State(await pausing.resume(self._context, self.name))
        return self._seen

    async def wakeup(self) -> None:
        """Wake a guest that has put itself to sleep (ACPI S3).

        Raises:
            StateError: it does not sleep.
            DeadlinePassed: it still sleeps after some seconds.
        """
        await pausing.wakeup(self._context, self.name)
        self._seen = State.RUNNING

    async def is_running(self) -> bool:
        """Whether a QEMU that can be seen from here runs for the machine, whatever state its guest is in.

        Raises:
            NotFoundError: the machine was undefined.
        """
        return self._context.process(await self.record()) is not None

    async def state(self) -> State:
        """The run state, also of a machine without QEMU; a :class:`qmpsnap.State` is equal to its text.

        Raises:
            QemuGone, DeadlinePassed: QEMU runs and does not answer.
        """
        self._seen = await compare.state(self._context, await self.record())
        return self._seen

    async def events(self, *, interval: float = 0.25) -> AsyncGenerator[Event, None]:
        """What happens to the machine, until its QEMU ends: its state, its jobs, and file systems that may fill up.

        The first event is the present state; the last is ``stopped``. QEMU is asked every ``interval`` seconds, so
        what comes and goes in between is missed, and other clients of its monitor wait for milliseconds.

        Args:
            interval: seconds between two looks.

        Raises:
            NotFoundError: the machine is gone before the first look.
        """
        requests.require_time(interval, "the interval")
        async with contextlib.aclosing(looks.of(self, interval)) as found:
            async for event in found:
                if isinstance(event, looks.StateChanged):
                    self._seen = event.state
                yield event

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots, oldest first.

        Raises:
            NotFoundError: the machine was undefined.
        """
        return await blocking(self._context.store.snapshots, self.name)

    async def chains(self, disk: str | None = None) -> tuple[ChainView, ...]:
        """The layers of every disk as the store, QEMU and the files see them.

        Args:
            disk: this disk alone.

        Raises:
            NotFoundError: there is no such machine or disk.
            QemuGone, DeadlinePassed: QEMU runs and does not answer.
        """
        return await compare.chains(self._context, self.name, disk)

    async def shortage(self) -> tuple[Shortage, ...]:
        """The file systems that may fill up under the guest; QEMU pauses a guest that hits the end of one.

        Raises:
            NotFoundError: the machine was undefined.
        """
        chains = await blocking(self._context.store.chains, self.name)
        return await to_read(
            lambda: briefly(lambda: free_space.shortage(chains), (free_space.UNKNOWN,), seconds=free_space.PATIENCE)
        )

    async def misfits(self) -> tuple[str, ...]:
        """What a start of the machine would lack on this host, a sentence each: KVM, a CPU model, memory, a port.

        Raises:
            NotFoundError: the machine was undefined.
            HostCannot: QEMU cannot be asked for its CPU models.
        """
        return await power.misfits(self._context, await self.record())

    async def left_out(self) -> tuple[str, ...]:
        """A sentence on what the guest writes to and no snapshot holds: the UEFI variables of an adopted machine.

        Raises:
            NotFoundError: the machine was undefined.
        """
        return await nvram.left_out(self._context, await self.record())

    async def jobs(self) -> tuple[MachineJob, ...]:
        """The jobs that the machine's QEMU has, or the worker of a stopped machine, also of a verb that is at work.

        Bytes are QEMU's estimates, ``rate`` is in bytes per second, ``left`` in seconds (QAPI ``JobInfo``,
        ``BlockJobInfo``).

        Raises:
            QemuGone, DeadlinePassed: QEMU runs and does not answer.
        """
        return await at_work.listed(self._context, await self.record())

    @job
    async def wait(self, *, report: Report = unreported) -> list[Operation]:
        """See every job of an operation to its end.

        While another controller waits for the jobs, its operations are awaited and returned as they have ended. An
        interrupted operation is completed, and returned as it was.

        Raises:
            LockHeld: another controller works on the machine and has no job.
            OperationPending: one cannot be ended now.
            HostCannot: a job is paused, as there is no space.
        """
        pending = await blocking(lambda: self._context.store.operations(self.name, only_open=True))
        ended = await at_work.wait(self._context, await self.record(), pending, report=report)
        if ended is not None:
            return ended
        async with working(self._context, self.name, "job wait", alone=False, unfinished="carry on", report=report):
            return list(pending)

    async def cancel(self) -> list[Operation]:
        """Cancel every job of an operation: the chains stay as they are.

        While another controller waits for the jobs, they are cancelled through the user's monitor
        (``block-job-cancel``), that controller raises ``QmpError``, and the operations are returned as they have ended.
        Of an interrupted operation they are returned as they were.

        Raises:
            LockHeld: another controller works on the machine and has no job.
            StateError: a job has copied all, and takes effect.
            QemuGone: another client has the user's monitor; told within two seconds.
            OperationPending: one cannot be ended now.
        """
        pending = await blocking(lambda: self._context.store.operations(self.name, only_open=True))
        ended = await at_work.cancel(self._context, await self.record(), pending)
        if ended is not None:
            return ended
        async with working(self._context, self.name, "job cancel", alone=False, unfinished="cancel"):
            return list(pending)

    async def set_speed(self, bandwidth: int) -> list[str]:
        """Limit what the jobs of the machine's operations copy, also while another controller waits for them.

        The limit is taken away when a job only has left what the guest's writes would wait for.

        Args:
            bandwidth: bytes per second for each job; 0 is without limit.

        Returns:
            Ids of the jobs (QMP ``block-job-set-speed``).

        Raises:
            NotFoundError: there is no such job.
            StateError: a job has copied all.
            QemuGone: another client has the user's monitor.
            UsageError: ``bandwidth`` is negative or too large.
        """
        return await at_work.set_speed(self._context, await self.record(), requests.limited(bandwidth))

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
        """Compare the machine with all that is promised of it; ``findings`` has each difference.

        Args:
            deep: also read every image's tables and every state file.
            repair: put right what can be without losing anything; files are moved to quarantine, none is deleted.

        Raises:
            ForeignHost: it is another host's.
            LockHeld: with ``repair``: another controller works on it.
        """
        return await checking.run(self._context, self.name, deep=deep, mend=repair)

    async def undefine(self, *, disks: undefine.Fate | None = None, told: undefine.Told | None = None) -> list[str]:
        """Forget the machine and its snapshots.

        Args:
            disks: ``keep`` leaves its images as files, ``remove`` deletes those that qmpsnap made and nobody else
                reads; None refuses when anything would be lost.
            told: called with a sentence for each operation that ``keep`` gave up, because it could not be ended.

        Returns:
            Paths of the images and state files that are left, or were removed.

        Raises:
            StateError: it runs, another process has images open that would go, or something would be lost.
            OperationPending: an earlier operation cannot be ended now, nor given up.
            HostCannot: with effect ``applied``, the machine is forgotten and files of it are left, which are named.
        """
        return await undefine.run(self._context, self.name, disks=disks, told=told)
