"""What the owner of an adopted machine has to start next, and who is to be told so before anything is adopted."""

# ruff: noqa: F811 - "launched" and its "folder" are fixtures

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError
from qmpsnap.machine import adopted
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.adoption import Adoption
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import LayerId
from qmpsnap.store import active_files
from qmpsnap.store.records import Record
from tests.live.test_adopt import FORMS, folder, launched  # noqa: F401
from tests.live.test_import import image


def told(home: Path) -> dict[str, str]:
    """What a shell has of the file."""
    script = f". {home}/machines/theirs/active.env; set | grep ^ACTIVE_"
    said = subprocess.run(["sh", "-c", script], env={}, capture_output=True, text=True, check=True).stdout
    return {key: value.strip("'") for key, value in (line.split("=", 1) for line in said.splitlines())}


async def active(vm: qmpsnap.MachineHandle) -> str:
    return (await vm.chains())[0].active.path


async def test_every_change_of_where_the_guest_writes_is_told(
    q: qmpsnap.Controller, home: Path, folder: Path, launched: Any
) -> None:
    theirs = launched("drive")
    vm = await q.adopt("theirs", theirs.socket)
    assert told(home)["ACTIVE_virtio0"] == str(folder / "top.qcow2")

    async def hold() -> None:
        path = await active(vm)
        found = told(home)
        assert (found["ACTIVE_DISKS"], found["ACTIVE_virtio0"]) == ("virtio0", path)
        assert found["ACTIVE_virtio0_DRIVE"] == f"file={path},format=qcow2"
        document = json.loads((home / "machines/theirs/active.json").read_text())
        assert document["disks"] == [{"disk": "virtio0", "path": path, "format": "qcow2"}]

    await vm.snapshot("s1")
    await hold()
    await vm.snapshot("s2")
    await hold()
    await vm.commit("virtio0", base="s2", consume=True)
    await hold()
    await vm.mirror("virtio0", target=folder / "copy.qcow2", mode="pivot")
    assert await active(vm) == str(folder / "copy.qcow2")
    await hold()
    assert (await vm.check()).findings == ()
    started = told(home)["ACTIVE_virtio0_DRIVE"]
    await vm.stop(force=True)
    for name in ("given.sock", "own.sock"):
        (folder / name).unlink(missing_ok=True)
    await vm.undefine(disks="keep")
    assert not (home / "machines/theirs/active.env").exists()
    again = launched(["-drive", f"{started},if=virtio"])
    vm = await q.adopt("theirs", again.socket)
    assert await active(vm) == str(folder / "copy.qcow2")
    await vm.undefine(disks="keep")
    assert not (home / "machines/theirs/active.json").exists()


def test_the_commands_say_so(home: Path, launched: Any, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = launched("drive")
    assert main(["adopt", "theirs", "--qmp", str(theirs.socket), "--dry-run"]) == 0
    assert "active.env" not in capsys.readouterr().err
    for line in (
        f"adopt theirs --qmp {theirs.socket}",
        "snapshot create theirs s1",
        "snapshot create theirs s2",
        "snapshot delete theirs s1",
        "commit theirs virtio0 --base s2 --consume",
        "stop theirs --force",
    ):
        assert main(line.split()) == 0
        said = capsys.readouterr().err
        assert f"its start script finds these names in {home}/machines/theirs/active.env" in said, line


def test_names_are_quoted_for_a_shell_and_for_qemu(home: Path) -> None:
    path = "/tmp/it's $(touch x) a,b\\n.qcow2"
    layer = Layer(id=LayerId("vda-1"), path=path, format="qcow2", backing=None, virtual_size=1)
    adoption = Adoption(socket="/s", uuid="", disks={"vda": "d"}, nodes={})
    machine = Machine(name="theirs", uuid="", host="h", spec=MachineSpec(name="theirs"), created=0, adopted=adoption)
    record = Record(machine=machine, active={"vda": layer.id}, layers=(layer,))
    folder = home / "machines" / "theirs"
    folder.mkdir(parents=True)
    (folder / "active.env").write_bytes(active_files.contents(record)["active.env"])
    script = f'. {folder}/active.env; printf \'%s\\n\' "$ACTIVE_vda" "$ACTIVE_vda_DRIVE"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [path, f"file={path.replace(',', ',,')},format=qcow2"]


# --- libvirt ----------------------------------------------------------------------------------------------------------


async def test_a_qemu_of_libvirt_is_told_as_that(q: qmpsnap.Controller, folder: Path, launched: Any) -> None:
    named = ["-name", "guest=web,debug-threads=on", "-chardev", "null,id=charmonitor"]
    theirs = launched([*FORMS["drive"], *named])
    with pytest.raises(StateError, match="that QEMU is domain web of libvirt") as refused:
        await q.adopt("theirs", theirs.socket)
    assert "virsh dumpxml web > dom.xml" in refused.value.hint
    assert await q.machines() == ()


def test_a_socket_that_libvirt_has_made(home: Path) -> None:
    assert adopted.is_libvirts(Path("/var/lib/libvirt/qemu/domain-1-web/monitor.sock"))
    assert not adopted.is_libvirts(home / "none.sock")
    assert adopted.libvirt_domain(["qemu", "-name", "web"]) is None
    assert (
        adopted.libvirt_domain(["qemu", "-mon", "chardev=charmonitor,id=monitor", "-chardev", "x,id=charmonitor"]) == ""
    )


# --- images alone -----------------------------------------------------------------------------------------------------


def test_images_alone_make_a_machine_of_default_hardware(
    home: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web = image(place / "web.qcow2", mark=1)
    given = ["adopt", "web", "--image", f"vda={web}"]
    assert main([*given, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "would have default hardware" in said
    assert f"--image vda={web} --spec > web.yaml" in said
    assert main([*given, "--spec"]) == 0
    written = place / "web.yaml"
    written.write_text(capsys.readouterr().out)
    assert main(["define", str(written), "--dry-run"]) == 0
    assert main(given) == 0
    assert "machine web has default hardware: pc-q35-" in capsys.readouterr().err
    assert main(["adopt", "other", "--qmp", "/s", "--spec"]) == 2
