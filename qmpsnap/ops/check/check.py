"""``check``: whether everything holds that is promised of a machine, and what of the rest can be put right."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import DeadlinePassed, LayersCircular, QemuGone, QmpsnapError, StateError
from qmpsnap.host.files import same_file
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.finding import Finding
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base import admission, relocate
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, locked, require_own
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.check import deep as reading
from qmpsnap.ops.check import entries, facts
from qmpsnap.ops.check.facts import Facts
from qmpsnap.ops.check.judge import judge
from qmpsnap.ops.check.quarantine import Moved
from qmpsnap.ops.check.repair import Repairs, close_to_others, repair
from qmpsnap.ops.session import recovery
from qmpsnap.qmp.session import Monitor
from qmpsnap.store import lock


class Checked(Struct, frozen=True, kw_only=True):
    """What was found of one machine.

    Attributes:
        findings: what does not hold now; empty when all is well.
        repaired: what did not hold before ``repair``.
        moved: files that are in quarantine now.
        failed: what repair tried in vain, one sentence each.
    """

    machine: str
    findings: tuple[Finding, ...]
    repaired: tuple[Finding, ...] = ()
    moved: tuple[Moved, ...] = ()
    failed: tuple[str, ...] = ()


async def run(context: Context, name: str, *, deep: bool = False, mend: bool = False) -> Checked:
    """Hold a machine to the invariants of docs/explanation/how-it-works.md.

    Without ``mend`` nothing is changed and no lock is taken: a process that works on the machine is reported instead.
    """
    machine = await context.astore.machine(name)
    require_own(context, machine)
    if mend:
        return await _mend(context, machine, deep=deep)
    try:
        return Checked(machine=name, findings=tuple(await _look(context, name, deep=deep)))
    except LayersCircular as error:  # nothing that reads a chain can be asked then
        return Checked(machine=name, findings=(Finding(code="layers-circular", machine=name, text=error.message),))


async def _look(context: Context, name: str, *, deep: bool) -> list[Finding]:
    """What does not hold, found without the lock: again where another controller has worked while all was read."""
    for _ in range(facts.LOOKS):
        serial = await context.astore.next_serial()
        at = await facts.gather(context, name)
        found = await _judge(context, at, deep=deep)
        if not (deep and found):
            break
        if busy := await blocking(lock.holder, context.home.lock(name)):
            return judge(replace(at, busy=busy))
        if serial == await context.astore.next_serial():
            break
    return found


async def _judge(context: Context, at: Facts, *, deep: bool) -> list[Finding]:
    found = judge(at)
    if deep and not at.busy and not at.record.open:
        told = {(finding.code, finding.layer) for finding in found}
        found += [more for more in await reading.look(context, at) if (more.code, more.layer) not in told]
    return found


async def _mend(context: Context, machine: Machine, *, deep: bool) -> Checked:
    name = machine.name
    await _open_run_folder(context, machine)
    await relocate.go_on(context)
    async with locked(context, name, "repair", anywhere=True):
        failed: list[str] = []
        begun, done = False, Repairs((), ())
        try:
            async with _monitor(context, machine) as qemu:
                at = await facts.gather(context, name, qemu=qemu, own=True)
                first = judge(at)
                if at.record.open and at.trusted and (qemu or not at.silent):
                    begun = True
                    try:
                        await recovery.end_open(MachineSession(context, machine, qemu))
                    except QmpsnapError as error:
                        failed.append(f"operation-open: {error.message}")
            # Ending an operation may have ended or started its QEMU.
            machine = await context.astore.machine(name)
            async with _monitor(context, machine) as qemu:
                at = await facts.gather(context, name, qemu=qemu, own=True)
                second = await _judge(context, at, deep=deep)
                if at.trusted:
                    begun = begun or any(finding.repairable for finding in second)
                    done = await repair(context, at, qemu, second)
                at = await facts.gather(context, name, qemu=qemu, own=True)
                if at.trusted and not at.record.open:
                    await blocking(_record_births, context, at)  # by what is recorded now: a size may be another
                left = await _judge(context, at, deep=deep)
        except QmpsnapError as error:
            if begun:
                moved = "; ".join(f"{file.old} was moved to {file.new}" for file in done.moved)
                error.claim("applied" if moved else "unknown", moved)
            raise
    before = [*first, *(finding for finding in second if finding not in first)]
    repaired = tuple(finding for finding in before if finding not in left)
    return Checked(
        machine=name, findings=tuple(left), repaired=repaired, moved=done.moved, failed=(*failed, *done.failed)
    )


def _record_births(context: Context, at: Facts) -> None:
    """Of layers that a release has recorded which knew no births; they are the recorded files, as far as it went."""
    layers = at.record.forest.layers
    found = {identity: seen for identity, seen in at.headers.items() if not isinstance(seen, str) and seen.birth}
    news = tuple(
        replace(layers[identity], birth=seen.birth)
        for identity, seen in found.items()
        if not layers[identity].birth and same_file(layers[identity], seen)
    )
    if news:
        context.store.apply(at.record.machine.name, Change(layers=news))


async def _open_run_folder(context: Context, machine: Machine) -> None:
    """Nobody works on a machine whose run folder is open to others."""
    for entry in await to_read(entries.within, context.home.run, admission.users(context, machine)):
        if entry.path == str(context.home.run_dir(machine.name)) and entry.is_open:
            with contextlib.suppress(QmpsnapError):
                await to_end(close_to_others, entry)


@asynccontextmanager
async def _monitor(context: Context, machine: Machine) -> AsyncIterator[Monitor | None]:
    """The machine's monitor; None when it is stopped, and when QEMU does not answer, which is a finding itself."""
    async with contextlib.AsyncExitStack() as stack:
        qemu = None
        with contextlib.suppress(QemuGone, DeadlinePassed, StateError):
            qemu = await stack.enter_async_context(context.monitor(machine))
        yield qemu
