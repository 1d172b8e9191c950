"""The verbs as faults meet them: how the machine is made ready, what is done, and by which steps it comes."""

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec import Struct
from msgspec.structs import replace

import qmpsnap
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.operations import steps
from qmpsnap.ops.base import volumes
from qmpsnap.qmp import jobs
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.volumes.names import of_path
from tests.faults import site
from tests.faults.site import KIB, ONE, TWO, WITH_TPM, Expected
from tests.harness.watch import WHEN, When
from tests.live.machine import fill
from tests.volumes import copying

Act = Callable[[qmpsnap.MachineHandle, Path], Awaitable[object]]
"""Does the verb; the path is a folder where users keep images of their own."""

Happened = Callable[[qmpsnap.MachineHandle, Path], Awaitable[bool]]
"""Whether the verb has come to its end, or leaves no trace."""

Start = Literal["stopped", "paused", "running"]


At = tuple[str, When]
"""A step, and whether it is about to become durable or just has."""

NEVER: At = ("", "after")


class Scenario(Struct, frozen=True, kw_only=True):
    """One verb in one form.

    Attributes:
        column: the verb as the table and its users call it.
        verb: the operation's verb in the journal.
        start: how the machine is left before the verb.
        without: steps of the registry that this form does not come by.
        idle: steps around which no QEMU of the machine lives, so that none can die.
        prepare: what is done before, the machine stopped with the snapshots s1 and s2.
        warm: what is done before, the machine running.
        first: bytes in the lowest layer.
        ends: the error that it ends with when nothing disturbs it.
        happened: tells whether it was done; None where that is not one thing.
        again: what was undone has to be possible once more, under the same name.
        forward: where there is only forward from: when the controller dies and QEMU lives, and when QEMU dies.
        outlives: from where it comes to its end although QEMU dies under a controller that lives.
    """

    column: str
    verb: str
    act: Act
    spec: MachineSpec = ONE
    start: Start = "stopped"
    without: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    expected: Expected = Expected()
    prepare: Act | None = None
    warm: Act | None = None
    first: int = 64 * KIB
    ends: str = ""
    happened: Happened | None = None
    again: bool = False
    forward: tuple[At, At] = (NEVER, NEVER)
    outlives: At = NEVER

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps it comes by, in order."""
        return tuple(step.name for step in steps.STEPS.get(self.verb, ()) if step.name not in self.without)

    def goes_forward(self, at: tuple[str, str], *, dies: Literal["controller", "both", "QEMU"]) -> bool:
        """Whether recovery has to finish what died there; else it has to undo it."""
        points: list[tuple[str, str]] = [(step, when) for step in self.steps for when in WHEN]
        first = self.forward[dies != "controller"]
        if dies == "QEMU" and self.outlives != NEVER:
            first = self.outlives
        return first in points and points.index(at) >= points.index(first)


async def ended(scenario: Scenario, vm: qmpsnap.MachineHandle, place: Path, *, forward: bool) -> None:
    """Raises what is violated: it must have been done, or undone; what was undone can be done again."""
    assert not any(chain.layers[-1].layer.state == "shield" for chain in await vm.chains()), "an overlay is left"
    if not scenario.happened:
        return
    assert await scenario.happened(vm, place) == forward, f"it must go {'forward' if forward else 'back'}"
    if scenario.again and not forward:
        await scenario.act(vm, place)
        await ended(scenario, vm, place, forward=True)


async def ready(q: qmpsnap.Controller, scenario: Scenario, place: Path) -> qmpsnap.MachineHandle:
    """The machine of a scenario, made ready."""
    vm = await q.define(scenario.spec)
    await site.grow(vm, "s1", "s2", first=scenario.first)
    if scenario.prepare:
        await scenario.prepare(vm, place)
    if scenario.start != "stopped":
        await vm.start(paused=scenario.start == "paused")
    if scenario.warm:
        await scenario.warm(vm, place)
    return vm


# --- what is done ---------------------------------------------------------------------------------------------------


async def _snapshot(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("new")


async def _snapshot_by_sync(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("new", by="blockdev-snapshot-sync")


async def _snapshot_in_chosen_file(vm: qmpsnap.MachineHandle, place: Path) -> object:
    return await vm.snapshot("new", files={"vda": place / "new"})


async def _full(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("new", kind="full")


async def _full_in_chosen_file(vm: qmpsnap.MachineHandle, place: Path) -> object:
    return await vm.snapshot("new", kind="full", files={"vda": place / "new"})


def _by_storage(act: Act) -> Act:
    """The same on any file system."""

    async def acting(vm: qmpsnap.MachineHandle, place: Path) -> object:
        with copying.everywhere():
            return await act(vm, place)

    return acting


@_by_storage
async def _volume(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("new", kind="volume")


@_by_storage
async def _volume_of_a_writing_guest(vm: qmpsnap.MachineHandle, _: Path) -> object:
    """While the storage works the guest writes what is there already, so that the commit has something to copy."""
    real = volumes.make

    async def make(*arguments: Any) -> Any:
        with contextlib.suppress(AssertionError):  # the write itself has met the fault
            await fill(vm, "vda", 3, offset=3 * 64 * KIB, length=64 * KIB)
        return await real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "make", make)
        return await vm.snapshot("new", kind="volume")


@_by_storage
async def _full_volume(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("new", kind="full", volume=True)


@_by_storage
async def _volume_before(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.snapshot("before", kind="volume")
    await site.write_live(vm, "vda", 9, offset=9 * 64 * KIB)


@_by_storage
async def _revert_to_volume(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.revert("before")


async def _delete_volume(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.delete_snapshots("before")


async def _save(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.save()


async def _save_whose_place_is_taken(vm: qmpsnap.MachineHandle, place: Path) -> object:
    def stranger(_: JobInfo) -> None:
        (place / "state").write_bytes(b"somebody else's")

    return await vm.save(place / "state", report=stranger)


async def _internal(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("new", kind="internal")


async def _savevm(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("new", kind="internal", by="savevm")


async def _loadvm(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.revert("before", by="loadvm", after=False)


async def _internal_disks(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("new", kind="internal", memory=False)


async def _full_before(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.snapshot("before", kind="full")
    await site.write_live(vm, "vda", 9, offset=9 * 64 * KIB)


async def _internal_before(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.snapshot("before", kind="internal")
    await site.write_live(vm, "vda", 9, offset=9 * 64 * KIB)


async def _internal_below(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.snapshot("before", kind="internal")
    await vm.snapshot("s3")
    await site.write_live(vm, "vda", 9, offset=9 * 64 * KIB)


async def _revert(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.revert("s1")


async def _revert_and_discard(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.revert("s1", discard=True)


async def _revert_to_memory(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.revert("before", after=False)


async def _load(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.revert("before", discard=True, after=False)


async def _commit_middle(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.commit("vda", base="s1", top="s2", consume=True)


async def _commit_active(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.commit("vda", base="s2", consume=True)


async def _stream(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.stream("vda", base="s1")


async def _delete(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.delete_snapshots("s1")


async def _delvm(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.delete_snapshots("before", by="delvm")


async def _delete_two(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.delete_snapshots("before", "s2")


async def branch(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.revert("s2")


async def _delete_leaf(vm: qmpsnap.MachineHandle, _: Path) -> object:
    leaf = next(found.name for found in await vm.snapshots() if found.name.startswith("auto-"))
    return await vm.delete_snapshots(leaf)


async def _pivot(vm: qmpsnap.MachineHandle, place: Path) -> object:
    return await vm.mirror("vda", place / "copy", mode="pivot")


async def _pivot_by_drive_mirror(vm: qmpsnap.MachineHandle, place: Path) -> object:
    return await vm.mirror("vda", place / "copy", mode="pivot", by="drive-mirror")


async def _pivot_shallow(vm: qmpsnap.MachineHandle, place: Path) -> object:
    return await vm.mirror("vda", place / "copy", mode="pivot", shallow=True)


async def _finish(vm: qmpsnap.MachineHandle, place: Path) -> object:
    return await vm.mirror("vda", place / "copy", mode="finish")


def _held(act: Act) -> Act:
    """The same in a QEMU that is taken for one whose mirrors miss writes while they begin."""

    async def misses_first_writes(_: object) -> bool:
        return True

    async def acting(vm: qmpsnap.MachineHandle, place: Path) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jobs, "misses_first_writes", misses_first_writes)
            return await act(vm, place)

    return acting


# --- whether it was done --------------------------------------------------------------------------------------------


async def _taken(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return any(found.name == "new" or found.name.startswith("saved-") for found in await vm.snapshots())


async def _gone_back(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return (await vm.record()).current in ("s1", "before")


async def _on_a_clone(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    name = of_path((await vm.chains())[0].layers[-1].layer.path)
    return name is not None and name.role == "clone"


async def _shorter(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return len((await vm.chains())[0].layers) < 3


async def _copied(vm: qmpsnap.MachineHandle, place: Path) -> bool:
    return (place / "copy").exists()


# --- scenarios ------------------------------------------------------------------------------------------------------

_BY_VOLUME = frozenset({steps.SAVING, steps.LOST, steps.ENDING})
_NO_MEMORY = _BY_VOLUME | {steps.CLONING}
_NO_SAVE = frozenset({steps.CLONING, steps.LOST, steps.ENDING})
_LOADS = Expected(goes_to="before", ends=True)
_LOSES = {name: Expected(loses=frozenset({name})) for name in ("s1", "s2")}
_COPY = Expected(place=frozenset({"copy"}))
_WORKER = frozenset({steps.PLANNED, steps.SETTLED})
_ENDED = frozenset({steps.SWITCHED, steps.STARTING})
_NO_MERGING = frozenset({steps.MERGING})
"""Of reverts: only thick LVM has that step, see test_merging.py."""
_ALL = frozenset(step.name for found in steps.STEPS.values() for step in found)
_UNDONE = frozenset({steps.UNDONE})
_MIRRORED: tuple[At, At] = (("finalizing:FILE", "before"), ("finalizing:FILE", "after"))
_IN_QEMU_AND_IN_A_WORKER: tuple[Start, ...] = ("paused", "stopped")


def _merge(column: str, act: Act, expected: Expected, *, first: int = 64 * KIB) -> dict[str, Scenario]:
    """A merge in the machine's QEMU and in a worker."""
    forms: dict[str, Scenario] = {}
    for start in _IN_QEMU_AND_IN_A_WORKER:
        forms[start] = Scenario(
            column=column,
            verb=column,
            act=act,
            start=start,
            without=_UNDONE,
            idle=_WORKER if start == "stopped" else frozenset(),
            expected=expected,
            first=first,
            happened=_shorter,
            forward=(("N:finalizing", "before"), ("N:finalizing", "after")),
        )
    return forms


