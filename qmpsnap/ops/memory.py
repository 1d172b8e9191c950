"""A guest's memory: saved at the very instant of its disks, and loaded into a new QEMU.

``background`` is the way whose pause nobody notices: the guest is stopped, all disks get their overlays, QEMU begins to
track writes to RAM, the guest runs on, and RAM is written behind its back. Where that cannot be had the guest stands
still until all is written, and the snapshot says why.
"""

import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, HostCannot, QmpError, StateError
from qmpsnap.machine import hugepages, statefile
from qmpsnap.model.machine import Machine
from qmpsnap.model.operation import Memory, Operation
from qmpsnap.model.vmstate import Compression, Hardware, Layout, SaveMode, Vmstate, version_of
from qmpsnap.ops import keys
from qmpsnap.ops.context import Context, require_spec
from qmpsnap.ops.loading import hardware_now
from qmpsnap.qmp import commands, migration
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import Report
from qmpsnap.qmp.session import Monitor

CANCELLABLE_SINCE = (10, 0)
"""An earlier QEMU hangs for ever when a background save is cancelled or fails: its threads wait for pages that nobody
releases any more. And it lets the guest run by itself once writes are tracked, also one that was paused."""
MAPPED_RAM_SINCE = (9, 1)
"""The first QEMU with mapped-ram, multifd to a file and direct-io."""

BACKGROUND_MS, BACKGROUND_MS_PER_GIB = 5.0, 20.0
"""What a background save holds the guest for, by mapped memory; printed by ``scripts/bench pause``."""
STOPPED_MS_PER_GIB = 1000.0
"""What a stopped save holds the guest for, by resident memory, on a disk that is not slow."""

RESERVE_MORE = 32 << 20
"""Bytes a state may have above QEMU's resident memory: devices, page headers, what the guest touches meanwhile."""

RESUME_DEADLINE = 10.0
"""Seconds for letting the guest run again."""

HELD = frozenset({"paused", "finish-migrate", "postmigrate"})
"""``RunState`` names of a guest that stands still for its memory."""

_TABLE_ENTRY = 8
"""Bytes of a page table for each page."""
_PER_HEADER = 256
"""Bytes of memory for each byte of page headers, at least: 16 and less for 4096."""


class MemoryRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        file: the state file's path; None lets it lie with the machine's images.
        max_pause_ms: refuse, rather than hold the guest longer than this.
        degrade: should only the memory fail, keep the disks' snapshot.
        quit: QEMU ends afterwards (``save``): the guest need not run meanwhile.
    """

    file: str | None = None
    compression: Compression = "none"
    max_pause_ms: float | None = None
    degrade: bool = False
    quit: bool = False


class Means(Struct, frozen=True, kw_only=True):
    """How this machine's memory can be saved now; fields as in :class:`Memory`."""

    mode: SaveMode
    layout: Layout
    why: str
    hardware: Hardware
    resume: bool
    cancellable: bool
    reserve: int


class Held(Struct, frozen=True):
    """How long the guest was held, by QEMU's own clock, and what each step of it took; milliseconds."""

    pause_ms: float | None
    steps: Mapping[str, float]


