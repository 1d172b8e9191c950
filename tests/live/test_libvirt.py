"""A domain of a real libvirt, with the snapshots that virsh took of it, becomes a machine with the same content."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError
from tests.bench.libvirt import Libvirt, install, libvirt
from tests.bench.program import ProgramFailed
from tests.live.machine import MIB, active_hash, content_hash, hold_invariants
from tests.live.test_import import QEMU_IMG, image, typed

DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"
"""How QEMU knows the device of libvirt's first virtio disk."""

SYSTEMS = "/usr/bin/qemu-system-x86_64"
"""The QEMU that the system's libvirt is made for; Debian 12's cannot ask 11.1 what it can do."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Libvirt]:
    if os.geteuid() != 0:
        pytest.skip("libvirtd needs root")
    try:
        install()
    except ProgramFailed as error:
        pytest.skip(f"Debian's libvirt cannot be installed: {error}")
    with libvirt(tmp_path) as found:
        yield found


def marks(image: Path) -> list[int]:
    """The first byte of each of the first MiBs of what an image and its backings hold."""
    raw = image.with_suffix(".raw")
    subprocess.run([QEMU_IMG, "convert", "-U", "-O", "raw", str(image), str(raw)], check=True)
    with raw.open("rb") as file:
        found = [file.read(MIB)[0] for _ in range(5)]
    raw.unlink()
    return found


async def test_a_domain_with_two_external_snapshots(
    q: qmpsnap.Controller, place: Path, daemon: Libvirt, capsys: pytest.CaptureFixture[str]
) -> None:
    base = image(place / "web.qcow2", mark=1)
    daemon.define("web", base, memory=64, accel="tcg", qemu=SYSTEMS)
    daemon.virsh("start", "web", "--paused")
    files = [base]
    for mark, name in ((2, "fresh"), (3, "upgraded")):
        files.append(place / f"web.{name}")
        words = ("--disk-only", "--atomic", "--diskspec", f"vda,file={files[-1]}")
        daemon.virsh("snapshot-create-as", "web", name, f"what {name} is", *words)
        write = f'qemu-io -d {DEVICE} "write -P {mark} {mark}M 1M"'
        said = daemon.virsh("qemu-monitor-command", "web", "--hmp", write)
        assert not said.strip(), "what is done is told to QEMU's output"
    running = described(daemon, place / "running.xml", "dumpxml", "web")
    domain = described(daemon, place / "web.xml", "dumpxml", "web", "--inactive")
    line = f"--define --allow {place}"
    for name in ("fresh", "upgraded"):
        line += f" --snapshot {described(daemon, place / f'{name}.xml', 'snapshot-dumpxml', 'web', name)}"

    for file, why in ((running, "its XML has a domain id"), (domain, "has its UUID")):
        assert await to_thread.run_sync(main, f"import libvirt {file} {line}".split()) == StateError.exit_code
        assert why in capsys.readouterr().err
    daemon.virsh("destroy", "web")
    content = [marks(file) for file in files]
    assert content == [[0, 1, 0, 0, 0], [0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]

    done = await typed(capsys, f"import libvirt {domain} {line} -o json")
    assert done["snapshots"] == ["fresh", "upgraded"]
    vm = await q.machine("web")
    assert (await vm.record()).uuid in domain.read_text()
    assert [(one.name, one.parent, one.description) for one in await vm.snapshots()] == [
        ("fresh", None, "what fresh is"),
        ("upgraded", "fresh", "what upgraded is"),
    ]
    (chain,) = await vm.chains()
    assert [view.layer.path for view in chain.layers] == [str(file) for file in files]
    hashes = {
        (one.name, point.disk): await content_hash(vm, point.layer)
        for one in await vm.snapshots()
        for point in one.points
    }
    await vm.start(paused=True)
    for name in ("fresh", "upgraded"):
        await vm.revert(name)
        assert await active_hash(vm) == hashes[name, "vda"]
    assert [marks(file) for file in files] == content, "libvirt's images are as they were"
    await hold_invariants(vm, hashes)


def described(daemon: Libvirt, file: Path, *words: str) -> Path:
    file.write_text(daemon.virsh(*words))
    return file
