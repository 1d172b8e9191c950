"""``undefine``: a machine is forgotten; its images stay or go, as was said."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from qmpsnap.errors import HostCannot, QmpsnapError, StateError, UsageError
from qmpsnap.hint import call, option
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import InternalPlan, LoadPlan, Operation, Plan
from qmpsnap.model.operations.undefine import UndefinePlan
from qmpsnap.ops.base import volumes
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, forget_places
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.lifecycle.recover import is_done, remove_files
from qmpsnap.ops.outside import layer_changes, other_programs
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.session import working
from qmpsnap.store.store import Store

Fate = Literal["keep", "remove"]
"""What becomes of the images that only this machine used."""


Told = Callable[[str], object]
"""Gets one sentence for each operation that was given up."""


async def run(context: Context, name: str, *, disks: Fate | None, told: Told | None = None) -> list[str]:
    """Forget a machine and its snapshots; returns paths of the images and state files that are left or were removed.

    ``disks``: ``keep`` leaves its images as files, ``remove`` deletes those that qmpsnap made and nobody else reads;
    None refuses when anything would be lost. With ``keep`` an operation that cannot be ended is given up, and ``told``
    learns of it, unless the machine's QEMU runs; of an adopted one that its owner has launched again we know nothing. A
    file that somebody has put in the place of one that would go is left alone.

    Raises:
        StateError: it runs, another process has images open that would go, or something would be lost.
        OperationPending: an earlier operation cannot be ended now, nor given up.
        HostCannot: with effect ``applied``, the machine is forgotten and files of it are left, which are named.
    """
    if disks not in (None, *get_args(Fate)):
        raise UsageError(f"images can be kept or removed, not {disks!r}", hint="use disks='keep' or disks='remove'")
    hopeless: list[tuple[Operation, QmpsnapError]] = []
    giving_up = (lambda operation, error: hopeless.append((operation, error))) if disks == "keep" else None
    goes = disks == "remove"
    async with working(context, name, "undefine", removes=goes, alone=goes, given_up=giving_up) as session:
        await require_possible(session, disks)
        snapshots = await context.astore.snapshots(name)
        states = tuple(found.vmstate for found in snapshots if found.vmstate)
        variables = tuple(found.variables for found in snapshots if found.variables)
        noted = await blocking(context.store.records.noted, name)
        forest = await context.astore.forest_around(name, *noted)
        sizes = await blocking(layer_changes.sizes, context.store, forest.layers)

        def removal(gone: Sequence[Layer]) -> UndefinePlan:
            layers = tuple(layer for layer in gone if layer.owned)
            of_these = {layer.id: size for layer in layers if (size := sizes.get(layer.id)) is not None}
            return UndefinePlan(machine=name, layers=layers, states=states, variables=variables, sizes=of_these)

        layers = await _forgotten(context, name, removal if goes else None)
        files = [*(layer.path for layer in layers if layer.owned), *(state.path for state in states)]
        stuck: list[str] = []
        if goes:
            (open_now,) = await context.astore.operations(name, only_open=True)
            async with recovery.attempting(session, open_now):
                files, stuck = await remove_files(context, removal(layers))
                why = "; ".join(stuck) or None
                await context.astore.mark(open_now.id, "settled", step=steps.SETTLED, error=why)
        if told and hopeless:
            for operation, error in hopeless:
                told(await to_read(_given_up, context.store, operation, error, files))
        await is_done(stuck, to_end(forget_places, context.home, name))
    if stuck:
        error = HostCannot(
            f"some files of machine {name} were not removed: {'; '.join(stuck)}", hint="remove them yourself"
        )
        error.claim("applied", f"machine {name} is no longer defined")
        raise error
    return files


async def require_possible(session: MachineSession, disks: Fate | None) -> None:
    """Make sure that the machine can be forgotten now, with that fate of its images."""
    name = session.machine.name
    # An adopted machine is given back as it runs; only what it has open must stay.
    if session.qemu and not (session.machine.adopted and disks != "remove"):
        raise StateError(
            f"machine {name} is running",
            hint=call("stop", name) + ((", or add " + option("disks", "keep")) if session.machine.adopted else ""),
            machine=name,
        )
    if disks is None:
        await _refuse_loss(session.context, name)
    if disks == "remove":
        alone = await _alone(session.context, name)
        await volumes.require_independent(alone)
        await other_programs.require_free([layer.path for layer in alone], machine=name, readers=True)


async def _forgotten(
    context: Context, name: str, removal: Callable[[Sequence[Layer]], UndefinePlan] | None
) -> tuple[Layer, ...]:
    """Forget the machine; returns its layers. Its record goes first, and is made again where it was not."""
    try:
        return await context.astore.forget(name, removal=removal)
    except QmpsnapError:
        with contextlib.suppress(QmpsnapError):  # gone it is, or nothing can be written: `check` says so
            await blocking(context.store.records.write, name)
        raise


def _given_up(store: Store, operation: Operation, error: QmpsnapError, told_of: Sequence[str]) -> str:
    """What became of it, with the files that nobody else will tell of."""
    why = error.message
    parts = [f"operation {operation.id} ({operation.verb}) was given up: {why}"]
    parts.append(f"it stopped at step '{operation.step}', and its changes remain")
    named = (path for path in _named(operation.plan).difference(told_of) if store.layer_at(path) is None)
    if left := sorted(path for path in named if Path(path).exists()):
        parts.append(f"it may have left {', '.join(left)}")
    plan = operation.plan.kept if isinstance(operation.plan, LoadPlan) else operation.plan
    if isinstance(plan, InternalPlan):
        images = ", ".join(layer.path for layer in plan.layers.values())
        parts.append(f"it may have left an internal snapshot {plan.tag} in {images}")
    return "; ".join(parts)


def _named(plan: Plan) -> set[str]:
    """The files of qmpsnap's that a plan names: those it creates or removes, and those it was made from."""
    found: set[str] = set()
    pending = [msgspec.to_builtins(plan)]
    while pending:
        match pending.pop():
            case dict() as fields:
                if fields.get("owned", True):
                    found |= {text for key in ("path", "part") if isinstance(text := fields.get(key), str)}
                pending += fields.values()
            case list() | tuple() as items:
                pending += items
    return found


async def images_alone(context: Context, name: str) -> list[str]:
    """Images of qmpsnap that only this machine reads, or that an earlier operation of it left without a reader."""
    return sorted(layer.path for layer in await _alone(context, name))


async def _alone(context: Context, name: str) -> list[Layer]:
    noted = await blocking(context.store.records.noted, name)
    forest = await context.astore.forest_around(name, *noted)
    folder = f"{context.home.machine_dir(name)}/"

    def is_alone(layer: Layer) -> bool:
        above = forest.machines_above(layer.id)
        return above == {name} or (not above and (layer.path.startswith(folder) or layer.id in noted))

    return [layer for layer in forest.layers.values() if layer.owned and is_alone(layer)]


async def _refuse_loss(context: Context, name: str) -> None:
    owned = await images_alone(context, name)
    snapshots = [snapshot.name for snapshot in await context.astore.snapshots(name)]
    if owned or snapshots:
        raise StateError(
            f"machine {name} has {len(snapshots)} snapshot(s) ({', '.join(snapshots) or 'none'}) and"
            f" {len(owned)} image(s) of its own ({', '.join(owned)})",
            hint="keep the images with "
            + option("disks", "keep")
            + " or delete them with "
            + option("disks", "remove"),
            machine=name,
        )