async def choose(context: Context, machine: Machine, qemu: Monitor | None, request: MemoryRequest) -> Means:
    """The best way there is, found by asking QEMU.

    Raises:
        StateError: this machine's memory cannot be saved at all, or not within the pause asked for.
        HostCannot: no space, or nothing to compress with.
    """
    process = context.process(machine)
    if qemu is None or process is None:
        raise StateError(
            f"machine {machine.name} is stopped and has no memory to save; nothing was changed",
            hint=f"qmpsnap snapshot create {machine.name} takes its disks",
            machine=machine.name,
        )
    require_spec(machine, "load its memory again")
    keys.require_plain(
        machine,
        "the guest's memory, with what it read from there and the key itself, would lie in a file in the clear",
        f"qmpsnap snapshot create {machine.name} takes its disks",
    )
    if request.file and os.path.lexists(request.file):
        raise StateError(
            f"{request.file} exists already; nothing was changed",
            hint="move it away or choose another name",
            machine=machine.name,
        )
    last = await migration.query(qemu)
    if last.status not in migration.IDLE:
        raise StateError(
            f"somebody else migrates machine {machine.name} (it is {last.status}); nothing was changed",
            hint="wait for the end of that",
            machine=machine.name,
        )
    if last.blocked_reasons:
        raise StateError(
            f"QEMU cannot save the memory of machine {machine.name}: {'; '.join(last.blocked_reasons)};"
            " nothing was changed",
            hint=f"qmpsnap snapshot create {machine.name} takes its disks",
            machine=machine.name,
        )
    if request.compression != "none":
        statefile.require_zstd()
    version = version_of(await commands.query_version(qemu))
    running = (await commands.query_status(qemu)).running
    why = await _why_not_behind_it(machine, qemu, request, running=running, version=version)
    if why and not running and not request.quit:
        raise StateError(
            f"machine {machine.name} is paused, and its memory can only be saved in a way that QEMU does not come back"
            f" from to a paused guest ({why}); nothing was changed",
            hint=f"qmpsnap save {machine.name} saves it and ends QEMU; or let it run first",
            machine=machine.name,
        )
    resident = resident_bytes(process.pid)
    if request.max_pause_ms is not None and running and not request.quit:
        _require_short(machine, why, resident if why else _mapped(process.pid), request.max_pause_ms)
    folder = Path(request.file).parent if request.file else context.home.machine_dir(machine.name)
    cancellable = bool(why) or version >= CANCELLABLE_SINCE
    expected = resident + RESERVE_MORE
    # Where running out of space hangs QEMU for ever there must be room for whatever the guest touches meanwhile.
    ram = machine.spec.memory
    reserve = expected if cancellable else max(expected, ram + ram // _PER_HEADER + RESERVE_MORE)
    packed = 0 if request.compression == "none" else expected  # made while the other is still there
    await to_thread.run_sync(_require_space, folder, reserve + packed)
    mapped = bool(why) and request.compression == "none" and version >= MAPPED_RAM_SINCE
    return Means(
        mode="stopped" if why else "background",
        layout="mapped-ram" if mapped else "stream",
        why=why,
        hardware=await hardware_now(context, machine, qemu),
        resume=running,
        cancellable=cancellable,
        reserve=reserve,
    )


async def _why_not_behind_it(
    machine: Machine, qemu: Monitor, request: MemoryRequest, *, running: bool, version: tuple[int, ...]
) -> str:
    """Why the guest has to stand still for it; empty when it has not."""
    if request.quit:
        return "the machine ends afterwards"
    try:
        await migration.set_capabilities(qemu, {"background-snapshot": True})
        await migration.set_capabilities(qemu, {"background-snapshot": False})
    except QmpError as error:
        return error.message
    if not running and version < CANCELLABLE_SINCE:
        raise StateError(
            f"machine {machine.name} is paused, and QEMU {'.'.join(map(str, version))} would let it run;"
            " nothing was changed",
            hint=f"qmpsnap save {machine.name} saves it and ends QEMU; or let it run first",
            machine=machine.name,
        )
    return ""


def _require_short(machine: Machine, why: str, used: int, limit_ms: float) -> None:
    gib = used / (1 << 30)
    expected = STOPPED_MS_PER_GIB * gib if why else BACKGROUND_MS + BACKGROUND_MS_PER_GIB * gib
    if expected > limit_ms:
        mode = f"has to stand still ({why})" if why else "is held while writes become tracked"
        raise StateError(
            f"the guest of machine {machine.name} {mode}: about {expected:.0f} ms for {gib:.2f} GiB of memory,"
            f" and {limit_ms:g} ms were allowed; nothing was changed",
            hint="allow more with --max-pause, or take the disks alone" + ("; see qmpsnap doctor" if why else ""),
            machine=machine.name,
        )


def _require_space(folder: Path, wanted: int) -> None:
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise HostCannot(f"{folder}: {error.strerror}; nothing was changed") from error
    free = found.f_bavail * found.f_frsize
    if free < wanted:
        raise HostCannot(
            f"the memory may need {wanted >> 20} MiB in {folder}, and {free >> 20} MiB are free; nothing was changed",
            hint="free some space, or name a file elsewhere",
        )


def resident_bytes(pid: int) -> int:
    """Bytes of a process that are in memory: what of the guest's RAM was ever touched, and QEMU itself."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _mapped(pid: int) -> int:
    """Bytes of a process that have page tables: those in memory, and what was only ever read.

    A background save reads all of the guest's RAM: from the second one on the tables of all of it have to be changed.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    tables = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmPTE:"))
    return tables // _TABLE_ENTRY * os.sysconf("SC_PAGE_SIZE")


# --- saving -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def channel(qemu: Monitor, memory: Memory) -> AsyncIterator[dict[str, Any]]:
    """Make the file and ready QEMU to write to it; afterwards QEMU is as it was, the file stays.

    Raises:
        HostCannot: no space for all of it; a save that has begun must not run out of it.
    """
    descriptors = [await to_thread.run_sync(statefile.create, memory.part)]
    try:
        await to_thread.run_sync(statefile.reserve, descriptors[0], memory.reserve, memory.part)
        direct = statefile.also_direct(descriptors[0]) if memory.layout == "mapped-ram" else None
        descriptors += [] if direct is None else [direct]
        await migration.set_up(
            qemu,
            background=memory.mode == "background",
            mapped=memory.layout == "mapped-ram",
            direct=direct is not None,
        )
        yield await migration.hand_over(qemu, *descriptors)
        await migration.put_back(qemu)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def shorten(context: Context, machine: Machine, memory: Memory) -> None:
    """Do what makes the pause shorter and can be done while the guest runs."""
    process = context.process(machine)
    if process and memory.mode == "background" and memory.resume:
        await to_thread.run_sync(hugepages.gather, process.pid)


async def hold(qemu: Monitor, memory: Memory, channel: dict[str, Any], transact: Callable[[], Awaitable[None]]) -> Held:
    """Stop the guest, move the disks, fix the memory, let the guest run on: one instant for all of it.

    Where QEMU is to end afterwards the guest stays stopped, unless this fails.

    Raises:
        DeadlinePassed: it took longer than allowed; the memory was given up, the disks have moved. Of a QEMU that
            cannot give it up the guest is held for as long as it takes.
        QmpError: QEMU refused a step.
    """
    clock = _Clock()
    resume = memory.resume
    async with qemu.listen("STOP", "RESUME") as bell:
        try:
            with anyio.fail_after(memory.max_pause_ms / 1000 if memory.max_pause_ms and memory.cancellable else None):
                if memory.resume:
                    await commands.control(qemu, "stop")
                    clock.step("stop")
                await transact()
                clock.step("transaction")
                await migration.start(qemu, "migrate", channel)
                clock.step("migrate")
                _require_success(await fixed(qemu, memory.mode))
                clock.step("tracking")
            resume = memory.resume and not memory.quit
        except BaseException as error:
            # Let run before its memory is fixed, the guest would change what is saved: then it must not count.
            await give_up(qemu, memory)
            if isinstance(error, TimeoutError):
                raise DeadlinePassed(
                    f"the guest would have been held longer than {memory.max_pause_ms:g} ms; its memory was not saved"
                ) from error
            raise
        finally:
            if resume:
                with anyio.move_on_after(RESUME_DEADLINE, shield=True):
                    try:
                        # An earlier QEMU has done so by itself; then this changes nothing.
                        await commands.control(qemu, "cont")
                    except QmpError:
                        await run_on(qemu)  # QEMU had not quite ended its migration
                    clock.step("cont")
        if resume:
            await bell.wait(1.0)
    times = dict(reversed(bell.times))
    pause = (times.get("RESUME", math.nan) - times.get("STOP", math.nan)) * 1000
    return Held(None if math.isnan(pause) else pause, clock.steps)


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()
        self.steps: dict[str, float] = {}

    def step(self, name: str) -> None:
        now = time.monotonic()
        self.steps[name] = round((now - self._last) * 1000, 3)
        self._last = now


async def fixed(qemu: Monitor, mode: SaveMode) -> migration.Migration:
    """Wait until no write of the guest can reach the state any more, or the save has failed."""
    while True:
        found = await migration.query(qemu)
        if found.status in migration.ENDED or (mode == "background" and found.tracks_writes):
            return found
        await anyio.sleep(0 if mode == "background" else 0.002)


def _require_success(found: migration.Migration) -> None:
    if found.status in ("failed", "cancelled"):
        reason = found.error_desc or ("it was cancelled" if found.status == "cancelled" else "QEMU gives no reason")
        raise HostCannot(
            f"QEMU could not write the memory: {reason}", hint="look at the space where the state file goes"
        )


async def run_on(qemu: Monitor) -> None:
    """Let a guest run that was held for its memory; one that stands still for another reason does so on."""
    while (status := (await commands.query_status(qemu)).status) == "finish-migrate":
        await anyio.sleep(0.002)  # QEMU refuses meanwhile
    if status in HELD:
        await commands.control(qemu, "cont")


async def give_up(qemu: Monitor, memory: Memory) -> None:
    """Cancel a save, whoever started it; where that is not possible, wait until the guest may run again."""
    with anyio.move_on_after(RESUME_DEADLINE, shield=True):
        if (await migration.query(qemu)).status in migration.IDLE:
            return
        if memory.cancellable:
            await migration.cancel(qemu)
        else:
            await fixed(qemu, memory.mode)


async def written(qemu: Monitor, operation: Operation, *, report: Report) -> None:
    """Wait until QEMU has written all of it.

    Raises:
        HostCannot: it could not.
    """
    _require_success(await ended(qemu, operation, report=report))


async def ended(qemu: Monitor, operation: Operation, *, report: Report) -> migration.Migration:
    """Wait for the end of a save, however it ends."""
    pause = 0.002
    while True:
        found = await migration.query(qemu)
        ram = found.ram
        done = found.status in migration.ENDED
        report(
            JobInfo(
                id=f"qs.{operation.id}.memory",
                type="save",
                status="concluded" if done else "running",
                current_progress=max(0, ram.total - ram.remaining),
                total_progress=ram.total,
            )
        )
        if done:
            return found
        await anyio.sleep(pause)
        pause = min(pause * 1.5, 0.1)


async def forget(qemu: Monitor) -> None:
    """Wait for the end of a save that was given up, and let QEMU forget it."""
    while (await migration.query(qemu)).status not in migration.IDLE:
        await anyio.sleep(0.01)
    await migration.put_back(qemu)


async def finish(
    operation: Operation, memory: Memory, *, snapshot: str, steps: Mapping[str, float] | None = None
) -> Vmstate:
    """Give the written state its manifest and its name, durably.

    Raises:
        HostCannot: no space.
    """
    manifest = statefile.Manifest(
        operation=operation.id,
        snapshot=snapshot,
        created=time.time(),
        bytes=0,
        digest="",
        mode=memory.mode,
        layout=memory.layout,
        compression=memory.compression,
        hardware=memory.hardware,
        steps_ms=dict(steps or {}),
    )
    return await to_thread.run_sync(statefile.finish, memory.part, memory.path, manifest)