def _mirror(act: Act) -> dict[str, Scenario]:
    return {
        start: Scenario(
            column="mirror",
            verb="mirror",
            act=act,
            start=start,
            idle=_WORKER if start == "stopped" else frozenset(),
            expected=_COPY,
            happened=_copied,
            forward=_MIRRORED,
        )
        for start in _IN_QEMU_AND_IN_A_WORKER
    }


def _running(name: str, forms: dict[str, Scenario]) -> dict[str, Scenario]:
    """The form in the machine's QEMU once more, the guest running and held for the start of the job."""
    paused = forms["paused"]
    return {f"{name}, running": replace(paused, start="running", act=_held(paused.act))}


def _named(name: str, forms: dict[str, Scenario]) -> dict[str, Scenario]:
    return {f"{name}, {start}": scenario for start, scenario in forms.items()}


def _resized(start: Start, disk: str) -> Scenario:
    async def resize(vm: qmpsnap.MachineHandle, _: Path) -> object:
        return await vm.resize(disk, "+1M")

    async def is_larger(vm: qmpsnap.MachineHandle, _: Path) -> bool:
        layers = next(chain.layers for chain in await vm.chains(disk))
        return layers[-1].layer.virtual_size > layers[0].layer.virtual_size

    return Scenario(
        column="resize",
        verb="resize",
        act=resize,
        spec=TWO,
        start=start,
        idle=_WORKER if start == "stopped" else frozenset(),
        happened=is_larger,
        again=True,
        forward=((steps.SETTLED, "before"), (steps.SETTLED, "before")),
    )


