"""``--dry-run`` of every changing verb: it tells what the verb then does, and nothing has changed, not even a time."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.cli.command_line import parser
from qmpsnap.cli.main import main
from qmpsnap.errors import LockHeld, OperationPending
from qmpsnap.model.home import RECORD
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations.operation import Change, CreatePlan
from qmpsnap.ops.base.context import locked
from tests.cli.test_help import LEAVES
from tests.live.machine import MIB, context_of
from tests.store.samples import journalled

SPEC = "name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}, {name: vdb, size: 1M}]\n"
NO_CHANGE = frozenset(
    {
        *(
            "doctor",
            "demo",
            "list",
            "show",
            "start",
            "stop",
            "pause",
            "resume",
            "wakeup",
            "console",
            "exec",
            "fstrim",
            "recover",
        ),
        *("tree", "chain", "check", "log", "snapshot list", "snapshot show", "job list"),
        *("job wait", "job cancel", "job set-speed"),
        "template list",
        "machine export",
    }
)
"""What reads, or changes the state of a guest or of an operation, but no layer, snapshot or machine."""


def everything(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its inode, size and last change; of SQLite's own what only readers leave is not."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        if not path.name.endswith(("-wal", "-shm")):
            status = path.lstat()
            found[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    del found[str(folder)]  # SQLite makes and removes its own in it
    return found


def images(folder: Path) -> set[str]:
    return {str(path) for path in folder.iterdir() if path.name != RECORD}


def told(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> Any:
    found = main(line.split())
    out, err = capsys.readouterr()
    assert found == code, err
    return json.loads(out) if "json" in line else out


def dry(capsys: pytest.CaptureFixture[str], home: Path, line: str) -> Any:
    """The JSON of a dry run after which all is as before; its table says so, too."""
    before = everything(home)
    assert "nothing was changed" in (text := told(capsys, f"{line} --dry-run")) or "would" in text
    found = told(capsys, f"{line} --dry-run -o json")
    assert everything(home) == before
    return found


def test_every_verb_that_changes_something_has_one() -> None:
    def options(command: argparse.ArgumentParser) -> set[str]:
        return {option for action in command._actions for option in action.option_strings}

    assert {name for name, command in LEAVES.items() if "--dry-run" not in options(command)} == NO_CHANGE
    assert parser().prog == "qmpsnap"


def test_a_machine_s_life(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "s.yaml"
    spec.write_text(SPEC)
    home.rmdir()
    assert "would define machine still" in told(capsys, f"define {spec} --dry-run")
    would = told(capsys, f"define {spec} --dry-run -o json")
    assert not home.exists()
    home.mkdir()
    assert told(capsys, f"define {spec} -o json")["machine_type"] == would["machine_type"]
    folder = home / "machines" / "still"
    assert {file["create"] for file in would["files"]} == images(folder)
    assert main(["define", str(spec), "--dry-run"]) == 4
    capsys.readouterr()

    pushed = dry(capsys, home, "snapshot push still mine")
    assert told(capsys, "snapshot push still mine -o json")["snapshot"]["name"] == pushed["snapshot"] == "mine"
    assert all(Path(file["create"]).exists() for file in pushed["files"])
    renamed = dry(capsys, home, "snapshot rename still mine yours")
    assert (renamed["old"], renamed["snapshot"]) == ("mine", "yours")
    assert main(["snapshot", "rename", "still", "none", "yours", "--dry-run"]) == 3
    assert told(capsys, "snapshot rename still mine yours") == ""  # it is told on stderr
    popped = dry(capsys, home, "snapshot pop still")
    before = set(folder.iterdir())
    assert told(capsys, "snapshot pop still --progress none -o json")["snapshot"] == popped["snapshot"] == "yours"
    assert popped["deleted"] == ["yours"]
    assert {str(path) for path in before - set(folder.iterdir())} <= set(popped["removed"])

    would = dry(capsys, home, "set still memory=80M vda.cache=none")
    assert [each["key"] for each in would["changes"]] == ["memory", "vda.cache"]
    assert told(capsys, "set still memory=80M vda.cache=none -o json")["changes"] == would["changes"]

    moved = dry(capsys, home, "rename still quiet")
    assert told(capsys, "rename still quiet -o json")["rewritten"] == moved["rewritten"]
    told(capsys, "rename quiet still")

    resized = dry(capsys, home, "resize still vda +1M")
    assert resized["qmp"] == [
        {"execute": "block_resize", "arguments": {"node-name": resized["layer"], "size": 2 << 20}}
    ]
    assert told(capsys, "resize still vda 2M -o json")["size"] == resized["size"] == 2 << 20
    assert main(["resize", "still", "vda", "1M", "--dry-run"]) == 4

    assert main(["flatten", "still", "vda", "--dry-run"]) == main(["flatten", "still", "vda"]) == 4
    assert "lies on no clone in a Ceph cluster" in capsys.readouterr().err
    _devices_come_and_go(home, capsys)
    told(capsys, "snapshot create still other")
    for fate, verb in (("--keep-disks", "kept"), ("--remove-disks", "removed")):
        would = dry(capsys, home, f"undefine still {fate}")
        assert set(would[verb]) == images(folder)
    assert main(["undefine", "still", "--dry-run"]) == 4
    capsys.readouterr()
    done = told(capsys, "undefine still --remove-disks -o json")
    assert (sorted(done["removed"]), done["kept"]) == (sorted(would["removed"]), [])


def _devices_come_and_go(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    would = dry(capsys, home, "disk attach still --size 1M")
    assert told(capsys, "disk attach still --size 1M -o json")["created"] == would["created"]
    would = dry(capsys, home, "disk detach still vdb")
    assert told(capsys, "disk detach still vdb -o json")["kept"] == would["kept"]
    would = dry(capsys, home, "nic attach still --forward 2222:22")
    assert told(capsys, "nic attach still --forward 2222:22 -o json")["mac"] == would["mac"]
    card = {"nic": 0, "mac": would["mac"], "kind": "user", "model": "virtio"}
    assert told(capsys, "show still -o json")["nics"] == [card]
    assert f"nics:         0 (user, {would['mac']})" in told(capsys, "show still")
    assert main(["nic", "attach", "still", "--ifname", "no such"]) == 2
    assert "an interface's name such as tap0" in capsys.readouterr().err
    would = dry(capsys, home, "nic detach still 0")
    assert told(capsys, "nic detach still 0 -o json")["nic"] == would["nic"]


def test_images_that_would_be_adopted(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = place / "a.raw"
    image.write_bytes(bytes(MIB))
    would = dry(capsys, home, f"adopt taken --image vda={image},format=raw")
    assert not (home / "machines").exists()
    done = told(capsys, f"adopt taken --image vda={image},format=raw -o json")
    assert (would["disks"], would["dry_run"], done["dry_run"]) == (done["disks"], True, False)


async def test_memory(q: qmpsnap.Controller, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vm = await q.define(MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),)))
    await vm.start(paused=True)
    before = everything(home)
    machine, plan = await vm.record(), (await vm.plan_save(name="bed")).details
    assert everything(home) == before
    assert plan.memory
    saved = await vm.save(name="bed")
    assert saved.vmstate
    assert (plan.memory.path, plan.memory.quit, machine.name) == (saved.vmstate.path, True, "still")
    before = everything(home)
    back = (await vm.plan_restore(discard=True, paused=True)).details
    assert everything(home) == before
    assert (await vm.restore(discard=True, paused=True)).snapshot.name == back.plan.snapshot == "bed"
    await vm.stop(force=True)


async def test_nothing_is_ended_or_waited_for(q: qmpsnap.Controller, home: Path) -> None:
    vm = await q.define(MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),)))
    await vm.push("mine")
    context = context_of(vm)
    operation = journalled(context.store, CreatePlan(machine="still", live=False, overlays=(), change=Change()))
    before = everything(home)
    looks = (
        lambda: vm.plan_push("next"), vm.plan_pop, lambda: vm.plan_revert("mine"),
        lambda: vm.plan_undefine(disks="keep"), lambda: vm.plan_rename_snapshot("mine", "yours"),
        lambda: vm.plan_snapshot("s", kind="internal", memory=False),
    )  # fmt: skip
    for look in looks:
        with pytest.raises(OperationPending, match=rf"operation {operation.id} \(create\) of machine still is open"):
            await look()
    async with locked(context, "still", "other"):
        with pytest.raises(LockHeld, match=f"{os.getpid()}"):
            await vm.plan_pop()
    assert context.store.operations("still", only_open=True) == (operation,)
    assert everything(home).keys() == before.keys()
