"""Ending operations that nobody ended: QEMU and the files are asked, then rolled forward or back.

The rule for each verb is a pure function of what was durable and what is found; running it twice changes nothing more.
"""

import contextlib
import stat
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from anyio import to_thread
from msgspec.structs import replace

from qmpsnap.block import graph, header
from qmpsnap.block.image import remove
from qmpsnap.block.qcow2 import Header
from qmpsnap.errors import HostCannot, OperationPending, QemuGone, QmpsnapError, StoreMismatch
from qmpsnap.model.blockdev import node_name
from qmpsnap.model.chain import Layer
from qmpsnap.model.home import Home
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import LayerId, NodeName
from qmpsnap.model.operation import Change, CreatePlan, MergePlan, MirrorPlan, Operation, RevertPlan
from qmpsnap.ops import chosen, recover_merge, recover_mirror
from qmpsnap.ops.context import Context, blocking
from qmpsnap.ops.recover_merge import Unfinished
from qmpsnap.ops.switch import remove_files, switch
from qmpsnap.qmp import commands
from qmpsnap.qmp.jobs import JobStuck, Report, unreported
from qmpsnap.qmp.session import Monitor

Direction = Literal["forward", "back"]

EMPTY_LIMIT = 8 << 20
"""Bytes an image may occupy and still pass for one that no guest has written to: tables of an empty 64 TiB image."""


def create_direction(step: str, *, active: int | None, total: int) -> Direction | None:
    """Whether a broken ``snapshot create`` is finished or undone; pure.

    Args:
        step: the last durable step.
        active: how many of the overlays QEMU writes to, None when no QEMU runs.
        total: how many there are.

    Returns:
        None when the rules do not cover what was found: someone else has changed the chain.
    """
    if step != "transaction":
        return "back"
    if active is None or active == total:
        # Without QEMU nobody can tell whether the transaction ran; either way the overlays read the same.
        return "forward"
    return "back" if active == 0 else None


def identified(change: Change, headers: Mapping[LayerId, Header], *, pause_ms: float | None = None) -> Change:
    """The change with the identities of the files that were made, and the pause that was measured."""
    layers = tuple(
        replace(layer, device=headers[layer.id].device, inode=headers[layer.id].inode) if layer.id in headers else layer
        for layer in change.layers
    )
    snapshots = tuple(replace(snapshot, pause_ms=pause_ms) for snapshot in change.snapshots)
    return replace(change, layers=layers, snapshots=snapshots)


async def end_open(
    context: Context,
    machine: Machine,
    qemu: Monitor | None,
    *,
    unfinished: Unfinished = "refuse",
    report: Report = unreported,
) -> list[Operation]:
    """End every open operation of a machine whose lock we hold; returns them as they were.

    Args:
        context: where.
        machine: the machine.
        qemu: its monitor, None when it is stopped.
        unfinished: what to do with a job that still works.
        report: told about the progress of a job that is carried on.

    Raises:
        OperationPending: one of them cannot be ended now.
    """
    pending = await blocking(lambda: context.store.operations(machine.name, only_open=True))
    for operation in pending:
        try:
            await _end(context, machine, qemu, operation, unfinished=unfinished, report=report)
        except OperationPending:
            raise
        except JobStuck as error:
            error.tell(machine.name, waits=True)
            raise
        except QmpsnapError as error:
            raise _pending(operation, error.message) from error
    return list(pending)


async def after_failure(
    context: Context, machine: Machine, qemu: Monitor | None, operation: Operation, error: BaseException
) -> None:
    """Find out what a failed attempt has left and end it; tell the error what became of it."""
    direction: Direction | None = None
    try:
        recorded = await blocking(lambda: context.store.operations(machine.name, only_open=True))
        operation = next((found for found in recorded if found.id == operation.id), operation)
        # Whoever was cancelled wants the job to end; whoever failed wants to know first.
        unfinished: Unfinished = "refuse" if isinstance(error, Exception) else "cancel"
        direction = await _end(
            context, machine, qemu, operation, unfinished=unfinished, error=str(error) or "cancelled"
        )
    except QmpsnapError:
        # The store itself may be what failed; the operation stays open then, which is as good.
        with contextlib.suppress(QmpsnapError):
            await blocking(lambda: context.store.mark(operation.id, "unknown", error=str(error)))
    if isinstance(error, QmpsnapError):
        error.machine, error.operation = machine.name, str(operation.id)
        error.effect = {"forward": "applied", "back": "none", None: "unknown"}[direction]  # type: ignore[assignment]
        if isinstance(error, JobStuck):
            error.tell(machine.name, waits=direction is None)
        elif direction is None and not isinstance(error, HostCannot):
            error.hint = f"qmpsnap recover {machine.name} finds out and ends it"


