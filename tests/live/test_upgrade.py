"""A guest's memory outlives the QEMU that saved it: the CPU is the same with each later one."""

import json
import os
from pathlib import Path

import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import QemuGone, StateError
from qmpsnap.model.home import Home
from qmpsnap.model.layers.vmstate import version_of
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.lifecycle import define
from tests.live.booted import start_booted
from tests.live.machine import ONE_DISK, hold_invariants

LATER = ("10.0", "11.1")
COUNT = """
cat >/run/count <<'END'
i=0
while :; do i=$((i + 1)); echo $i >/run/count.new; mv /run/count.new /run/count.now; done
END
setsid sh /run/count >/dev/null 2>&1 </dev/null &
dd if=/dev/urandom of=/dev/shm/kept bs=1M count=8 2>/dev/null
sha256sum </dev/shm/kept >/dev/shm/sum
"""


@pytest.fixture(scope="module")
def later() -> dict[str, Path]:
    """The newer QEMUs that scripts/qemu-matrix has fetched; the test begins with the system's."""
    if os.environ.get("QMPSNAP_QEMU"):
        pytest.skip("it begins with the system's QEMU")
    cache = Home.from_environment({"HOME": os.environ.get("HOME", "/")}, uid=os.geteuid()).cache / "qemu"
    found = {version: cache / version / "bin" for version in LATER}
    if missing := [version for version, folder in found.items() if not (folder / "qemu-system-x86_64").is_file()]:
        message = f"QEMU {', '.join(missing)} is not fetched: scripts/qemu-matrix does it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMPSNAP_QEMU", str(folder / "qemu-system-x86_64"))
    monkeypatch.setenv("QMPSNAP_QEMU_IMG", str(folder / "qemu-img"))


async def say(vm: qmpsnap.MachineHandle, command: str) -> str:
    return (await vm.run(command)).stdout.strip()


async def test_memory_goes_from_one_qemu_to_the_next(
    home: Path, guest_spec: MachineSpec, later: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with qmpsnap.open(home) as q:
        vm = await q.define(guest_spec)
        await start_booted(vm)
        await vm.run(COUNT)
        flags = await say(vm, "grep -m1 ^flags /proc/cpuinfo")
        await vm.snapshot("first", kind="full")
        await vm.save(name="saved")
    for version, folder in later.items():
        use(folder, monkeypatch)
        async with qmpsnap.open(home) as q:
            vm = await q.machine(guest_spec.name)
            await vm.restore()
            assert vm_version(await vm.record()) == version
            before = int(await say(vm, "cat /run/count.now"))
            while int(await say(vm, "cat /run/count.now || echo 0") or 0) <= before:  # it goes on where it was
                pass
            assert await say(vm, "sha256sum </dev/shm/kept") == await say(vm, "cat /dev/shm/sum")
            assert await say(vm, "grep -m1 ^flags /proc/cpuinfo") == flags
            await vm.save(name=f"saved-{version.replace('.', '-')}")
    async with qmpsnap.open(home) as q:  # and what the first one saved, with the last one
        vm = await q.machine(guest_spec.name)
        await vm.revert("first", discard=True)
        assert await say(vm, "sha256sum </dev/shm/kept") == await say(vm, "cat /dev/shm/sum")
        # A guest that boots now finds the CPU that it had.
        await vm.stop(force=True)
        await vm.start()
        assert await say(vm, "grep -m1 ^flags /proc/cpuinfo") == flags
        await vm.stop(force=True)
        await hold_invariants(vm)


def vm_version(machine: Machine) -> str:
    assert machine.process
    return ".".join(map(str, version_of(machine.process.qemu_version)[:2]))


async def test_memory_of_a_machine_of_an_earlier_release_is_said_to_be_this_versions(
    home: Path, later: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(define, "_tcg_cpu", lambda *_: "")
    async with qmpsnap.open(home) as q:
        vm = await q.define(ONE_DISK)
        await vm.start()
    for words in (["snapshot", "create", vm.name, "full", "--kind", "full"], ["save", vm.name, "--name", "saved"]):
        code = await to_thread.run_sync(main, [*words, "-o", "json"])
        said = capsys.readouterr()
        (note,) = json.loads(said.out)["notes"]
        assert (code, note) == (0, "only QEMU 7.2 can load this memory: other versions have another CPU max")
        assert note in said.err
    use(later["10.0"], monkeypatch)
    async with qmpsnap.open(home) as q:
        vm = await q.machine(vm.name)
        with pytest.raises(StateError, match=r"CPU max of QEMU 7\.2\.\d+, now of 10\.0"):
            await vm.restore()


async def test_a_qemu_that_lacks_a_recorded_feature_loads_no_memory(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = define._tcg_cpu
    monkeypatch.setattr(define, "_tcg_cpu", lambda *given: f"{recorded(*given)},avx512f=on")  # TCG has no AVX-512
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    await vm.save()
    with pytest.raises(QemuGone, match="TCG doesn't support requested feature"):
        await vm.restore()
    assert not await vm.is_running()
    await vm.start(paused=True)  # a boot does without it
