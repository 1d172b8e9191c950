"""Machines of other managers: defined from their descriptions, with their snapshots, and started on a real QEMU."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import psutil
import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.machine.config.firmware import find_firmware
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import LayerId
from tests.imports.sources import FOLDER, PROXMOX, RECORDED
from tests.live.digest import whole_digest
from tests.live.machine import MIB, active_hash, content_hash, hold_invariants
from tests.live.test_dry_runs import everything, told

QEMU = os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64"
UUID = "9f6a1d3e-4b55-4c3a-9a51-6a7f1f1c2b01"
"""Of the recorded machines; the last digit tells them apart."""
QEMU_IMG = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"


async def typed(capsys: pytest.CaptureFixture[str], line: str) -> Any:
    """As :func:`told`, beside a test's own event loop."""
    return await to_thread.run_sync(told, capsys, line)


def image(path: Path, *, on: Path | None = None, size: int = 16, mark: int = 0, raw: bool = False) -> Path:
    """A new image, or an overlay, with a MiB of the mark at that MiB."""
    form = "raw" if raw else "qcow2"
    below = ["-b", str(on), "-F", "raw" if on.suffix == ".img" else "qcow2"] if on else []
    subprocess.run([QEMU_IMG, "create", "-q", "-f", form, *below, str(path), *([] if on else [f"{size}M"])], check=True)
    write(path, mark, form=form)
    return path


def write(path: Path, mark: int, *, form: str = "qcow2") -> None:
    program = str(Path(QEMU_IMG).with_name("qemu-io")) if "/" in QEMU_IMG else "qemu-io"
    subprocess.run(
        [program, "-f", form, "-c", f"write -q -P {mark} {mark}M 1M", str(path)], check=True, capture_output=True
    )


def tag(path: Path, name: str) -> None:
    subprocess.run([QEMU_IMG, "snapshot", "-c", name, str(path)], check=True)


def own_uuid(folder: Path) -> str:
    return f"{uuid5(NAMESPACE_URL, str(folder))}"[:-1] + "1"


def placed(folder: Path, *names: str) -> list[str]:
    """The recorded descriptions, of images in a folder, and with UUIDs of its own: tests run side by side."""
    for name in names:
        text = (RECORDED / name).read_text().replace(FOLDER, str(folder)).replace(UUID[:-1], own_uuid(folder)[:-1])
        (folder / name).write_text(text)
    return [str(folder / name) for name in names]


@pytest.fixture
def web(place: Path) -> Path:
    """The files of libvirt's domain web: two disks, each with two external snapshots, and UEFI variables."""
    first = image(place / "web.qcow2", size=64, mark=1)
    second = image(place / "web.fresh", on=first, mark=2)
    image(place / "web.Before Upgrade", on=second, mark=3)
    data = image(place / "data.img", mark=4, raw=True)
    image(place / "data.Before Upgrade", on=image(place / "data.fresh", on=data, mark=5), mark=6)
    (place / "boot.iso").write_bytes(bytes(MIB))
    variables = bytearray(Path(find_firmware().vars).read_bytes())
    variables[-1] = 7
    (place / "web_VARS.fd").write_bytes(variables)
    placed(place, "web.xml", "fresh.xml", "before-upgrade.xml", "running.xml")
    return place


def line(folder: Path, *, more: str = "") -> str:
    return (
        f"import libvirt {folder}/web.xml --snapshot {folder}/before-upgrade.xml --snapshot {folder}/fresh.xml"
        f" --define --allow {folder}{more}"
    )


