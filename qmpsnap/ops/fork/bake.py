"""Making a template: a QEMU without images loads the snapshot's memory into a file, and saves all else beside it."""

import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import DeadlinePassed, HostCannot, QemuGone, QmpError
from qmpsnap.hint import call
from qmpsnap.host import acl
from qmpsnap.host.threads import completed, to_end, to_read
from qmpsnap.machine import qemu, statefile, templates
from qmpsnap.machine.config import firmware as uefi
from qmpsnap.machine.starting import accel, argv, seed
from qmpsnap.machine.starting import process as processes
from qmpsnap.machine.starting.argv import Ram
from qmpsnap.machine.starting.privileges import Privileges, admit
from qmpsnap.machine.templates import Seen, Shelf, Template
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Hardware, Vmstate, version_of
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.base.context import Context, in_thread
from qmpsnap.ops.memory.load import Loading, load
from qmpsnap.qmp import commands, migration
from qmpsnap.qmp.session import Monitor

READ_ONLY_SINCE = (8, 2)
"""The first QEMU that maps a file privately which it has opened for reading alone (``readonly=on,rom=off``)."""
DEADLINE = 300.0
"""Seconds that others may make templates before this one."""
TRIES = 3
"""Times that a template is made which is not there afterwards: somebody prunes or evicts it."""
_FULL = 64 << 10
"""Bytes below which a file system counts as full."""
_POLL = 0.05
"""Seconds between two looks at a folder in which another process makes a template."""


class Source(Struct, frozen=True, kw_only=True):
    """What a template is made from.

    ``hardware`` is that of the QEMU which the forks would be started with now, ``user`` whom that runs as; None for
    this user.
    """

    machine: Machine
    snapshot: Snapshot
    state: Vmstate
    chains: tuple[Chain, ...]
    hardware: Hardware
    user: int | None

    @property
    def key(self) -> str:
        """Of the template."""
        return templates.key_of(self.state.digest, self.hardware, user=self.user)


async def find(context: Context, source: Source) -> bool:
    """Whether there is a template now."""
    return await to_read(shelf_of, context, source) is not None


def shelf_of(context: Context, source: Source) -> Shelf | None:
    """Where the template lies; None where there is none."""
    return next((shelf for shelf in templates.shelves(context.home) if shelf.read(source.key)), None)


@asynccontextmanager
async def template_of(
    context: Context, source: Source, *, baking: Callable[[], Awaitable[object]]
) -> AsyncIterator[Loading]:
    """The template of a snapshot's memory, open; made if there is none, of which ``baking`` is told before.

    Raises:
        HostCannot: there is no room for it, or what was made is not there.
        DeadlinePassed: another process has made templates for too long.
        StoreMismatch: the state file is not what it was.
        QmpError: QEMU cannot load it, or not save what it has loaded.
    """
    made, told, end = 0, False, anyio.current_time() + DEADLINE
    while True:
        async with _opened(context, source) as found:
            if found:
                yield found
                return
        if made == TRIES:
            raise HostCannot(
                f"the template of snapshot {source.snapshot.name} was made {TRIES} times, and is not there",
                hint=call("templates") + " shows those that are",
            )
        if anyio.current_time() > end:
            raise DeadlinePassed(
                f"another process has been making templates for {DEADLINE:g} s", hint="end it, or try again"
            )
        if not told:
            await baking()
            told = True
        shelf = await to_end(lambda: templates.choose(context.home, source.machine.spec.memory))
        try:
            async with in_thread(shelf.locked()):
                if not await find(context, source):
                    made += 1
                    await _bake(context, source, shelf)
        except BlockingIOError:
            await anyio.sleep(_POLL)


@asynccontextmanager
async def _opened(context: Context, source: Source) -> AsyncIterator[Loading | None]:
    for shelf in templates.shelves(context.home):
        async with in_thread(shelf.opened(source.key)) as found:
            if found:
                template, ram, devices = found
                await to_end(shelf.mark_used, template.key)
                read_only = version_of(source.hardware.qemu_version) >= READ_ONLY_SINCE
                yield Loading(source.state, devices, Ram(ram, read_only=read_only))
                return
    yield None


