"""How a machine's memory can be saved now, and why not in a better way: found out before anything is done."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

from qmpsnap.block import graph
from qmpsnap.errors import QmpError, StateError, UsageError
from qmpsnap.hint import call, option
from qmpsnap.host.threads import to_read
from qmpsnap.machine import statefile
from qmpsnap.machine.config.firmware_files import tpm_runs
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Compression, Hardware, SaveMode, version_of
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations.memory import Means
from qmpsnap.ops.base import luks, requests
from qmpsnap.ops.base.context import Context, require_spec
from qmpsnap.ops.memory.load import hardware_now
from qmpsnap.ops.outside import other_devices
from qmpsnap.qmp import commands, migration
from qmpsnap.qmp.commands import RunStatus
from qmpsnap.qmp.session import Monitor

CANCELLABLE_SINCE = (10, 0)
"""An earlier QEMU hangs for ever when a background save is cancelled or fails: its threads wait for pages that nobody
releases any more. And it lets the guest run by itself once writes are tracked, also one that was paused."""
MAPPED_RAM_SINCE = (9, 1)
"""The first QEMU with mapped-ram, multifd to a file and direct-io."""

BACKGROUND_MS, BACKGROUND_MS_PER_GIB = 5.0, 20.0
"""How long a background save pauses the guest, by mapped memory; printed by ``scripts/bench pause``."""
STOPPED_MS_PER_GIB = 1000.0
"""How long a stopped save pauses the guest, by resident memory, on a disk that is not slow."""

MEASURED = 3
"""Full snapshots that are looked back at: of three, one that took far too long decides nothing."""

RESERVE_MORE = 32 << 20
"""Bytes a state may have above QEMU's resident memory: devices, page headers, what the guest touches meanwhile."""

_TABLE_ENTRY = 8
"""Bytes of a page table for each page."""
_PER_HEADER = 256
"""Bytes of memory for each byte of page headers, at least: 16 and less for 4096."""


class MemoryRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        file: the state file's path; None lets it lie with the machine's images.
        max_pause_ms: refuse rather than pause the guest longer than this.
        degrade: should only the memory fail, keep the disks' snapshot.
        quit: QEMU ends afterwards (``save``): the guest need not run meanwhile.
    """

    file: str | None = None
    compression: Compression = "none"
    max_pause_ms: float | None = None
    degrade: bool = False
    quit: bool = False


async def choose(
    context: Context, machine: Machine, qemu: Monitor | None, chains: Sequence[Chain], request: MemoryRequest
) -> Means:
    """The best way there is, found by asking QEMU; refused where there is none, or none within the pause asked for."""
    if request.max_pause_ms is not None and not 0 < request.max_pause_ms < math.inf:
        raise UsageError(
            f"the pause limit cannot be {request.max_pause_ms:g} ms",
            hint=option("max_pause_ms", "MS") + " takes milliseconds above 0",
            machine=machine.name,
        )
    process = context.process(machine)
    if qemu is None or process is None:
        raise StateError(
            f"machine {machine.name} is stopped and has no memory to save",
            hint="take its disks alone: " + call("snapshot", machine.name),
            machine=machine.name,
        )
    await _require_unhindered(context.home, machine, qemu, chains, request)
    version = version_of(await commands.query_version(qemu))
    status = await commands.query_status(qemu)
    running = status.live
    why = await _why_not_behind_it(machine, qemu, request, status=status, version=version)
    if why and not running and not request.quit:
        raise StateError(
            f"machine {machine.name} is {status.status}, and QEMU cannot return to a paused guest after"
            f" saving its memory ({why})",
            hint="save it and end QEMU: " + call("save", machine.name) + "; or resume it first",
            machine=machine.name,
        )
    resident = resident_bytes(process.pid)
    hardware = await hardware_now(context, machine, qemu)
    if request.max_pause_ms is not None and running and not request.quit:
        used = resident if why else _mapped(process.pid)
        snapshots = await context.astore.snapshots(machine.name)
        _require_short(machine, why, used, lasted(snapshots, "stopped" if why else "background", hardware), request)
    cancellable = bool(why) or version >= CANCELLABLE_SINCE
    expected = resident + RESERVE_MORE
    # Where running out of space hangs QEMU for ever there must be room for whatever the guest touches meanwhile.
    ram = machine.spec.memory
    reserve = expected if cancellable else max(expected, ram + ram // _PER_HEADER + RESERVE_MORE)
    mapped = bool(why) and request.compression == "none" and version >= MAPPED_RAM_SINCE
    return Means(
        mode="stopped" if why else "background",
        layout="mapped-ram" if mapped else "stream",
        why=why,
        hardware=hardware,
        resume=running,
        cancellable=cancellable,
        reserve=reserve,
    )


async def _require_unhindered(
    home: Home, machine: Machine, qemu: Monitor, chains: Sequence[Chain], request: MemoryRequest
) -> None:
    require_spec(machine, "load its memory again")
    luks.require_plain(
        machine,
        "its data and its key would be in the state file in the clear",
        "take its disks alone: " + call("snapshot", machine.name),
    )
    file = request.file
    taken = await to_read(lambda: os.path.lexists(file)) if file else False
    if taken:
        raise StateError(
            f"{file} exists already",
            hint="move it away or choose another name",
            machine=machine.name,
        )
    if (last := (await migration.query(qemu)).status) not in migration.IDLE:
        raise StateError(
            f"machine {machine.name} has another migration in progress ({last})",
            hint="wait until it has ended",
            machine=machine.name,
        )
    alone = "take its disks alone: " + call("snapshot", machine.name)
    await require_saveable(home, machine, qemu, chains, hint=alone)
    await other_devices.require_same(machine, qemu, hint=alone)
    if request.compression != "none":
        statefile.zstandard_package()


async def require_saveable(home: Home, machine: Machine, qemu: Monitor, chains: Sequence[Chain], *, hint: str) -> None:
    """Make sure that no device stands in the way of saving memory, in a file or inside an image.

    Raises ``StateError`` for another node that the guest writes to, a suspended guest that QEMU would not record, or a
    TPM whose emulator has ended.
    """
    await requests.require_told(machine, qemu, doing="save its memory", hint=hint)
    if machine.spec.tpm and not await to_read(tpm_runs, home.tpm(machine.name)):
        raise StateError(
            f"the TPM of machine {machine.name} cannot be saved: its emulator, swtpm, has ended",
            hint="start it anew: " + call("stop", machine.name) + ", " + call("start", machine.name) + "; or " + hint,
            machine=machine.name,
        )
    if reasons := (await migration.query(qemu)).blocked_reasons:
        raise StateError(
            f"QEMU cannot save the memory of machine {machine.name}: {'; '.join(reasons)}",
            hint=hint,
            machine=machine.name,
        )
    await graph.require_no_other(qemu, chains, machine=machine.name, hint=hint)


async def _why_not_behind_it(
    machine: Machine, qemu: Monitor, request: MemoryRequest, *, status: RunStatus, version: tuple[int, ...]
) -> str:
    """Why the guest has to be paused for the whole save; empty if it need not."""
    # After a stopped save QEMU has released the disks: a paused guest gets them back only by running.
    if request.quit and (status.live or version < CANCELLABLE_SINCE):
        return "QEMU ends afterwards"
    if not status.live and status.status != "paused" and version >= CANCELLABLE_SINCE:
        return f"QEMU cannot save a guest in the background that is {status.status}"  # it aborts
    try:
        await migration.set_capabilities(qemu, {"background-snapshot": True})
        await migration.set_capabilities(qemu, {"background-snapshot": False})
    except QmpError as error:
        return error.message
    if not status.live and version < CANCELLABLE_SINCE:
        raise StateError(
            f"machine {machine.name} is {status.status}, and QEMU {'.'.join(map(str, version))} would resume it",
            hint="save it and end QEMU: " + call("save", machine.name) + "; or resume it first",
            machine=machine.name,
        )
    return ""


def lasted(snapshots: Iterable[Snapshot], mode: SaveMode, hardware: Hardware) -> tuple[float, ...]:
    """How long this guest was paused for its last full snapshots of that mode, in milliseconds, oldest first; pure.

    Those of other memory, another QEMU or accelerator say nothing.
    """
    like = (hardware.memory, hardware.qemu_version, hardware.accel)
    states = [(found.vmstate, found.pause_ms) for found in snapshots if found.vmstate and found.vmstate.mode == mode]
    held = [(state.hardware, ms) for state, ms in states if ms is not None]
    return tuple(ms for at, ms in held if (at.memory, at.qemu_version, at.accel) == like)[-MEASURED:]


def expected_ms(computed: float, measured: Sequence[float]) -> float:
    """How long the guest will be held: the median of what was measured; pure.

    What was not measured yet counts as computed: else a single bad moment would refuse every later snapshot that could
    show it to have been one.
    """
    import statistics

    return statistics.median([*measured, *[computed] * (MEASURED - len(measured))])


def _require_short(machine: Machine, why: str, used: int, measured: Sequence[float], request: MemoryRequest) -> None:
    gib = used / (1 << 30)
    expected = expected_ms(STOPPED_MS_PER_GIB * gib if why else BACKGROUND_MS + BACKGROUND_MS_PER_GIB * gib, measured)
    if request.max_pause_ms is not None and expected > request.max_pause_ms:
        mode = f"has to be paused for the whole save ({why})" if why else "is paused until its writes are tracked"
        before = f" (its last full snapshots: {', '.join(f'{ms:.0f}' for ms in measured)} ms)" if measured else ""
        raise StateError(
            f"the guest of machine {machine.name} {mode}: about {expected:.0f} ms for {gib:.2f} GiB of memory{before},"
            f" but {request.max_pause_ms:g} ms are allowed",
            hint="allow more with "
            + option("max_pause_ms", "MS")
            + ", or take the disks alone"
            + ("; " + call("doctor") + " shows why" if why else ""),
            machine=machine.name,
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
