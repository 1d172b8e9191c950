"""``rename``: a stopped machine gets another name, and so does its folder, which headers of images name.

The images in the folder are the same files afterwards. Each image whose header names one of them as its backing file,
of this machine or of others, gets the new path. The folder is renamed in one call of the kernel: before it nothing has
happened, and after it recovery rolls forward. One transaction of the store ends it.
"""

import contextlib
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image.backing import set_backing
from qmpsnap.errors import HostCannot, NameTaken, OperationPending, StateError, UsageError
from qmpsnap.hint import call
from qmpsnap.host import write_errors
from qmpsnap.host.files import sync_folder
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine.open_files import require_recorded
from qmpsnap.model.home import RECORD, Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, check_name
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Operation
from qmpsnap.model.operations.rename import RenamePlan
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.model.relocation import carried
from qmpsnap.ops.base import luks
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, forget_places, require_own
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.lifecycle import define
from qmpsnap.ops.outside import layer_changes
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.ops.session.session import begin, looking, working
from qmpsnap.qmp.session import Monitor
from qmpsnap.store.lock import machine_lock


class Renamed(Struct, frozen=True):
    """What a rename does: its plan, and the images whose headers get another path."""

    plan: RenamePlan
    rewritten: tuple[str, ...]


def plan(machine: Machine, new: str, forest: Forest, *, home: Home) -> RenamePlan:
    """What will be done; pure.

    Raises:
        StateError: the machine is adopted, or an image that is not qmpsnap's is based on one of its images.
    """
    old = machine.name
    if machine.adopted:
        raise StateError(
            f"machine {old} was adopted, and its images are opened where its owner's start script names them",
            hint=call("undefine", old, disks="keep") + ", and adopt it again by the other name",
            machine=old,
        )
    folder = str(home.machine_dir(old))
    moved = tuple(layer for layer in forest.layers.values() if layer.path.startswith(f"{folder}/"))
    inside = {layer.id for layer in moved}
    rewritten = tuple(layer.id for layer in forest.layers.values() if layer.backing in inside)
    for layer in (forest.layers[name] for name in rewritten):
        if not layer.owned:
            raise StateError(
                f"{layer.shown} is not an image of qmpsnap's, and its header names an image of machine {old}",
                hint="its readers: " + ", ".join(sorted(forest.machines_above(layer.id))),
                machine=old,
            )
    others = {name for layer in moved for name in forest.machines_above(layer.id)} - {old}
    return RenamePlan(
        machine=old,
        new=new,
        folder=folder,
        new_folder=str(home.machine_dir(new)),
        moved=moved,
        rewritten=rewritten,
        others=tuple(sorted(others)),
    )


async def preview(context: Context, name: str, new: str) -> Renamed:
    """What :func:`run` would do now; locks and changes nothing."""
    await _require_name(context, name, new)
    async with looking(context, name, removes=True) as session:
        planned = await _plan(session, session.basis, new)
        return _told(planned, session.basis.forest)


async def run(context: Context, name: str, new: str) -> Machine:
    """Rename a machine; returns it as it is now.

    Raises:
        NameRefused, NameTaken: the new name is not allowed, or a machine or a folder has it.
        StateError: the machine runs, or another one that reads its images does; or it is adopted.
        LockHeld: another controller works on one of these machines.
        HostCannot: with the effect ``unknown``, a header or the store cannot be written; the next command goes on.
    """
    await _require_name(context, name, new)
    async with working(context, name, "rename", removes=True) as session:
        planned = await _plan(session, session.basis, new)
        operation = await begin(session, session.basis, lambda _: planned)
        async with recovery.attempting(session, operation), _also_locked(context, planned):
            await _require_name(context, name, new)
            await context.astore.mark(operation.id, "running", step=steps.MOVING, writes=planned.rewritten)
            await to_end(_move, planned)
            await _finish(context, operation)
    return await context.astore.machine(new)


async def _require_name(context: Context, name: str, new: str) -> None:
    check_name(new, "machine")
    if new == name:
        raise UsageError(f"machine {name} has that name already")
    await define.require_new(context, new)
    if pending := await context.astore.operations(new, only_open=True):
        raise OperationPending(
            f"operation {pending[0].id} ({pending[0].verb}) of machine {new} is open",
            hint=call("recover", new),
            machine=new,
        )
    if await to_read(os.path.lexists, context.home.machine_dir(new)):
        raise NameTaken(f"the folder {context.home.machine_dir(new)} exists", hint="choose another name", machine=new)


