"""A QEMU without a guest, in which block jobs run on chains that no running machine has open.

It is a QEMU under ``-S`` with nothing but the disk: the same jobs, states and graph as in a running machine, so there
is one code path for both. It has a run folder of its own below the machine's, by which it is found again.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

from msgspec.structs import replace

from qmpsnap.errors import DeadlinePassed, QemuGone, StateError
from qmpsnap.host.threads import completed, to_read
from qmpsnap.machine.open_files import require_opened, require_recorded
from qmpsnap.machine.qemu import end_strays, launch, monitor, unless_ending, wait_end
from qmpsnap.machine.starting import argv
from qmpsnap.machine.starting import process as processes
from qmpsnap.machine.starting.privileges import Privileges, RunAs, make_private
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Session

FOLDER = "worker"
MEMORY = 64 << 20


def find(machine: Machine, run_dir: Path) -> Process | None:
    """The worker that an earlier qmpsnap process left behind, or None."""
    return processes.find(replace(machine, process=None), run_dir / FOLDER)


@asynccontextmanager
async def left_behind(machine: Machine, run_dir: Path) -> AsyncIterator[Session | None]:
    """A session with the worker that was left behind, if it lives; a block that ends well ends it, too."""
    process = await unless_ending(find(machine, run_dir))
    if process is None:
        yield None
        return
    async with monitor(machine, run_dir / FOLDER) as qemu:
        yield qemu
        await _quit(qemu)
    await completed(_end(process))


async def end_leftover(machine: Machine, run_dir: Path) -> None:
    """End the worker that an earlier qmpsnap process left behind, if there is one that nobody waits for."""
    if process := await unless_ending(find(machine, run_dir)):
        try:
            async with monitor(machine, run_dir / FOLDER) as qemu:
                await _quit(qemu)
        except (QemuGone, DeadlinePassed):
            processes.terminate(process)
        await completed(_end(process))
    await completed(end_strays(machine, run_dir / FOLDER))


@asynccontextmanager
async def working_on(
    chain: Chain,
    machine: Machine,
    *,
    qemu: str,
    run_dir: Path,
    secrets: Mapping[str, int] = MappingProxyType({}),
    user: RunAs | None = None,
) -> AsyncIterator[Session]:
    """A worker that has the chain open, its highest layer for writing; ended with the block."""
    folder = run_dir / FOLDER
    make_private(folder, "run folder")
    await to_read(lambda: require_recorded(chain.layers, machine=machine.name))
    disk = machine.require_layers_of(chain.disk)
    spec = MachineSpec(
        name=machine.name,
        machine="q35",
        accel="tcg",
        memory=MEMORY,
        # Not as its owner's QEMU has it open: image locks tell whether that one has been started again.
        disks=(
            replace(
                disk, size=1 << 20, image=None, base=None, bus="virtio", read_only=False, opened=None, address=None
            ),
        ),
        agent=False,
    )
    arguments = argv.build(qemu, spec, [chain], uuid=machine.uuid, accel="tcg", paused=True, secrets=secrets)
    try:
        rights = Privileges.bare(user)
        process = await launch(arguments, machine, folder, accel="tcg", inherited=[*secrets.values()], rights=rights)
    except QemuGone as error:
        if 'Failed to get "' not in error.message:
            raise
        raise StateError(
            f"machine {machine.name} is stopped, but another process has an image of its disk {chain.disk} open",
            hint="end that process" + ("; if it is the machine's own QEMU, adopt it again" * bool(machine.adopted)),
            machine=machine.name,
        ) from error
    try:
        async with monitor(machine, folder) as session:
            await to_read(lambda: require_opened(process, chain.layers, machine=machine.name))
            yield session
            await _quit(session)
    except BaseException:
        processes.terminate(process)  # nobody has told it to quit, and it would write on while we wait
        raise
    finally:
        await completed(_end(process))


async def _quit(session: Session) -> None:
    """Close every image cleanly."""
    try:
        await commands.control(session, "quit")
    except QemuGone:
        return


async def _end(process: Process) -> None:
    if not await wait_end(process, deadline=5):
        processes.terminate(process)
        await wait_end(process, deadline=5)