SCENARIOS: dict[str, Scenario] = {
    "create, paused": Scenario(
        column="create",
        verb="create",
        act=_snapshot,
        spec=TWO,
        start="paused",
        without=_NO_MEMORY,
        happened=_taken,
        forward=((steps.SETTLED, "before"), (steps.TRANSACTION, "after")),
    ),
    "create beside a TPM, paused": Scenario(
        column="create",
        verb="create",
        act=_snapshot,
        spec=WITH_TPM,
        start="paused",
        without=_NO_MEMORY,
        happened=_taken,
        forward=((steps.SETTLED, "before"), (steps.TRANSACTION, "after")),
    ),
    "create by blockdev-snapshot-sync, paused": Scenario(
        column="create",
        verb="create",
        act=_snapshot_by_sync,
        spec=TWO,
        start="paused",
        without=_NO_MEMORY,
        happened=_taken,
        forward=((steps.SETTLED, "before"), (steps.TRANSACTION, "after")),
    ),
    "create, stopped": Scenario(
        column="create",
        verb="create",
        act=_snapshot,
        spec=TWO,
        without=_NO_MEMORY | {steps.TRANSACTION},
        idle=_ALL,
        happened=_taken,
        forward=((steps.SETTLED, "after"), (steps.SETTLED, "after")),
    ),
    "create in a chosen file, paused": Scenario(
        column="create",
        verb="create",
        act=_snapshot_in_chosen_file,
        start="paused",
        without=_NO_MEMORY,
        expected=Expected(place=frozenset({"new"})),
        happened=_taken,
        forward=((steps.SETTLED, "before"), (steps.TRANSACTION, "after")),
    ),
    "create in a chosen file, stopped": Scenario(
        column="create",
        verb="create",
        act=_snapshot_in_chosen_file,
        without=_NO_MEMORY,
        idle=_ALL,
        expected=Expected(place=frozenset({"new"})),
        happened=_taken,
        forward=((steps.TRANSACTION, "after"), (steps.TRANSACTION, "after")),
    ),
    "create full": Scenario(
        column="create full",
        verb="create",
        act=_full,
        spec=TWO,
        start="running",
        without=_NO_SAVE,
        happened=_taken,
        forward=((steps.SAVING, "before"), (steps.SETTLED, "before")),
    ),
    "create full in a chosen file": Scenario(
        column="create full",
        verb="create",
        act=_full_in_chosen_file,
        start="running",
        without=_NO_SAVE,
        expected=Expected(place=frozenset({"new"})),
        happened=_taken,
        forward=((steps.SAVING, "before"), (steps.SETTLED, "before")),
    ),
    "save": Scenario(
        column="save",
        verb="create",
        act=_save,
        start="running",
        without=frozenset({steps.CLONING, steps.LOST}),
        idle=frozenset({steps.SETTLED}),
        expected=Expected(ends=True),
        happened=_taken,
        forward=((steps.SAVING, "before"), (steps.ENDING, "before")),
    ),
    "save whose place is taken": Scenario(
        column="save",
        verb="create",
        act=_save_whose_place_is_taken,
        start="running",
        without=frozenset({steps.CLONING, steps.ENDING}),
        expected=Expected(place=frozenset({"state"})),
        ends="refused",
    ),
    "create by volume, paused": Scenario(
        column="create",
        verb="create",
        act=_volume,
        spec=TWO,
        start="paused",
        without=_BY_VOLUME,
        happened=_taken,
        again=True,
        forward=((steps.SETTLED, "before"), (steps.SETTLED, "before")),
        outlives=(steps.CLONING, "before"),
    ),
    "create by volume, stopped": Scenario(
        column="create",
        verb="create",
        act=_volume,
        spec=TWO,
        without=_BY_VOLUME | {steps.TRANSACTION},
        idle=_ALL,
        happened=_taken,
        again=True,
        forward=((steps.SETTLED, "before"), (steps.SETTLED, "before")),
    ),
    "commit after a snapshot by volume": Scenario(
        column="create",
        verb="commit",
        act=_volume_of_a_writing_guest,
        spec=TWO,
        start="paused",
        without=_UNDONE,
        happened=_taken,
        forward=((steps.PLANNED, "before"), (steps.PLANNED, "before")),
    ),
    "create full by volume": Scenario(
        column="create full",
        verb="create",
        act=_full_volume,
        spec=TWO,
        start="running",
        without=frozenset({steps.LOST, steps.ENDING}),
        happened=_taken,
        forward=((steps.SETTLED, "before"), (steps.SETTLED, "before")),
        outlives=(steps.CLONING, "before"),
    ),
    "revert to a volume": Scenario(
        column="revert",
        verb="revert",
        without=_NO_MERGING,
        act=_revert_to_volume,
        spec=TWO,
        start="paused",
        warm=_volume_before,
        idle=_ENDED,
        expected=_LOADS,
        happened=_on_a_clone,
        forward=((steps.STOPPING, "after"), (steps.STOPPING, "after")),
    ),
    "delete of a volume": Scenario(
        column="delete",
        verb="delete",
        act=_delete_volume,
        spec=TWO,
        start="paused",
        warm=_volume_before,
        without=_UNDONE | {"N:started", "N:finalizing"},
        expected=Expected(loses=frozenset({"before"})),
    ),
    "create internal": Scenario(
        column="create internal",
        verb="internal",
        act=_internal,
        spec=TWO,
        start="running",
        happened=_taken,
        forward=((steps.RECORDED, "before"), (steps.RECORDED, "before")),
    ),
    "create internal by savevm": Scenario(
        column="create internal",
        verb="internal",
        act=_savevm,
        start="running",
        happened=_taken,
        forward=((steps.RECORDED, "before"), (steps.RECORDED, "before")),
    ),
    "create internal without memory": Scenario(
        column="create internal",
        verb="internal",
        act=_internal_disks,
        spec=TWO,
        start="paused",
        happened=_taken,
        forward=((steps.RECORDED, "before"), (steps.RECORDED, "before")),
    ),
    "create internal, stopped": Scenario(
        column="create internal",
        verb="internal",
        act=_internal_disks,
        spec=TWO,
        idle=_ALL,
        happened=_taken,
        again=True,
        forward=((steps.RECORDED, "before"), (steps.RECORDED, "before")),
    ),
    "revert, paused": Scenario(
        column="revert",
        verb="revert",
        without=_NO_MERGING,
        act=_revert,
        spec=TWO,
        start="paused",
        idle=_ENDED,
        expected=Expected(goes_to="s1", ends=True),
        happened=_gone_back,
        forward=((steps.STOPPING, "after"), (steps.STOPPING, "after")),
    ),
    "revert beside a TPM, paused": Scenario(
        column="revert",
        verb="revert",
        without=_NO_MERGING,
        act=_revert,
        spec=WITH_TPM,
        start="paused",
        idle=_ENDED,
        expected=Expected(goes_to="s1", ends=True),
        happened=_gone_back,
        forward=((steps.STOPPING, "after"), (steps.STOPPING, "after")),
    ),
    "revert, stopped": Scenario(
        column="revert",
        verb="revert",
        act=_revert_and_discard,
        without=_NO_MERGING | {steps.STARTING},
        idle=_ALL,
        expected=Expected(goes_to="s1", ends=True),
        happened=_gone_back,
        forward=((steps.STOPPING, "after"), (steps.STOPPING, "after")),
    ),
    "revert to memory": Scenario(
        column="revert",
        verb="revert",
        without=_NO_MERGING,
        act=_revert_to_memory,
        start="running",
        warm=_full_before,
        idle=_ENDED,
        expected=_LOADS,
    ),
    "revert to memory inside": Scenario(
        column="revert",
        verb="revert",
        without=_NO_MERGING,
        act=_revert_to_memory,
        start="running",
        warm=_internal_below,
        idle=_ENDED,
        expected=_LOADS,
        happened=_gone_back,
        forward=((steps.STOPPING, "after"), (steps.STOPPING, "after")),
    ),
    "revert in place": Scenario(
        column="revert", verb="load", act=_revert_to_memory, start="running", warm=_internal_before, expected=_LOADS
    ),
    "revert in place by loadvm": Scenario(
        column="revert", verb="load", act=_loadvm, start="running", warm=_internal_before, expected=_LOADS
    ),
    "revert in place, discarding": Scenario(
        column="revert",
        verb="load",
        act=_load,
        start="running",
        warm=_internal_before,
        without=frozenset({steps.KEEPING}),
        expected=_LOADS,
    ),
    **_named("commit of a middle layer", _merge("commit", _commit_middle, _LOSES["s1"])),
    **_named("commit of the active layer", _merge("commit", _commit_active, _LOSES["s2"])),
    **_running("commit of the active layer", _merge("commit", _commit_active, _LOSES["s2"])),
    **_named("stream", _merge("stream", _stream, Expected())),
    **_named("delete upwards", _merge("delete", _delete, _LOSES["s1"])),
    **_named("delete downwards", _merge("delete", _delete, _LOSES["s1"], first=1024 * KIB)),
    "delete of a leaf": Scenario(
        column="delete",
        verb="delete",
        act=_delete_leaf,
        prepare=branch,
        without=_UNDONE | {"N:started", "N:finalizing"},
        idle=_ALL,
        expected=Expected(loses=frozenset({"auto-4"})),
    ),
    "delete by delvm": Scenario(
        column="delete",
        verb="delete",
        act=_delvm,
        start="running",
        warm=_internal_before,
        without=_UNDONE | {"N:started", "N:finalizing"},
        expected=Expected(loses=frozenset({"before"})),
    ),
    "delete of a full and another": Scenario(
        column="delete",
        verb="delete",
        act=_delete_two,
        start="running",
        warm=_full_before,
        without=_UNDONE,
        expected=Expected(loses=frozenset({"before", "s2"})),
    ),
    **_named("mirror, pivot", _mirror(_pivot)),
    **_named("mirror, finish", _mirror(_finish)),
    **_running("mirror, pivot", _mirror(_pivot)),
    "mirror by drive-mirror, pivot, paused": _mirror(_pivot_by_drive_mirror)["paused"],
    "resize, running": _resized("running", "vda"),
    "resize, stopped": _resized("stopped", "vdb"),
    "mirror, shallow pivot": Scenario(
        column="mirror",
        verb="mirror",
        act=_pivot_shallow,
        start="paused",
        expected=_COPY,
        happened=_copied,
        forward=_MIRRORED,
    ),
}
