"""Somebody else's process is at the machine's files, before a verb begins or from one of its steps on.

The verdict: we add no damage; what it brought is there with its own bytes; an error's ``effect`` and a success are
true; and what it may write to, or has overwritten, `check` tells.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from msgspec import Struct

import qmpsnap
from qmpsnap.errors import NotFoundError, QmpsnapError
from qmpsnap.model.operations.operation import Merge, MergePlan
from qmpsnap.model.planning import sharing
from tests.faults import claims, outsider, site, verbs
from tests.faults.outsider import KINDS, MAGIC, Absent
from tests.faults.report import COLUMNS, Fault
from tests.faults.scenarios import SCENARIOS, At, Scenario, ready
from tests.harness import watch
from tests.live.conftest import _kill_all_below
from tests.live.machine import context_of

ALL = {name: found for name, found in SCENARIOS.items() if not found.ends} | verbs.VERBS
BEFORE: At = ("", "before")
"""It is there before the verb begins."""


class Case(Struct, frozen=True):
    """A verb, who comes, to which file, and when."""

    name: str
    kind: str
    target: str
    at: At

    def __str__(self) -> str:
        step, when = self.at
        return f"{self.name}-{self.kind}-{self.target}-{f'{when} {step}' if step else 'there before'}"


def _targets(name: str, kind: str, at: At) -> list[str]:
    """Kinds of file that the verb touches and that one can be at, at that moment."""
    scenario = ALL[name]
    if kind == "takes the name":
        return ["name"] if at in (BEFORE, ("planned", "before")) and scenario.column not in ("define", "others") else []
    if KINDS[kind].root:
        return [] if scenario.column == "define" else ["active"]
    if scenario.column == "define":
        return ["image"]
    found = ["active", "frozen"]
    makes = scenario.verb in ("create", "revert", "mirror") and kind != "puts a copy there"  # of what is empty
    if makes and at not in (BEFORE, ("planned", "before")):
        found.append("new")
    remembers = scenario.column in ("create full", "save", "revert") or "full" in name or name == "restore"
    whole = at in (BEFORE, ("planned", "before")) or kind != "puts a copy there"  # of one that QEMU writes to
    if remembers and scenario.start == "running" and whole and not kind.endswith("locked"):
        found.append("memory")
    return found


def _cases() -> list[Case]:
    """Every kind before every verb at every file; then at every step, before and after it and the files in turn."""
    cases = []
    for kind, (name, scenario) in itertools.product(KINDS, ALL.items()):
        cases += [Case(name, kind, target, BEFORE) for target in _targets(name, kind, BEFORE)]
        for place, step in enumerate(scenario.steps, start=len(cases)):
            at = (step, watch.WHEN[place % 2])
            if targets := _targets(name, kind, at):
                cases.append(Case(name, kind, targets[place % len(targets)], at))
    return cases


def _short(cases: list[Case]) -> set[Case]:
    """A third of all pairs of kind and column in turn, and one case of each, of a stopped machine if there is one."""
    chosen: set[Case] = set()
    for (row, kind), (place, column) in itertools.product(enumerate(KINDS), enumerate(COLUMNS)):
        found = [case for case in cases if case.kind == kind and ALL[case.name].column == column]
        found = [case for case in found if ALL[case.name].start == "stopped"] or found
        if KINDS[kind].holds:  # in the middle QEMU's locks keep it out
            found = [case for case in found if case.at == BEFORE] or found
        if found and (row + place) % 3 == 0:
            chosen.add(found[(row * 7 + place * 3) % len(found)])
    return chosen


def _params() -> list[object]:
    cases = _cases()
    short = _short(cases)
    return [pytest.param(case, id=str(case), marks=pytest.mark.short if case in short else ()) for case in cases]


@pytest.fixture
def mounted(home: Path, case: Case) -> Iterator[None]:
    """The machines' folder on a file system of its own, where somebody unmounts or fills it."""
    if not KINDS[case.kind].root:
        yield
        return
    if os.geteuid():
        pytest.skip("only root can mount a file system: this fault is not run")
    size = 24 if ALL[case.name].start != "running" and case.name != "restore" else 200
    with outsider.mounted(home / "machines", home / "mounted", size=size):
        try:
            yield
        finally:
            _kill_all_below(home)