@pytest.mark.version
async def test_a_domain_with_snapshots_outside_its_images(
    q: qmpsnap.Controller, home: Path, web: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(home)
    would = await typed(capsys, line(web, more=" --dry-run -o json"))
    assert everything(home) == before
    done = await typed(capsys, line(web, more=" -o json"))
    assert (done["snapshots"], done["machine_type"]) == (["fresh", "before-upgrade"], "pc-q35-7.2")
    assert would["read"] == [layer for name in ("web", "data") for layer in files_of(web, name)]

    vm = await q.machine("web")
    record, snapshots = await vm.record(), await vm.snapshots()
    assert record.uuid == done["uuid"] == own_uuid(web)
    assert record.current == "before-upgrade"
    assert (home / "machines" / "web" / "vars.fd").read_bytes() == (web / "web_VARS.fd").read_bytes()
    assert [(one.name, one.parent, one.description) for one in snapshots] == [
        ("fresh", None, "just installed"),
        ("before-upgrade", "fresh", "second one"),
    ]
    hashes = {(one.name, point.disk): await content_hash(vm, point.layer) for one in snapshots for point in one.points}
    process = await vm.start(paused=True)
    words = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
    assert record.uuid in words
    assert [word for word in words if '"driver":"e1000"' in word and '"mac":"52:54:00:8a:3b:02"' in word]
    reverted = await vm.revert("fresh")
    assert reverted.kept
    assert await active_hash(vm) == hashes["fresh", "vda"]
    await hold_invariants(vm, hashes)
    await vm.stop(force=True)


def files_of(folder: Path, name: str) -> list[str]:
    first = "data.img" if name == "data" else "web.qcow2"
    return [str(folder / each) for each in (first, f"{name}.fresh", f"{name}.Before Upgrade")]


def commit_fresh(folder: Path) -> None:
    """Merge the overlays of snapshot fresh down, as nobody has told libvirt."""
    for name, first in (("web", "web.qcow2"), ("data", "data.img")):
        subprocess.run([QEMU_IMG, "commit", "-q", "-d", str(folder / f"{name}.fresh")], check=True)
        below = [*("-b", str(folder / first)), *("-F", "raw" if name == "data" else "qcow2")]
        subprocess.run([QEMU_IMG, "rebase", "-u", *below, str(folder / f"{name}.Before Upgrade")], check=True)


async def test_a_snapshot_that_was_committed_since_is_left_out(
    q: qmpsnap.Controller, web: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_fresh(web)
    done = await typed(capsys, line(web, more=" -o json"))
    assert done["snapshots"] == []
    left = "\n".join(done["left_out"])
    assert f"snapshot fresh: {web}/web.fresh does not lie on {web}/web.qcow2 any more" in left
    assert f"snapshot Before Upgrade: {web}/web.fresh is not among the images of disk vda" in left
    vm = await q.machine("web")
    assert (await vm.record()).current is None
    await hold_invariants(vm)


@pytest.mark.version
async def test_a_domain_with_snapshots_inside_its_images(
    q: qmpsnap.Controller, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = image(place / "inner.qcow2", mark=1)
    tag(inner, "one")
    write(inner, 2)
    tag(inner, "two")
    tag(inner, "by hand")
    write(inner, 3)
    xml, one, two = placed(place, "inner.xml", "inner-one.xml", "inner-two.xml")
    words = f"import libvirt {xml} --snapshot {two} --snapshot {one} --define --allow {place} -o json"
    assert (await typed(capsys, words))["snapshots"] == ["one", "two", "by-hand"]
    vm = await q.machine("inner")
    assert [(one.name, one.kind, one.parent) for one in await vm.snapshots()] == [
        ("one", "internal", None),
        ("two", "internal", "one"),
        ("by-hand", "internal", None),
    ]
    await hold_invariants(vm)
    await vm.start(paused=True)
    await vm.revert("one")
    expected = image(place / "expected.qcow2", mark=1)
    assert await active_hash(vm) == await read_as(expected)
    await hold_invariants(vm)
    await vm.stop(force=True)
    await vm.delete_snapshots("two", "by-hand")
    assert (await vm.snapshots())[0].name == "one"
    await hold_invariants(vm)


async def read_as(path: Path) -> str:
    layer = Layer(id=LayerId("x-1"), path=str(path), format="qcow2", backing=None, virtual_size=16 * MIB)
    return await whole_digest(layer, qemu_img=QEMU_IMG)


def test_tags_that_the_files_do_not_have_are_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = image(place / "inner.qcow2", mark=1)
    tag(inner, "one")
    tag(inner, "1")  # which is another tag's number, so that qemu-img would take that one
    xml, one, two = placed(place, "inner.xml", "inner-one.xml", "inner-two.xml")
    words = f"import libvirt {xml} --snapshot {two} --snapshot {one} --define --allow {place} -o json"
    done = told(capsys, words)
    assert done["snapshots"] == ["one"]
    left = "\n".join(done["left_out"])
    assert "snapshot two: disk hda has no such tag inside" in left
    assert "snapshot 1: inside disk hda its name is another tag's number" in left


@pytest.fixture
def storage(place: Path) -> Path:
    folder = place / "images" / "100"
    folder.mkdir(parents=True)
    lines = [
        line for line in PROXMOX.splitlines() if not line.startswith(("bios", "efidisk0", "scsi1", "net", "machine"))
    ]
    (place / "100.conf").write_text("kvm: 0\n" + "\n".join(lines))
    return folder


PVE = "import proxmox {place}/100.conf --storage local={place} --define --allow {place} -o json"


@pytest.mark.parametrize("chained", [False, True], ids=["tags", "volume chain"])
async def test_a_vm_of_proxmox(
    q: qmpsnap.Controller,
    place: Path,
    storage: Path,
    chained: bool,  # noqa: FBT001
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = storage / "vm-100-disk-0.qcow2"
    iso = place / "template" / "iso" / "debian-12.iso"
    if chained:
        iso.parent.mkdir(parents=True)
        iso.write_bytes(bytes(MIB))
        first = image(storage / "snap-fresh-vm-100-disk-0.qcow2", mark=1)
        second = image(storage / "snap-before-upgrade-vm-100-disk-0.qcow2", on=first, mark=2)
        image(disk, on=second, mark=3)
    else:
        image(disk, mark=1)
        tag(disk, "fresh")
        write(disk, 2)
        tag(disk, "before-upgrade")
        write(disk, 3)
    done = await typed(capsys, PVE.format(place=place))
    assert (done["machine"], done["snapshots"]) == ("web.server", ["fresh", "before-upgrade"])
    vm = await q.machine("web.server")
    assert (await vm.record()).spec.cdrom == (str(iso) if chained else None)
    assert chained or f"{iso} is missing" in done["left_out"]
    assert (await vm.record()).current == "before-upgrade"
    assert {one.kind for one in await vm.snapshots()} == {"disk" if chained else "internal"}
    await vm.revert("fresh")
    assert await active_hash(vm) == await read_as(image(place / "expected.qcow2", mark=1))
    await hold_invariants(vm)


@pytest.fixture
def daemon(home: Path, place: Path) -> Iterator[Any]:
    """Launches a QEMU by hand that becomes a daemon; it ends with the test."""
    pid_file = home / "daemon.pid"

    def launch(*arguments: str) -> int:
        subprocess.run(
            [
                *(QEMU, "-M", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", "-S", "-daemonize"),
                *("-pidfile", str(pid_file), *arguments),
            ],
            cwd=place,
            check=True,
            timeout=60,
        )
        return int(pid_file.read_text())

    yield launch
    if pid_file.exists() and psutil.pid_exists(pid := int(pid_file.read_text())):
        psutil.Process(pid).kill()


@pytest.mark.version
async def test_a_qemu_that_runs_as_a_daemon(
    q: qmpsnap.Controller, home: Path, place: Path, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    top = image(place / "top.qcow2", on=image(place / "base.qcow2", mark=1), mark=2)
    pid = daemon("-drive", "file=top.qcow2,format=qcow2,if=virtio,id=root", "-nic", "user,model=virtio-net-pci")
    text = await typed(capsys, f"import argv --pid {pid} --name mine")
    assert f"image: {top}\n" in text  # QEMU was told a relative path, and is in / by now
    assert "The original runs: it is process" in text
    (home / "mine.yaml").write_text(text)
    assert (
        await to_thread.run_sync(
            main, ["import", "argv", "--pid", str(pid), "--name", "mine", "--define", "--allow", str(place)]
        )
        == 4
    )
    assert f"the original of mine runs: it is process {pid}" in capsys.readouterr().err
    code = await to_thread.run_sync(main, ["define", str(home / "mine.yaml"), "--allow", str(place)])
    assert "is open for writing in" in (said := capsys.readouterr().err), said
    assert code == 4
    process = psutil.Process(pid)
    process.kill()
    process.wait(10)
    capsys.readouterr()
    await typed(capsys, f"define {home}/mine.yaml --allow {place}")
    vm = await q.machine("mine")
    assert (await vm.record()).spec.nics[0].mac == "52:54:00:12:34:56"
    await vm.start(paused=True)
    await vm.snapshot("s1")
    await hold_invariants(vm)
    await vm.stop(force=True)


def test_a_machine_whose_original_runs_is_not_defined(
    web: Path, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(web).replace("web.xml", "running.xml").split()) == 4
    assert "its XML has a domain id" in capsys.readouterr().err
    pid = daemon("-uuid", own_uuid(web))
    assert main(line(web).split()) == 4
    assert f"the original of web runs: process {pid} has its UUID" in capsys.readouterr().err


def test_a_uuid_belongs_to_one_machine(web: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, line(web))
    assert main([*line(web).split(), "--name", "other"]) == 4
    assert f"the UUID {own_uuid(web)} of other is that of machine web" in capsys.readouterr().err


FIRMWARE = {
    "is a qcow2 image, and flash is raw": b"QFI\xfb" + bytes(4092),
    "has 100 bytes; flash has a multiple of 4096": bytes(100),
    "no firmware of this host has a variable store of 4096 bytes": bytes(4096),
}


@pytest.mark.parametrize("said", FIRMWARE)
def test_variables_that_no_firmware_has_are_refused(said: str, web: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (web / "web_VARS.fd").write_bytes(FIRMWARE[said])
    xml = (web / "web.xml").read_text().replace("/usr/share/OVMF/OVMF_CODE_4M.fd", "")
    (web / "web.xml").write_text(xml)
    assert main(line(web).split()) in (2, 9)
    assert said in capsys.readouterr().err


def test_define_says_what_to_do_with_others_descriptions(
    web: Path, storage: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["define", str(web / "web.xml")]) == 2
    assert f"hint: qmpsnap import libvirt {web}/web.xml" in capsys.readouterr().err
    assert main(["define", str(place / "100.conf")]) == 2
    assert f"hint: of a Proxmox VM: qmpsnap import proxmox {place}/100.conf" in capsys.readouterr().err
