"""Adopted machines that qmpsnap launches itself from the next start on."""

# ruff: noqa: F811 - "launched", "daemon" and their "folder" are fixtures

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import QmpsnapError, StateError
from qmpsnap.machine.config.firmware import find_firmware
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.operations.operation import Change
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.live import machine
from tests.live.machine import MIB, hold_invariants
from tests.live.test_adopt import FORMS, Foreign, folder, launched  # noqa: F401
from tests.live.test_adopt_launches import daemon  # noqa: F401
from tests.live.test_dry_runs import everything

SCRIPTED = [
    *("-drive", "file=top.qcow2,format=qcow2,if=none,id=D0,discard=unmap", "-device", "virtio-scsi"),
    *("-device", "scsi-hd,drive=D0", "-drive", "file=data.raw,format=raw,if=none,id=data", "-device", "virtio-rng-pci"),
    *("-device", "virtio-blk,drive=data,id=vdd", "-netdev", "user,id=n"),
    *("-device", "e1000,netdev=n,mac=52:54:00:00:00:05"),
]
"""Of a script: relative paths, another order, and a device that no spec has."""


async def typed(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> tuple[str, str]:
    found = await anyio.to_thread.run_sync(main, line.split())
    told = capsys.readouterr()
    assert found == code, told.err
    return told.out, told.err


async def reads(vm: qmpsnap.MachineHandle, disk: str, *patterns: int) -> None:
    for number, pattern in enumerate(patterns):
        await machine._qemu_io(vm, disk, f"read -P {pattern} {number}M 1M")


@pytest.mark.version
async def test_a_daemon_of_a_script_is_launched_by_us(
    q: qmpsnap.Controller, folder: Path, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "data.raw").write_bytes(b"\5" * MIB)
    # QEMU opens a raw image once more for a snapshot, and a daemon is in another folder by then.
    socket = daemon(folder, *(word.replace("data.raw", f"{folder}/data.raw") for word in SCRIPTED))
    await typed(capsys, f"adopt web --qmp {socket}")
    vm = await q.machine("web")
    await vm.snapshot("s1")
    with pytest.raises(StateError, match="qmpsnap does not launch") as refused:
        await vm.revert("s1")
    assert refused.value.hint.startswith("let qmpsnap launch it: await vm.take(spec=SPEC)")

    text, _ = await typed(capsys, "adopt web --spec")
    assert "- -device virtio-rng-pci" in text
    assert "# Take it: qmpsnap adopt web --take SPEC.yaml\n" in text
    spec = yaml.safe_load(text)
    assert [(disk["name"], disk.get("bus"), disk["image"]) for disk in spec["disks"]] == [
        ("vda", "scsi", str(folder / "top.qcow2")),
        ("vdd", None, str(folder / "data.raw")),
    ]
    assert (spec["nics"][0]["mac"], spec["memory"]) == ("52:54:00:00:00:05", "64M")
    written = folder / "web.yaml"
    written.write_text(text)
    was = everything(folder)
    assert "once process" in (await typed(capsys, f"adopt web --take {written} --dry-run"))[0]
    assert everything(folder) == was
    assert (await vm.record()).adopted.taken is None  # type: ignore[union-attr]
    _, said = await typed(capsys, f"adopt web --take {written}")
    assert "qmpsnap stop web, then qmpsnap start web" in said
    for attempt in (vm.revert("s1"), vm.start()):
        with pytest.raises(StateError):
            await attempt
    assert "its next start has to open" not in (await typed(capsys, "snapshot create web s2"))[1]
    await vm.stop(force=True)

    assert (await vm.record()).adopted is None
    assert not any(file.exists() for file in q.context.home.active("web"))
    await vm.start(paused=True)
    await reads(vm, "vda", 1, 0)
    await reads(vm, "vdd", 5)
    await machine.fill(vm, "vda", 9)
    assert (await vm.revert("s1")).state == "paused"
    await reads(vm, "vda", 1, 0)
    await vm.resume()
    assert (await vm.snapshot("s3", kind="full")).vmstate
    await hold_invariants(vm)
    await vm.delete_snapshots("s2")
    await vm.stop(force=True)
    await hold_invariants(vm)
    with pytest.raises(StateError, match="was not adopted"):
        await vm.launched_as()


class Died(Exception):
    """Instead of a death of the process: nothing that is on its way handles it."""


async def test_a_death_leaves_it_adopted_or_taken(
    q: qmpsnap.Controller, folder: Path, launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    firmware, variables = find_firmware(), folder / "vars.fd"
    variables.write_bytes(Path(firmware.vars).read_bytes())
    flash = [f"unit=0,readonly=on,file={firmware.code}", "unit=1,file=vars.fd"]
    flash = [word for one in flash for word in ("-drive", f"if=pflash,format=raw,{one}")]
    theirs: Foreign = launched([*FORMS["drive"], *flash])
    vm = await q.adopt("theirs", theirs.socket)
    await vm.snapshot("s1")
    proposal = (await vm.launched_as()).spec
    assert (proposal.firmware, proposal.uefi_variables) == ("uefi", str(variables))

    async def dies(act: Awaitable[object], when: str) -> Machine:
        apply = SqliteStore.apply

        def dying(self: SqliteStore, machine: str, change: Change) -> None:
            if when == "after":
                apply(self, machine, change)
            raise Died

        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "apply", dying)
            with pytest.raises(Died):
                await act
        await hold_invariants(vm)
        return await vm.record()

    for when in ("before", "after"):
        adopted = (await dies(vm.take(proposal), when)).adopted
        assert adopted
        assert (adopted.taken is not None) is (when == "after")
    theirs.process.kill()
    theirs.process.wait(10)
    variables.write_bytes(b"\7" * variables.stat().st_size)  # the guest's last words
    for when in ("before", "after"):
        assert ((await dies(vm.snapshot("late"), when)).adopted is None) is (when == "after")
    assert q.context.home.variables("theirs").read_bytes()[:2] == b"\7\7"
    variables.unlink()
    await vm.snapshot("s2")
    await vm.start(paused=True)
    await hold_invariants(vm)
    await vm.stop(force=True)


async def test_only_the_machine_itself_can_be_taken(q: qmpsnap.Controller, launched: Any, folder: Path) -> None:
    theirs: Foreign = launched("drive")
    vm = await q.adopt("theirs", theirs.socket)
    spec = (await vm.launched_as()).spec
    disk = spec.disks[0]
    wrong = {
        "the spec is of machine other": replace(spec, name="other"),
        "with UUID": replace(spec, uuid="5d0b7d5e-6c1e-4b8e-9f5b-3f2d8a3f7c11"),
        "has the disks virtio0, the spec none": replace(spec, disks=()),
        "image of disk virtio0": replace(spec, disks=(replace(disk, image=str(folder / "base.qcow2")),)),
        "own of disk virtio0": replace(spec, disks=(replace(disk, own=True),)),
        "the spec virtio0, vdb": replace(spec, disks=(disk, DiskSpec(name="vdb", size=MIB))),
        "there is no kernel": replace(spec, kernel="/nonexistent"),
        "has 'extra' QEMU arguments": replace(spec, extra=("-device", "virtio-rng-pci")),
    }
    for said, other in wrong.items():
        for attempt in (vm.plan_take(other), vm.take(other)):
            with pytest.raises(QmpsnapError, match=said):
                await attempt
    extra = replace(spec, extra=("-device", "virtio-rng-pci"))
    assert (await vm.apply(await vm.plan_take(extra, allow_extra=True))).waits_for == theirs.process.pid
    await vm.stop(force=True)
    await vm.start(paused=True)
    async with machine.user_monitor(vm) as qemu:
        assert "virtio-rng" in str(await qemu.execute("human-monitor-command", {"command-line": "info qtree"}))
    await vm.stop(force=True)


async def test_one_that_has_ended_needs_a_spec_of_its_owners(q: qmpsnap.Controller, launched: Any) -> None:
    theirs: Foreign = launched("blockdev")
    vm = await q.adopt("theirs", theirs.socket)
    await vm.snapshot("s1")
    spec = (await vm.launched_as()).spec
    await vm.stop(force=True)
    with pytest.raises(StateError, match="has ended, and its command line with it"):
        await vm.launched_as()
    assert (await vm.take(spec)).waits_for is None
    assert (await vm.record()).adopted is None
    await vm.revert("s1")
    await hold_invariants(vm)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("adopt x", "--qmp, --image, --take or --spec is needed"),
        ("adopt x --qmp /s --spec", "--spec needs --image"),
        ("adopt x --qmp /s --allow-extra", "--allow-extra needs --take"),
        ("adopt x --take a.yaml --own", "--own needs --qmp or --image"),
    ],
)
async def test_words_that_do_not_fit(home: Path, capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    assert said in (await typed(capsys, line, 2))[1]