class Visit:
    """The outsider of a case: whether it came, and to which file."""

    def __init__(self, case: Case, vm: qmpsnap.MachineHandle, place: Path, stack: ExitStack) -> None:
        context = context_of(vm)
        self.case, self.kind, self.came, self.absent = case, KINDS[case.kind], False, False
        self.untold = False
        """It came to a file while a job of ours wrote to that: nobody can tell whose bytes are whose."""
        self._vm = vm
        self._stack, self._place = stack, place
        self._folder = context.home.machine_dir(vm.name)
        self._earlier = set(self._files())
        self._room = context.home.data / "theirs"
        self._room.mkdir()
        self.file = self._known(vm)

    def _known(self, vm: qmpsnap.MachineHandle) -> Path | None:
        """The file it goes to; None where it is not there before the verb begins."""
        store = context_of(vm).store
        layers = store.chains(vm.name)[0].layers
        match self.case.target:
            case "active":
                return Path(layers[-1].path)
            case "frozen":
                return Path(layers[0].path)
            case "image":
                return self._place / verbs.IMAGE
            case "memory":
                return next((Path(found.vmstate.path) for found in store.snapshots(vm.name) if found.vmstate), None)
            case "name":
                chosen = next(iter(ALL[self.case.name].expected.place), None)
                return self._place / chosen if chosen else self._folder / f"vda-{store.next_serial()}.qcow2"
        return None

    def _files(self) -> list[Path]:
        return [path for folder in (self._folder, self._place) for path in folder.iterdir() if path.is_file()]

    def _new(self) -> Path:
        """One that the verb has made: an image, or one with memory."""
        for path in sorted(set(self._files()) - self._earlier):
            is_image = path.read_bytes()[:4] == MAGIC
            if is_image == (self.case.target == "new"):
                return path
        raise Absent

    def _require(self, file: Path) -> None:
        if os.path.lexists(file) == (self.case.target == "name"):
            raise Absent

    def come(self) -> None:
        """It does what it does, unless it cannot."""
        if self.came or self.absent:
            return
        try:
            self.file = self.file or self._new()
            self._require(self.file)
            # Before a plan stands, the store is being written to and cannot be asked; nothing of ours writes yet.
            self.untold = self.case.at[0] not in ("", "planned") and str(self.file) in _written_by_ours(self._vm)
            self._stack.enter_context(self.kind.comes(self.file, self._room))
            self.came = True
        except (Absent, FileNotFoundError):
            self.absent = True


def _written_by_ours(vm: qmpsnap.MachineHandle) -> set[str]:
    """The images to which a job of the last operation writes, or has written, by what the journal says."""
    operation = context_of(vm).store.operations(vm.name)[-1:]
    plan = operation[0].plan if operation else None
    if not isinstance(plan, MergePlan):
        return set()
    merges = [step for step in plan.steps if isinstance(step, Merge)]
    return {layer.path for step in merges for layer in sharing.rewritten(step)}


def _readers(vm: qmpsnap.MachineHandle, file: Path | None) -> tuple[frozenset[str], bool]:
    """Names of snapshots that read the file, and whether a guest writes to it."""
    store = context_of(vm).store
    forest = store.forest()
    found = set()
    for snapshot in store.snapshots(vm.name):
        layers = [layer for point in snapshot.points for layer in forest.chain(point.disk, point.layer).layers]
        paths = {layer.path for layer in layers} | ({snapshot.vmstate.path} if snapshot.vmstate else set())
        if str(file) in paths:
            found.add(snapshot.name)
    return frozenset(found), any(chain.active.path == str(file) for chain in store.chains(vm.name))


