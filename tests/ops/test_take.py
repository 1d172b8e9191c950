"""What a command line, which a guest may have rewritten, can propose for a machine that was adopted."""

import pytest

from qmpsnap.imports import argv
from qmpsnap.imports.argv_words import Places
from qmpsnap.imports.found import Imported
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, Opened
from qmpsnap.ops.adoption.take import fitted

OURS = Machine(
    name="web",
    uuid="5d0b7d5e-6c1e-4b8e-9f5b-3f2d8a3f7c11",
    host="here",
    spec=MachineSpec(
        name="web",
        machine="pc-q35-7.2",
        accel="tcg",
        cpus=2,
        memory=64 << 20,
        agent=False,
        disks=(
            DiskSpec(name="d0", image="/i/a.qcow2", cache="none", opened=Opened(file={"aio": "native"})),
            DiskSpec(name="vda", device="/dev/vg/b", format="raw", own=False),
        ),
    ),
    created=0,
)


def proposal(*words: str, opened: tuple[str, ...] = ()) -> Imported:
    told = argv.read(["qemu-system-x86_64", *words], places=Places("/", opened), name="web")
    return fitted(OURS, told)


def test_hardware_is_what_qemu_told_and_disks_are_those_that_were_adopted() -> None:
    found = proposal(
        *(
            "-M",
            "pc",
            "-m",
            "4T",
            "-smp",
            "64",
            "-uuid",
            "00000000-0000-0000-0000-000000000001",
            "-device",
            "nvme,drive=b",
        ),
        *("-drive", "file=/dev/vg/b,format=raw,if=none,id=b"),
        *("-drive", "file=a.qcow2,format=qcow2,if=ide,id=other", "-drive", "file=/etc/shadow,format=raw,if=virtio"),
        opened=("/i/a.qcow2", "/dev/vg/b"),
    )
    assert (found.spec.machine, found.spec.cpus, found.spec.memory) == ("pc-q35-7.2", 2, 64 << 20)
    assert (found.spec.uuid, found.spec.accel) == (OURS.uuid, "tcg")
    assert found.spec.disks == (
        DiskSpec(name="d0", image="/i/a.qcow2", bus="ide", discard=False),
        DiskSpec(name="vda", device="/dev/vg/b", format="raw", bus="nvme", discard=False),
    )
    assert any(sentence.endswith("it was not adopted") for sentence in found.left_out)
    assert "shadow" not in str(found.spec)


@pytest.mark.parametrize(("name", "bus"), [("d0", "sata"), ("x", "virtio")])
def test_an_image_that_has_moved_is_found_by_its_name(name: str, bus: str) -> None:
    drive = f"file=/old/a.qcow2,format=qcow2,if=none,id={name}"
    found = proposal("-M", "q35", "-drive", drive, "-device", f"ide-hd,drive={name}")
    assert found.spec.disks[0].bus == bus
    assumed = any("virtio is assumed" in sentence and "d0" in sentence for sentence in found.changed)
    assert assumed is (name == "x")