async def _end(
    context: Context,
    machine: Machine,
    qemu: Monitor | None,
    operation: Operation,
    *,
    unfinished: Unfinished,
    error: str = "interrupted",
    report: Report = unreported,
) -> Direction:
    plan = operation.plan
    if isinstance(plan, CreatePlan):
        async with _answering(context, machine, qemu) as monitor:
            return await _end_create(context, machine, monitor, operation, plan=plan, error=error)
    if isinstance(plan, MergePlan):
        async with _answering(context, machine, qemu) as monitor:
            return await recover_merge.end(
                context, machine, monitor, operation, unfinished=unfinished, error=error, report=report
            )
    if isinstance(plan, MirrorPlan):
        async with _answering(context, machine, qemu) as monitor:
            return await recover_mirror.end(
                context, machine, monitor, operation, unfinished=unfinished, error=error, report=report
            )
    if isinstance(plan, RevertPlan):
        async with _answering(context, machine, qemu) as monitor:
            return await _end_revert(context, machine, monitor, operation, plan=plan, error=error)
    # A definition that did not settle has no machine yet: nobody can have used its images.
    await _remove_new(plan.created)
    await to_thread.run_sync(remove_folder, context.home, plan.machine)
    await blocking(lambda: context.store.mark(operation.id, "failed", error=error))
    return "back"


async def _end_revert(
    context: Context, machine: Machine, monitor: Monitor | None, operation: Operation, *, plan: RevertPlan, error: str
) -> Direction:
    if operation.step == "planned":
        await _remove_new([overlay.layer for overlay in plan.overlays])
        await blocking(lambda: context.store.mark(operation.id, "failed", error=error))
        return "back"
    if operation.step == "stopping":
        await switch(context, machine, monitor, operation, plan)
        monitor = None
    elif operation.step == "switched":
        await remove_files(context, plan)
    note = f"{error}; the machine was not started again: qmpsnap start {machine.name}"
    stopped = plan.restart and monitor is None
    await blocking(lambda: context.store.mark(operation.id, "settled", step="settled", error=note if stopped else None))
    return "forward"


async def _end_create(
    context: Context, machine: Machine, monitor: Monitor | None, operation: Operation, *, plan: CreatePlan, error: str
) -> Direction:
    names = frozenset(node_name(overlay.layer) for overlay in plan.overlays)
    found = await graph.read(monitor) if monitor else None
    active = None
    if found:
        active = sum(bool(disk.nodes) for disk in graph.by_disk(found, names).values())
    direction = create_direction(operation.step, active=active, total=len(names))
    if direction is None:
        raise _pending(operation, "only some of its overlays are active in QEMU")
    if direction == "forward":
        headers = {o.layer.id: header.read(o.layer.path, format=o.layer.format) for o in plan.overlays}
        await chosen.let_go(plan.overlays)
        await blocking(context.store.settle, operation.id, machine.name, identified(plan.change, headers))
        return direction
    if monitor and found:
        for name in sorted(names & graph.node_names(found)):
            await commands.blockdev_del(monitor, NodeName(name))
    await chosen.undo(plan.overlays)
    await _remove_new([overlay.layer for overlay in plan.overlays if not overlay.part])
    await blocking(lambda: context.store.mark(operation.id, "failed", error=error))
    return direction


@asynccontextmanager
async def _answering(context: Context, machine: Machine, qemu: Monitor | None) -> AsyncIterator[Monitor | None]:
    """A monitor that answers: the one at hand, a new one if that has closed, or None when QEMU has ended."""
    if qemu is not None:
        try:
            await commands.query_status(qemu)
        except QemuGone:
            pass
        else:
            yield qemu
            return
    async with context.monitor(machine) as fresh:
        yield fresh


async def _remove_new(layers: Iterable[Layer]) -> None:
    """Remove images that an operation made and nobody has used; whatever looks used is left and said."""
    for layer in layers:
        if (identity := await to_thread.run_sync(_identity_of_new, layer)) is not None:
            await remove(layer.path, device=identity[0], inode=identity[1])


def _identity_of_new(layer: Layer) -> tuple[int, int] | None:
    try:
        status = Path(layer.path).lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_blocks * 512 > EMPTY_LIMIT:
        raise StoreMismatch(f"{layer.path} should be a new, empty image and is not; it was left as it is")
    return status.st_dev, status.st_ino


def remove_folder(home: Home, machine: str) -> None:
    """Remove a machine's folder with its variable store, unless somebody has put other files there."""
    folder = home.machine_dir(machine)
    home.variables(machine).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _pending(operation: Operation, why: str) -> OperationPending:
    return OperationPending(
        f"operation {operation.id} ({operation.verb}) on machine {operation.machine} cannot be ended now: {why}",
        hint=f"put that right, then: qmpsnap recover {operation.machine}",
        machine=operation.machine,
        operation=str(operation.id),
    )