@pytest.mark.parametrize("case", _params())
@pytest.mark.usefixtures("mounted")
async def test_somebody_else(q: qmpsnap.Controller, place: Path, fault: Fault, case: Case) -> None:
    scenario = ALL[case.name]
    fault.case(f"outsider {case.kind}", scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    with anyio.fail_after(site.WAIT), ExitStack() as stack:
        visit = Visit(case, vm, place, stack)
        spoiled, active = _readers(vm, visit.file)
        known = visit.file  # of one that the verb has made, it is told that it was
        stood = await claims.standing(vm, place, but=known)
        error = await _done(scenario, vm, place, visit)
        if not visit.came:
            fault.too_late()
        else:
            await _told_meanwhile(vm, visit)
        await to_thread.run_sync(stack.close)
    if error:
        # It brings back what it has taken away, also where that is nobody's by then: then nothing of ours was changed.
        brought = known if error.effect == "applied" else known or visit.file
        claims.hold_effect(error, stood, await claims.standing(vm, place, but=brought))
        minds = visit.kind.harmless and visit.came and error.code not in ("refused", "image-used")
        assert not minds, f"nobody may mind that: {error}"
    elif scenario.happened:
        assert await scenario.happened(vm, place), "it says that it was done"
    await _verdict(vm, place, visit, before, spoiled=spoiled, active=active)


async def _done(scenario: Scenario, vm: qmpsnap.MachineHandle, place: Path, visit: Visit) -> QmpsnapError | None:
    """Do the verb; returns the error it ended with. Anything but an error of ours is raised."""
    step, when = visit.case.at

    def hook(verb: str, name: str, moment: watch.When) -> None:
        if (verb, name, moment) == (scenario.verb, step, when):
            visit.come()

    if not step:
        await to_thread.run_sync(visit.come)
    try:
        with watch.watching(hook):
            await scenario.act(vm, place)
    except QmpsnapError as error:
        return error
    return None


async def _told_meanwhile(vm: qmpsnap.MachineHandle, visit: Visit) -> None:
    """While it is there `check` works, and says who may write to an image of a machine that is stopped."""
    async with qmpsnap.open() as q:
        for reader in await q.machines():
            found = await reader.check()
            layers = {layer.path for chain in context_of(reader).store.chains(reader.name) for layer in chain.layers}
            if visit.kind.holds and str(visit.file) in layers and await reader.state() == "stopped":
                codes = [finding.code for finding in found.findings if finding.file == str(visit.file)]
                assert codes, f"{visit.file} is open for writing, and check says nothing of it: {found.findings}"


async def _verdict(
    vm: qmpsnap.MachineHandle,
    place: Path,
    visit: Visit,
    before: site.Before,
    *,
    spoiled: frozenset[str],
    active: bool,
) -> None:
    scenario = ALL[visit.case.name]
    try:
        await vm.record()
    except NotFoundError:
        return
    _take_debris_away(vm, visit)
    with contextlib.suppress(QmpsnapError):
        await site.recover(vm)
        _take_debris_away(vm, visit)
    if visit.kind.root and await vm.is_running():
        await _reopened(vm, before)
    if not (visit.came and visit.kind.spoils):
        await site.judge(vm, place, before, scenario.expected)
        return
    await _hold_the_rest(vm, visit, before, spoiled=spoiled, active=active)


async def _reopened(vm: qmpsnap.MachineHandle, before: site.Before) -> None:
    """QEMU opens a layer that is frozen read-only by its name, and keeps it as it is where that leads nowhere.

    `check` says so; a QEMU that starts opens it right.
    """
    if any(finding.code == "writable-frozen" for finding in (await vm.check()).findings):
        await vm.stop(force=True)
        await vm.start(paused=before.state != "running")


def _take_debris_away(vm: qmpsnap.MachineHandle, visit: Visit) -> None:
    """What it had taken and brought back, and nobody knew of any more by then."""
    store = context_of(vm).store
    if visit.file is None or store.operations(vm.name, only_open=True):
        return
    known = {layer.path for layer in store.forest().layers.values()}
    known |= {found.vmstate.path for found in store.snapshots(vm.name) if found.vmstate}
    if str(visit.file) not in known and visit.case.target != "image":
        visit.file.unlink(missing_ok=True)


async def _hold_the_rest(
    vm: qmpsnap.MachineHandle, visit: Visit, before: site.Before, *, spoiled: frozenset[str], active: bool
) -> None:
    """What does not read the file that was spoiled is as it was; `check` tells of that file, and nothing is stuck."""
    scenario = ALL[visit.case.name]
    pending = ""
    try:
        await site.recover(vm)
    except QmpsnapError as error:
        pending = error.message
    snapshots = {snapshot.name: snapshot for snapshot in await vm.snapshots()}
    ok = {name for name, snapshot in snapshots.items() if snapshot.state == "ok"}
    lost = {name for name, _ in before.hashes} - ok - scenario.expected.loses - spoiled
    assert not lost, f"I1: {lost} are gone, which nobody asked for"
    now = await site._snapshot_hashes(vm, but=spoiled | (ok - {name for name, _ in before.hashes}))
    changed = {key for key, seen in before.hashes.items() if key in now and now[key] != seen}
    assert not changed, f"I1: {changed} do not read as they did"
    findings = (await vm.check()).findings
    theirs = {str(visit.file), re.sub(r"(\.\d+|\.qs-[0-9a-f]+-\d+)\.part$", "", str(visit.file))}
    strange = [
        finding
        for finding in findings
        if finding.file not in theirs
        and not (finding.code == "operation-open" and pending)
        # A commit makes its base as long as the layer that it has been told to.
        and not (finding.code == "size-differs" and visit.case.kind == "resizes")
    ]
    assert not strange, strange
    layers = {layer.path for layer in context_of(vm).store.forest().layers.values()}
    if str(visit.file) in layers and not active and spoiled and not visit.untold:
        assert findings, f"{visit.file} was overwritten, and check says nothing of it"
    if await vm.is_running():
        await vm.stop(force=True)
    await vm.undefine(disks="keep")
