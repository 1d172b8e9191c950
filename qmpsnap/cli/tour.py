"""The demo's tour: every command is the one a user would type, every claim is checked by a hash."""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import qmpsnap
from qmpsnap.block import content
from qmpsnap.cli import output
from qmpsnap.cli.common import controlling, home, reading
from qmpsnap.errors import HostCannot, QmpsnapError
from qmpsnap.machine.recipes import launch_dir

MACHINE = "demo"
SNAPSHOTS = ("first", "second", "third")
MIB = 1 << 20
WRITTEN = 16 * MIB
"""Bytes the guest writes before each snapshot, always to the same place, so that no two snapshots are alike."""

SPEC = """\
name: {name}
kernel: "{guest}/vmlinux"
initrd: "{guest}/initrd"
append: console=ttyS0 quiet panic=-1
memory: 256M
disks:
  - {{name: vda, size: 64M}}
"""

WRITE_AND_HASH = (
    "test -b /dev/vda && dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null"
    " && dd if=/dev/vda bs=1M count=16 2>/dev/null | sha256sum | cut -d' ' -f1"
)


def run(*, keep: bool) -> int:
    """Take the tour; returns 0 when every snapshot holds what the guest said."""
    guest = _small_guest()
    with _own_home(keep=keep) as folder:
        spec = folder / "demo.yaml"
        spec.write_text(SPEC.format(name=MACHINE, guest=guest))
        _type("define", str(spec))
        try:
            _type("start", MACHINE)
            said = {name: _round(name) for name in SNAPSHOTS}
            _type("tree", MACHINE)
            _type("chain", MACHINE)
            _type("stop", MACHINE, "--timeout", "20", "--force")
        finally:
            _end(MACHINE)
        found = [_holds(name, said[name], folder) for name in SNAPSHOTS]
        good = all(found)
    output.note(
        "every snapshot holds what the guest wrote" if good else "a snapshot does NOT hold what the guest wrote"
    )
    return 0 if good else 1


def _round(name: str) -> str:
    """Let the guest write and say its hash, then take a snapshot."""
    output.note(f"$ qmpsnap exec {MACHINE} -- sh -c 'write 16 random MiB to /dev/vda and hash them'")

    async def act(controller: qmpsnap.Controller) -> str:
        vm = await controller.machine(MACHINE)
        return (await vm.run(WRITE_AND_HASH)).stdout.decode().strip()

    said = controlling(act)
    print(f"the guest says {said}")
    _type("snapshot", "create", MACHINE, name, "-m", f"sha256 {said[:16]}")
    return said


def _holds(name: str, said: str, folder: Path) -> bool:
    """Whether the snapshot's content has the hash that the guest told at its moment."""
    with reading() as store:
        snapshot = next(found for found in store.snapshots(MACHINE) if found.name == name)
        layer = store.layer(snapshot.points[0].layer)
    copy = folder / "content.raw"

    async def act(controller: qmpsnap.Controller) -> None:
        await content.copy_out(layer, copy, length=WRITTEN, qemu_img=controller.context.image.binary)

    controlling(act)
    found = hashlib.sha256(copy.read_bytes()).hexdigest()
    copy.unlink()
    print(f"{'ok ' if found == said else 'BAD'}  snapshot {name:8} reads {found}")
    return found == said


def _type(*words: str) -> None:
    """Run one command of ours as if it were typed."""
    from qmpsnap.cli.main import main

    output.note(f"$ qmpsnap {' '.join(words)}")
    sys.stderr.flush()
    if code := main(words):
        raise QmpsnapError(f"the demo's command ended with exit code {code}")


def _end(machine: str) -> None:
    """Whatever happened: no process of the demo stays."""

    async def act(controller: qmpsnap.Controller) -> None:
        vm = await controller.machine(machine)
        if await vm.is_running():
            await vm.stop(force=True)

    controlling(act)


@contextlib.contextmanager
def _own_home(*, keep: bool) -> Iterator[Path]:
    """A QMPSNAP_HOME of the demo's own, so that it cannot touch a user's machines."""
    with contextlib.ExitStack() as stack:
        if keep:
            folder = Path(tempfile.mkdtemp(prefix="qmpsnap-demo-"))
            output.note(f"kept: export QMPSNAP_HOME={folder}")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qmpsnap-demo-")))
        before = os.environ.get("QMPSNAP_HOME")
        os.environ["QMPSNAP_HOME"] = str(folder)
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["QMPSNAP_HOME"]
            else:
                os.environ["QMPSNAP_HOME"] = before


def _small_guest() -> Path:
    """The small guest's folder, built if need be."""
    guest = home().guest
    done = subprocess.run(
        [launch_dir() / "guest" / "build", guest], check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise HostCannot(
            "the small guest could not be built; nothing was started", hint="scripts/demo installs what it needs"
        )
    return guest
