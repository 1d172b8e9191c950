"""``set``: a stopped machine gets another spec and keeps its snapshots; memory may need the hardware of its time."""

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.errors import ImageRefused, NameTaken, SpecError, StateError, UsageError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.lifecycle.change import require_changeable
from tests.live.machine import MIB, context_of, hold_invariants

SPEC = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),))


async def _argv(vm: qmpsnap.MachineHandle) -> list[str]:
    process = context_of(vm).process(await vm.record())
    assert process
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode().split("\0")


@pytest.mark.version
async def test_memory_loads_with_the_hardware_of_its_time(q: qmpsnap.Controller) -> None:
    vm = await q.define(SPEC)
    await vm.start()
    small = await vm.snapshot("small", kind="full")
    await vm.stop(force=True)
    would = (await vm.plan_set({"memory": "96M", "cpus": "2", "vda.cache": "none"})).details
    assert [key for key, _, _ in would.changes] == ["cpus", "memory", "vda.cache"]
    assert [name for name, _ in would.unloadable] == ["small"]
    assert (await vm.record()).spec.memory == 64 * MIB
    done = await vm.set({"memory": "96M", "cpus": "2", "vda.cache": "none"})
    assert (done.machine.spec.memory, done.unloadable) == (96 * MIB, would.unloadable)

    with pytest.raises(StateError, match="different virtual hardware") as caught:
        await vm.revert("small")
    assert "hardware" in caught.value.hint
    await vm.start()
    assert {"size=100663296B", "2"} <= set(await _argv(vm))
    large = await vm.snapshot("large", kind="full")

    await vm.revert("small", hardware="snapshot", state="paused")
    record = await vm.record()
    assert (record.spec.memory, record.spec.cpus, record.spec.disks[0].cache) == (64 * MIB, 1, "writeback")
    assert "size=67108864B" in await _argv(vm)
    assert await vm.state() == "paused"
    with pytest.raises(StateError, match="different virtual hardware"):
        await vm.revert("large")
    await vm.revert("large", hardware="snapshot", state="paused")
    assert (await vm.record()).spec.memory == 96 * MIB
    assert (small.hardware and small.hardware.memory, large.hardware and large.hardware.memory) == (
        64 * MIB,
        96 * MIB,
    )
    await vm.stop(force=True)
    await hold_invariants(vm)
    assert (await vm.check()).findings == ()


async def test_a_spec_that_no_snapshot_was_taken_with_is_forgotten(q: qmpsnap.Controller) -> None:
    vm = await q.define(SPEC)
    await vm.set({"memory": "70M"})
    await vm.set({"memory": "80M"})
    assert (await vm.record()).past == ()
    await vm.snapshot("s1")
    await vm.set({"memory": "90M"})
    await vm.set({"memory": "91M"})
    (past,) = (await vm.record()).past
    assert past.spec.memory == 80 * MIB
    await vm.revert("s1", hardware="snapshot")
    assert (await vm.record()).spec.memory == 80 * MIB
    assert await context_of(vm).astore.operations("still", only_open=True) == ()


async def test_a_lost_store_is_rebuilt_with_it(q: qmpsnap.Controller) -> None:
    vm = await q.define(SPEC)
    await vm.snapshot("s1")
    await vm.set({"memory": "90M"})
    record = context_of(vm).store.records.remembered("still")
    assert record
    assert [each.spec.memory for each in record.past] == [64 * MIB]
    assert record.spec.memory == 90 * MIB


WRONG: list[tuple[dict[str, str], type[qmpsnap.QmpsnapError], str]] = [
    ({"memory": "much"}, SpecError, "memory"),
    ({"memroy": "1G"}, SpecError, "did you mean 'memory'"),
    ({"vdx.cache": "none"}, SpecError, "no disk 'vdx'"),
    ({"vda.cache": "nothing"}, SpecError, "one of directsync"),
    ({"vda.size": "2M"}, UsageError, "size of disk vda"),
    ({"vda.name": "vdb"}, UsageError, "has the disks vda"),
    ({"disks": "[]"}, UsageError, "has the disks vda"),
    ({"name": "other"}, UsageError, "not of still"),
    ({"firmware": "uefi"}, UsageError, "firmware"),
    ({"extra": "[-snapshot]"}, UsageError, "extra"),
    ({"profile": "x"}, UsageError, "profile"),
    ({"uuid": "00000000-0000-4000-8000-000000000001"}, UsageError, "UUID"),
    ({"uefi-variables": "/x"}, UsageError, "uefi-variables"),
    ({"memory": "*x"}, SpecError, "aliases"),
    ({"kernel": "/nonexistent/kernel"}, ImageRefused, "there is no kernel /nonexistent/kernel"),
    ({"kernel": "/proc/self/exe", "initrd": "/dev"}, ImageRefused, "initrd /dev is not a file"),
    ({"cdrom": "/nonexistent/x.iso"}, ImageRefused, "/nonexistent/x.iso"),
]


@pytest.mark.parametrize(("settings", "kind", "said"), WRONG, ids=[str(wrong[0]) for wrong in WRONG])
async def test_what_is_refused_changes_nothing(
    q: qmpsnap.Controller, settings: dict[str, str], kind: type[qmpsnap.QmpsnapError], said: str
) -> None:
    vm = await q.define(SPEC)
    before = await vm.record()
    with pytest.raises(kind, match=said):
        await vm.set(settings)
    assert await vm.record() == before


async def test_a_boot_file_that_has_gone_keeps_nobody_from_other_changes(q: qmpsnap.Controller, tmp_path: Path) -> None:
    vm = await q.define(SPEC)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"x")
    await vm.set({"kernel": str(kernel)})
    kernel.unlink()
    assert (await vm.set({"memory": "70M"})).machine.spec.kernel == str(kernel)
    await vm.set({"kernel": ""})
    with pytest.raises(ImageRefused, match="there is no kernel"):
        await vm.set({"kernel": str(kernel)})


@pytest.mark.parametrize("key", ["device", "base", "image"])
def test_a_disk_keeps_what_it_is_made_of(key: str) -> None:
    def of(path: str) -> MachineSpec:
        return replace(SPEC, disks=(msgspec.convert({"name": "vda", key: path}, DiskSpec),))

    with pytest.raises(UsageError, match=f"{key} of disk vda"):
        require_changeable(of("/a"), of("/b"))
    require_changeable(of("/a"), of("/a"))


async def test_the_spec_that_it_was_defined_with_changes_nothing(q: qmpsnap.Controller) -> None:
    spec = replace(SPEC, uuid="00000000-0000-4000-8000-000000000001")
    vm = await q.define(spec)
    assert (await vm.set(spec)).changes == ()
    assert await q.define(spec, exist_ok=True) == vm
    with pytest.raises(NameTaken, match="its UUID is 00000000"):
        await q.define(replace(spec, uuid="00000000-0000-4000-8000-000000000002"), exist_ok=True)


async def test_a_machine_that_runs_is_refused(q: qmpsnap.Controller) -> None:
    vm = await q.define(SPEC)
    await vm.start(paused=True)
    with pytest.raises(StateError, match="runs"):
        await vm.set({"memory": "96M"})


async def test_the_default_cpu_stays_that_of_its_definition(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(SPEC)
    before = (await vm.record()).spec.tcg_cpu
    monkeypatch.setattr("qmpsnap.ops.lifecycle.define._tcg_cpu", lambda *_: "another")
    await vm.set({"memory": "96M"})
    assert (await vm.record()).spec.tcg_cpu == before != ""
    await vm.set({"cpu": "qemu64"})
    assert (await vm.record()).spec.cpu == "qemu64"
