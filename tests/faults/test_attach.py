"""The controller dies around each step of `disk attach` and `disk detach`: the machine has the disk, or has it not."""

from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.model.operations import steps
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.harness import watch
from tests.harness.deaths import Point
from tests.live.machine import hold_invariants, snapshot_hashes

SCSI = replace(site.TWO, disks=tuple(replace(disk, bus="scsi") for disk in site.TWO.disks))
"""Without a guest that has booted, SCSI disks can be unplugged, PCI devices cannot."""
CASES = [
    (verb, step.name, when)
    for verb in ("disk-attach", "disk-detach")
    for step in steps.STEPS[verb]
    for when in watch.WHEN
]
WITH_QEMU = [("disk-attach", steps.PLUGGING, True), ("disk-detach", steps.UNPLUGGING, False)]
WILL = {"disk-attach": {"vda", "vdb", "vdc"}, "disk-detach": {"vda"}}
HAD = {"vda", "vdb"}


@pytest.mark.short
@pytest.mark.parametrize("case", CASES, ids="-".join)
async def test_killed(q: qmpsnap.Controller, home: Path, fault: Fault, case: tuple[str, str, watch.When]) -> None:
    verb, step, when = case
    fault.case("kill -9: controller", "others")
    vm = await q.define(SCSI)
    await vm.start()
    await _die(vm, home, Point(verb, step, when))
    fault.reached(verb, step)
    disks = {disk.name for disk in (await vm.record()).spec.disks}
    assert disks == (WILL[verb] if step == steps.SETTLED else HAD)
    await vm.snapshot("afterwards", kind="full")
    await vm.revert("before", hardware="snapshot")
    assert {chain.disk for chain in await vm.chains()} == HAD
    await hold_invariants(vm)


@pytest.mark.short
@pytest.mark.parametrize(("verb", "step", "forward"), WITH_QEMU)
async def test_qemu_dies_too(q: qmpsnap.Controller, home: Path, verb: str, step: str, *, forward: bool) -> None:
    vm = await q.define(SCSI)
    await vm.start()
    await _die(vm, home, Point(verb, step, "after"), qemu_too=True)
    assert {disk.name for disk in (await vm.record()).spec.disks} == (WILL[verb] if forward else HAD)
    await vm.start()
    await hold_invariants(vm)


async def _die(vm: qmpsnap.MachineHandle, home: Path, point: Point, *, qemu_too: bool = False) -> None:
    await vm.snapshot("before")
    hashes = await snapshot_hashes(vm)
    died = await controller_dies(point.verb, home, point, qemu_too=qemu_too)
    assert died.died, died.said
    await vm.recover()
    assert [disk.name for disk in (await vm.record()).spec.disks] == [chain.disk for chain in await vm.chains()]
    await hold_invariants(vm, hashes)
    assert (await vm.check()).findings == ()
