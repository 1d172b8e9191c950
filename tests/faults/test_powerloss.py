"""The power goes at a step: of every layer only what was flushed is left, of our own files what was fsynced."""

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from msgspec import Struct

import qmpsnap
from qmpsnap.model.operations import steps
from tests.faults import filters, powerloss, site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, Scenario, ready
from tests.harness import watch
from tests.harness.deaths import Point
from tests.live.machine import context_of

FAULT = "power loss at a step"
NAMES = [
    name
    for name, scenario in SCENARIOS.items()
    if scenario.warm is None and not set(scenario.steps) <= scenario.idle
    if scenario.column in ("create", "commit", "stream", "delete", "mirror", "save")
]
SEEDS = (None, 1, 2)


_TELLING = {"N:finalizing", "finalizing:FILE", steps.TRANSACTION}
"""From these on the truth may lie in another layer than before."""


class Case(Struct, frozen=True):
    """Where the power goes, and by what chance something of the rest has come to the disk (None: nothing)."""

    name: str
    step: str
    when: watch.When
    seed: int | None

    def __str__(self) -> str:
        return f"{self.name}-{self.step}-{self.when}-{self.seed}"

    @property
    def short(self) -> bool:
        return self.seed is None and self.step in _TELLING


CASES = [
    Case(name, step, when, seed)
    for name in NAMES
    for step in SCENARIOS[name].steps
    for when in watch.WHEN
    for seed in SEEDS
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=pytest.mark.short if case.short else ()) for case in CASES]
)
async def test_the_power_goes(q: qmpsnap.Controller, place: Path, fault: Fault, case: Case) -> None:
    scenario = SCENARIOS[case.name]
    fault.case(FAULT, scenario.column)
    vm, logs = await _logged(q, scenario, place)
    before = await site.look(vm)
    died = await controller_dies(case.name, place, Point(scenario.verb, case.step, case.when), logs=logs, qemu_too=True)
    assert died.died, died.said
    fault.reached(scenario.verb, case.step)
    powerloss.cut_power(logs, _layers(vm, place), seed=case.seed)
    await site.judge(vm, place, before, scenario.expected)


async def _logged(q: qmpsnap.Controller, scenario: Scenario, place: Path) -> tuple[qmpsnap.MachineHandle, Path]:
    """The machine made ready, with every write to its layers logged from its start on."""
    logs = context_of(qmpsnap.MachineHandle(q.context, site.NAME)).home.data / "logs"
    logs.mkdir()
    with filters.logging(logs):
        return await ready(q, scenario, place), logs


def _layers(vm: qmpsnap.MachineHandle, place: Path) -> dict[str, Path]:
    """Where each layer's file lies, also of those that the store does not have yet, or not any more."""
    context = context_of(vm)
    found = {file.name.partition(".")[0]: file for file in context.home.machine_dir(vm.name).iterdir()}
    found |= {layer.id: Path(layer.path) for layer in context.store.forest().layers.values()}
    logged = {log.name.partition(".")[0] for log in (context.home.data / "logs").glob("*.log")}
    for file in place.iterdir():  # at most one, the layer that was made last
        found[max(logged, key=_serial)] = file
    return {layer: path for layer, path in found.items() if layer in logged}


def _serial(layer: str) -> int:
    return int(layer.partition("-")[2])


# --- every flush boundary -----------------------------------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize("name", NAMES)
async def test_every_flush_leaves_whole_images(q: qmpsnap.Controller, place: Path, fault: Fault, name: str) -> None:
    """The verb comes to its end; each of its flushes is looked at as if the power had gone right after it."""
    scenario = SCENARIOS[name]
    fault.case("power loss at a flush", scenario.column)
    vm, logs = await _logged(q, scenario, place)
    with filters.logging(logs):
        if scenario.start != "stopped" and scenario.column != "save":
            await site.write_live(vm, "vda", 5, offset=5 * 64 * site.KIB)
        if scenario.expected.place != {"state"}:
            await scenario.act(vm, place)
    looked = 0
    for log in logs.glob("*.log"):
        entries = powerloss.read(log)
        for count in powerloss.flushes(entries):
            image = logs / "cut"
            image.write_bytes(powerloss.replay(log.with_suffix(".image").read_bytes(), entries[:count]))
            if image.read_bytes().startswith(b"QFI\xfb"):
                await _require_whole(vm, image)
            looked += 1
    assert looked or scenario.column in ("create", "save", "delete"), "nothing was ever flushed"


async def _require_whole(vm: qmpsnap.MachineHandle, image: Path) -> None:
    file = {"driver": "file", "filename": str(image)}
    alone = "json:" + json.dumps({"driver": "qcow2", "file": file, "backing": None})
    argv = [context_of(vm).image.binary, "check", "-q", alone]
    done = await to_thread.run_sync(lambda: subprocess.run(argv, check=False, capture_output=True))
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: clusters that nobody uses, which harm nobody


# --- our own files ------------------------------------------------------------------------------------------------


class Disk:
    """Which files and names have been written out, in order, as far as our own process did it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.files: dict[tuple[int, int], int] = {}
        self.folders: dict[tuple[int, int], int] = {}
        self.names: dict[str, int] = {}
        self._clock = 0
        real_sync, real_link = os.fsync, os.link

        def fsync(descriptor: int) -> None:
            real_sync(descriptor)
            status = os.fstat(descriptor)
            self._clock += 1
            known = self.folders if stat.S_ISDIR(status.st_mode) else self.files
            known[status.st_dev, status.st_ino] = self._clock

        def link(source: Any, target: Any, **rest: Any) -> None:
            real_link(source, target, **rest)
            self._clock += 1
            self.names[str(target)] = self._clock

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "link", link)

    def problem(self, path: Path) -> str:
        """What of the file would be lost now; empty for nothing."""
        status, folder = path.stat(), path.parent.stat()
        written = self.files.get((status.st_dev, status.st_ino))
        if written is None:
            return f"{path.name} was not written out"
        if self.folders.get((folder.st_dev, folder.st_ino), 0) < self.names.get(str(path), written):
            return f"the name of {path.name} was not written out"
        return ""


FILES = [
    name
    for name, scenario in SCENARIOS.items()
    if scenario.verb in ("create", "revert", "mirror") and name != "save whose place is taken"
]


@pytest.mark.short
@pytest.mark.parametrize("name", FILES)
async def test_files_are_durable_before_the_journal_counts_on_them(
    q: qmpsnap.Controller, place: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scenario = SCENARIOS[name]
    fault.case("files written out in order", scenario.column)
    vm = await ready(q, scenario, place)
    disk = Disk(monkeypatch)
    folders = (context_of(vm).home.machine_dir(vm.name), place)
    there = {file for folder in folders for file in folder.iterdir()}
    problems: list[str] = []
    counting = {steps.TRANSACTION, steps.STOPPING, "started:FILE", steps.SETTLED}

    def hook(verb: str, step: str, when: watch.When) -> None:
        if (verb, when) == (scenario.verb, "before") and step in counting:
            made = {file for folder in folders for file in folder.iterdir()} - there
            mine = [file for file in sorted(made) if step == steps.SETTLED or not file.suffix.endswith(".part")]
            problems.extend(f"{step}: {found}" for file in mine if (found := disk.problem(file)))

    with watch.watching(hook):
        await scenario.act(vm, place)
    assert problems == []
