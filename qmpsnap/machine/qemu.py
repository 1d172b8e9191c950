"""A machine's QEMU: launched so that it outlives us, reached through its monitor, waited for when it ends."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
from msgspec.structs import replace

from qmpsnap.effect import Effect
from qmpsnap.errors import DeadlinePassed, HostCannot, QemuGone, QmpsnapError, StateError
from qmpsnap.hint import call
from qmpsnap.host import storage_wait, write_errors
from qmpsnap.host.threads import completed, to_read
from qmpsnap.machine.starting import alive, privileges
from qmpsnap.machine.starting import logs as logfiles
from qmpsnap.machine.starting import process as processes
from qmpsnap.machine.starting.privileges import PLAIN, Privileges
from qmpsnap.machine.starting.run_files import CONSOLE_LOG, QMP_SOCKET, RUN_FILES
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.qmp import commands, session
from qmpsnap.qmp.session import Monitor, Session

T = TypeVar("T")

LAUNCH_DEADLINE = 20.0
"""Seconds from exec to the monitor's greeting."""
_LOOKS = 20
"""Times, a millisecond apart, that the monitor's socket is looked for before QEMU's process is."""
_KILLS = 5
"""Times that a failed launch is looked through: what is killed may just have started something else."""
QUIT_DEADLINE = 10.0
"""Seconds from ``quit``, or from a kill, to QEMU's end."""


async def launch(
    argv: Sequence[str],
    machine: Machine,
    run_dir: Path,
    *,
    accel: str,
    inherited: Sequence[int] = (),
    rights: Privileges = PLAIN,
    logs: Path | None = None,
) -> Process:
    """Start QEMU and return once its monitor answered and said it is this machine.

    What was started may be a wrapper that does not become QEMU: the process is the one that listens on the monitor.

    Raises:
        QemuGone: QEMU ended at once; the message holds what it wrote.
        HostCannot: the binary cannot be run, or runs where its process cannot be seen.
        DeadlinePassed: it runs but its monitor stays silent; it has been killed.
    """

    async def question() -> tuple[Process, str]:
        # QEMU listens before it has finished its start: on a busy host its greeting takes as long as that.
        async with monitor(machine, run_dir, deadline=LAUNCH_DEADLINE) as qemu:
            process = processes.existing(qemu.peer) if qemu.peer > 0 else None
            if process is None:
                await commands.control(qemu, "quit")
                raise HostCannot(
                    f"{argv[0]} runs QEMU in another PID namespace, as in a container:"
                    f" machine {machine.name} was not started",
                    hint="set QMPSNAP_QEMU to a QEMU of this host, or let the wrapper keep the PID namespace",
                    machine=machine.name,
                )
            return process, await commands.query_version(qemu)

    await end_strays(machine, run_dir)
    first, (process, found) = await start(
        argv, run_dir, machine=machine.name, ask=question, inherited=inherited, rights=rights, logs=logs
    )
    return replace(process, started=first.started, accel=accel, qemu_version=found)


async def start(
    argv: Sequence[str],
    run_dir: Path,
    *,
    machine: str,
    ask: Callable[[], Awaitable[T]],
    inherited: Sequence[int] = (),
    rights: Privileges = PLAIN,
    logs: Path | None = None,
) -> tuple[Process, T]:
    """Start QEMU in ``run_dir`` and put a first question to its monitor, as soon as it listens.

    Returns what was started, QEMU itself or a wrapper of it, and the answer.
    """
    (run_dir / QMP_SOCKET).unlink(missing_ok=True)
    logfiles.unlink_aliases(run_dir / name for name in RUN_FILES)
    privileges.prepare_folder(run_dir, rights.user, RUN_FILES, log=CONSOLE_LOG)
    if logs:
        privileges.prepare_folder(logs, rights.user, [CONSOLE_LOG], log=CONSOLE_LOG)
    process, log = processes.spawn(argv, run_dir, inherited=inherited, rights=rights, logs=logs), logs or run_dir
    try:
        deadline = anyio.current_time() + LAUNCH_DEADLINE
        while True:
            try:
                return process, await ask()
            except QemuGone as error:
                # A wrapper may end before the QEMU that it has started.
                if not alive.is_alive(process) and not processes.launched(process, argv, run_dir):
                    said = processes.log_tail(log)
                    if why := write_errors.found(run_dir):
                        raise HostCannot(
                            f"QEMU cannot write to {run_dir}: {why.what}",
                            hint=why.remedy,
                            machine=machine,
                        ) from error
                    raise QemuGone(
                        f"QEMU did not start machine {machine}: {said or 'no message'}",
                        hint=f"the full output is in {log / logfiles.QEMU_LOG}",
                        machine=machine,
                    ) from error
                if anyio.current_time() > deadline:
                    raise QemuGone(
                        f"{argv[0]} did not open the monitor of machine {machine} within"
                        f" {LAUNCH_DEADLINE:g} s: {processes.log_tail(log) or 'no message'}",
                        hint="a wrapper must pass all its arguments to QEMU and keep its working directory",
                        machine=machine,
                    ) from error
            await _appears(run_dir / QMP_SOCKET)
    except BaseException as error:
        left = await completed(end_launch(process, argv, run_dir))
        if left and isinstance(error, QmpsnapError):
            error.add(f"process {', '.join(str(one.pid) for one in left)} is still running and cannot be ended")
            error.effect = "applied"
        raise