async def _plan(session: MachineSession, basis: Basis, new: str) -> RenamePlan:
    context, machine = session.context, session.machine
    if session.qemu:
        raise StateError(
            f"machine {machine.name} runs, and its QEMU has the images open under their present names",
            hint="stop it first: " + call("stop", machine.name),
            machine=machine.name,
        )
    planned = plan(machine, new, basis.forest, home=context.home)
    for name in planned.others:
        other = await context.astore.machine(name)
        require_own(context, other)
        runs = await to_read(context.process, other)
        if other.adopted or runs:
            raise StateError(
                f"machine {name} reads images of machine {machine.name}, and has them open under their present names",
                hint="stop it first: " + call("stop", name),
                machine=machine.name,
            )
    await to_read(lambda: require_recorded(planned.moved, machine=machine.name))
    for layer in planned.rewritten:
        async with _key(context, machine, basis.forest, layer):
            pass
    return planned


@asynccontextmanager
async def _also_locked(context: Context, planned: RenamePlan) -> AsyncIterator[None]:
    """For the block, nobody takes the new name, and no other machine that reads the images is worked on."""
    home = context.home
    with contextlib.ExitStack() as stack:
        for name in (planned.new, *planned.others):
            await to_end(stack.enter_context, machine_lock(home.lock(name), machine=name, verb="rename"))
        for name in planned.others:
            if pending := await context.astore.operations(name, only_open=True):
                raise OperationPending(
                    f"operation {pending[0].id} ({pending[0].verb}) of machine {name}, which reads images of machine"
                    f" {planned.machine}, is open",
                    hint=call("recover", name),
                    machine=planned.machine,
                )
        try:
            yield
        finally:
            if not await _is_defined(context, planned.new):
                home.lock(planned.new).unlink(missing_ok=True)


async def _is_defined(context: Context, name: str) -> bool:
    return name in {machine.name for machine in await context.astore.machines()}


def _move(planned: RenamePlan) -> None:
    """Rename the folder, durably; nothing is in its way, or that stays."""
    folder, new = Path(planned.folder), Path(planned.new_folder)
    try:
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        folder.rename(new)
        sync_folder(new.parent)
    except OSError as error:
        why = error.strerror if error.errno in (errno.EBUSY, errno.EEXIST) else ""
        what, remedy = (why, "") if why else write_errors.reason(folder.parent, error)
        raise HostCannot(f"the folder {folder} cannot be renamed: {what}", hint=remedy) from error


def _has_moved(planned: RenamePlan) -> bool:
    """Whether the kernel has renamed the folder: each machine's has its record."""
    return not (Path(planned.folder) / RECORD).exists() and (Path(planned.new_folder) / RECORD).exists()


async def _finish(context: Context, operation: Operation[RenamePlan]) -> None:
    """All that follows once the folder has its new name; as often as it takes."""
    planned, home = operation.plan, context.home
    if await _is_defined(context, planned.machine):
        await _rewrite(context, planned)
        await blocking(context.store.home.rename, planned)
    for name in (planned.new, *planned.others):
        await blocking(context.store.records.keep, name)
    with contextlib.suppress(OSError):  # what QEMU and the guest have said
        if not home.log_dir(planned.new).exists():
            home.log_dir(planned.machine).rename(home.log_dir(planned.new))
    await to_end(forget_places, home, planned.machine)
    await context.astore.mark(operation.id, "settled", step=steps.SETTLED)
    for name in (planned.new, *planned.others):
        await blocking(layer_changes.keep, context.store, name)  # of files whose headers are others now


async def _rewrite(context: Context, planned: RenamePlan) -> None:
    machine = await context.astore.machine(planned.machine)
    forest = await context.astore.forest_around(planned.machine, *planned.rewritten)
    now = {layer.id: _carried(layer, planned) for layer in forest.layers.values()}
    for layer in planned.rewritten:
        backing = now[layer].backing
        assert backing
        async with _key(context, machine, forest, layer) as key:
            await set_backing(now[layer], now[backing], qemu_img=context.image.binary, key=key)


@asynccontextmanager
async def _key(context: Context, machine: Machine, forest: Forest, layer: LayerId) -> AsyncIterator[int | None]:
    """The key of an encrypted layer, of the machine that has one for it."""
    readers = sorted(forest.machines_above(layer))
    reader = machine if machine.name in readers or not readers else await context.astore.machine(readers[0])
    async with luks.for_layer(context, reader, forest.layer(layer)) as key:
        yield key


def _carried(layer: Layer, planned: RenamePlan) -> Layer:
    return replace(layer, path=carried(layer.path, (planned.folder,), planned.new_folder))


def _told(planned: RenamePlan, forest: Forest) -> Renamed:
    return Renamed(planned, tuple(forest.layer(name).path for name in planned.rewritten))


async def end(broken: Broken[RenamePlan], _: Monitor | None) -> Direction:
    """End an interrupted rename: by whether the kernel has renamed the folder."""
    context, planned = broken.context, broken.operation.plan
    if not await to_end(_has_moved, planned):
        await broken.mark_failed()
        return "back"
    if broken.machine.name == planned.new:  # the store has it, and its lock is ours
        await _finish(context, broken.operation)
        return "forward"
    async with _also_locked(context, planned):
        await _finish(context, broken.operation)
    return "forward"