async def _bake(context: Context, source: Source, shelf: Shelf) -> None:
    """Make a template; the lock of its folder is held."""
    await clean(shelf)
    size = source.machine.spec.memory
    await to_end(_make_room, shelf, size)
    identity = str(uuid.uuid4())
    name = templates.part_name(source.key, identity)
    try:
        async with (
            in_thread(statefile.verified(source.state)) as state,
            in_thread(templates.beginning(shelf, name, size)) as (folder, ram, devices),
        ):
            if context.run_as:  # its QEMU works in that folder, and opens the memory anew, by its descriptor
                await to_end(admit, str(shelf.folder), context.run_as.uid, acl.ENTER)
                await to_end(admit, str(folder / templates.RAM), context.run_as.uid, acl.READ | acl.WRITE)
            with _telling_no_space(shelf):
                await _in_qemu(
                    context, source, identity, folder, Loading(source.state, state), ram=ram, devices=devices
                )
            nothing = Seen(0, 0, 0, 0, 0)
            about = Template(
                key=source.key,
                source=f"{source.machine.name}@{source.snapshot.name}",
                state=source.state.digest,
                digest="",
                boot="",
                created=time.time(),
                ram=nothing,
                devices=nothing,
            )
            await to_end(templates.publish, shelf, folder, ram, devices, about)
    except BaseException:
        await completed(to_end(shelf.remove, name))
        raise


@contextmanager
def _telling_no_space(shelf: Shelf) -> Iterator[None]:
    """QEMU dies of SIGBUS where it cannot write the memory that it has mapped, and cannot say why."""
    try:
        yield
    except QemuGone as error:
        if templates.free(shelf.folder) >= _FULL:
            raise
        raise HostCannot(
            f"{shelf.folder} has become full: QEMU cannot write a template there",
            hint="free some space there, or name another folder in QMPSNAP_TEMPLATES",
        ) from error


def _make_room(shelf: Shelf, size: int) -> None:
    # Forks of other homes may use the same folder.
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208
    templates.make_room(shelf, size, templates.limit(shelf, os.environ), templates.mapped(pids, [shelf.folder]))


async def clean(shelf: Shelf) -> None:
    """Remove what cannot be used: templates that nobody finishes any more, those of an earlier boot, changed ones.

    The QEMUs that made them are ended; the folder's lock is held.
    """
    for part in await to_read(shelf.unfinished):
        machine = Machine(name="", uuid=templates.uuid_of(part), host="", spec=MachineSpec(name=""), created=0)
        await qemu.end_strays(machine, part)
        await to_end(shelf.remove, part.name)
    for name in await to_read(shelf.names):
        if await to_read(shelf.read, name) is None:
            await to_end(shelf.remove, name)


async def _in_qemu(
    context: Context, source: Source, identity: str, folder: Path, loading: Loading, *, ram: int, devices: int
) -> None:
    spec = replace(source.machine.spec, nics=tuple(replace(nic, forwards=()) for nic in source.machine.spec.nics))
    stand_in = replace(source.machine, uuid=identity, spec=spec, process=None)
    choice = await accel.choose(spec.accel, qemu=context.qemu, cache=context.home.cache, user=context.run_as)
    with seed.inherited(await to_read(lambda: seed.content(spec, identity))) as seeded:
        arguments = argv.build(
            context.qemu,
            spec,
            source.chains,
            uuid=identity,
            accel=choice.accel,
            incoming=True,
            firmware=_firmware(spec, folder),
            tsc_khz=accel.tsc_khz(),
            exact=True,
            ram=Ram(ram, shared=True),
            blank=True,
            vmgenid=identity if source.machine.guid else "",
            seed=seeded,
        )
        process = await qemu.launch(
            arguments,
            stand_in,
            folder,
            accel=choice.accel,
            inherited=[ram, *([seeded] if seeded else [])],
            rights=Privileges.of(spec, context.run_as),
        )
    try:
        async with qemu.monitor(stand_in, folder) as monitor:
            await load(monitor, loading)
            await _save_devices(monitor, devices)
            with contextlib.suppress(QmpError):
                await commands.control(monitor, "quit")
            await qemu.wait_end(process, deadline=qemu.QUIT_DEADLINE)
    finally:
        processes.terminate(process)
        if not await completed(qemu.wait_end(process, deadline=qemu.QUIT_DEADLINE)):
            raise HostCannot(f"the QEMU that made a template (process {process.pid}) does not end")


def _firmware(spec: MachineSpec, folder: Path) -> argv.Firmware | None:
    """UEFI's flash with a variable store that is thrown away: what counts is in the memory."""
    if spec.firmware != "uefi":
        return None
    found = uefi.chosen(spec)
    variables = folder / "vars.fd"
    variables.write_bytes(Path(found.vars).read_bytes())
    return argv.Firmware(code=found.code, vars=str(variables))


async def _save_devices(monitor: Monitor, devices: int) -> None:
    await migration.set_up(monitor, background=False, mapped=False)
    await migration.leave_out_shared(monitor)
    await migration.start(monitor, "migrate", await migration.hand_over(monitor, devices))
    while (found := await migration.query(monitor)).status not in migration.ENDED:
        await anyio.sleep(0.002)
    if found.status != "completed":
        raise QmpError(f"QEMU could not save the devices of a template: {found.error_desc or found.status}")