async def _appears(socket: Path) -> None:
    """Return once the socket is there, or after a moment: then it is time to look whether QEMU has ended."""
    for _ in range(_LOOKS):
        await anyio.sleep(0.001)
        if socket.exists():
            return


async def end_launch(first: Process, argv: Sequence[str], run_dir: Path) -> tuple[Process, ...]:
    """Kill all that a launch has started, wrapper and QEMU; returns what still runs."""
    for _ in range(_KILLS):
        if not (found := processes.launched(first, argv, run_dir)):
            break
        for one in found:
            processes.terminate(one)
        for one in found:
            await wait_end(one, deadline=5 / _KILLS)
    return processes.launched(first, argv, run_dir)


async def end_strays(machine: Machine, run_dir: Path) -> None:
    """Kill a QEMU that waits for a starter which has died: it has opened no image yet, and nobody else would end it."""
    for one in await to_read(processes.strays, machine, run_dir):
        processes.terminate(one)
        await wait_end(one, deadline=QUIT_DEADLINE)


@asynccontextmanager
async def monitor(
    machine: Machine, run_dir: Path, *, socket: str = QMP_SOCKET, deadline: float = session.CONNECT_DEADLINE
) -> AsyncIterator[Session]:
    """A session with one of the machine's monitors, after it has said that it is this machine."""
    async with session.connect(run_dir / socket, machine=machine.name, deadline=deadline) as qemu:
        uuid = await commands.query_uuid(qemu)
        if uuid != machine.uuid:
            raise StateError(
                f"the monitor of machine {machine.name} belongs to a QEMU with UUID {uuid}",
                hint="end the program that replaced the socket",
                machine=machine.name,
            )
        yield qemu


async def end(process: Process, qemu: Monitor | None) -> bool:
    """End a QEMU: ``quit`` closes its images cleanly; one that does not answer is killed. False: it still runs."""
    if qemu is not None:
        try:
            await commands.control(qemu, "quit")
        except (QemuGone, DeadlinePassed):
            pass
        else:
            if await wait_end(process, deadline=QUIT_DEADLINE):
                return True
    processes.terminate(process)
    return await wait_end(process, deadline=QUIT_DEADLINE)


async def require_ended(process: Process | None, qemu: Monitor | None, *, machine: str, effect: Effect) -> None:
    """End a QEMU as :func:`end` does, if there is one."""
    if process and not await end(process, qemu):
        raise still_runs(process, machine=machine, effect=effect)


def still_runs(process: Process, *, machine: str, effect: Effect) -> DeadlinePassed:
    """The error for a QEMU that was killed and does not end, with the file that it waits for."""
    wait = storage_wait.waits_of(process.pid)
    return DeadlinePassed(
        f"QEMU of machine {machine} (process {process.pid}) does not end{f': {wait} is not answered' if wait else ''}",
        hint="its storage may hang; once it has ended, " + call("recover", machine),
        effect=effect,
        machine=machine,
    )


async def wait_end(process: Process, *, deadline: float) -> bool:
    """Wait until that very process has ended; False when it still runs after ``deadline`` seconds."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        with anyio.move_on_after(deadline):
            if alive.is_alive(process):
                await anyio.wait_readable(descriptor)
        return not alive.is_alive(process)
    finally:
        os.close(descriptor)


async def unless_ending(process: Process | None) -> Process | None:
    """That process; None when there is none, or it was killed and has ended now: it is waited for, a little.

    While one of its threads is left, its images are locked and may be written to.
    """
    if process is None:
        return None
    if processes.is_ending(process):
        await wait_end(process, deadline=QUIT_DEADLINE)
    return process if alive.is_alive(process) else None
