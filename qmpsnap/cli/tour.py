"""The demo's tour: every command is the one a user would type, every claim is checked by a hash."""

import contextlib
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import content
from qmpsnap.cli import output
from qmpsnap.cli.common import controlling, home, reading
from qmpsnap.errors import HostCannot, QmpsnapError
from qmpsnap.machine.config.launch_dir import launch_dir

MACHINE = "demo"
SNAPSHOTS = ("first", "second", "third")
MIB = 1 << 20
WRITTEN = 16 * MIB
"""Bytes the guest writes before each snapshot, always to the same place, so that no two are alike; what is hashed."""

SPEC = """\
name: {name}
kernel: "{guest}/vmlinux"
initrd: "{guest}/initrd"
append: console=ttyS0 quiet panic=-1
memory: 256M
disks:
  - {{name: vda, size: 64M}}
"""

READ = "echo 3 >/proc/sys/vm/drop_caches && dd if=/dev/vda bs=1M count=16 2>/dev/null | sha256sum | cut -c1-64"
WRITE = "test -b /dev/vda && dd if=/dev/urandom of=/dev/vda bs=1M count={0} conv=fsync 2>/dev/null && "


COUNT = "i=0; while :; do i=$((i + 1)); echo $i >/run/count; usleep 10000; done"
COUNT_ON = f"setsid sh -c {shlex.quote(COUNT)} >/dev/null 2>&1 </dev/null & echo $! >/run/counter; sleep 1"
COUNTED = "cat /run/count"
END_COUNTER = "kill -9 $(cat /run/counter); cat /run/count"
COUNTED_TWICE = "cat /run/count; sleep 1; cat /run/count"


def run(*, keep: bool) -> int:
    """Take the tour; returns 0 when everything holds what the guest said it should."""
    guest = _small_guest()
    with _own_home(keep=keep) as folder:
        spec = folder / "demo.yaml"
        spec.write_text(SPEC.format(name=MACHINE, guest=guest))
        _say("A machine")
        _type("define", str(spec))
        try:
            _type("start", MACHINE)
            tour = _Tour(folder)
            tour.full()
            tour.create()
            tour.stream()
            tour.mirror()
            tour.branch()
            tour.commit()
            _type("stop", MACHINE, "--timeout", "20", "--force")
        finally:
            _end(MACHINE)
        tour.prove()
        tour.delete()
    output.note(
        "everything holds what the guest wrote" if tour.good else "something does NOT hold what the guest wrote"
    )
    return 0 if tour.good else 1


class _Tour:
    """The stations; ``said`` is what the guest told of its disk at each moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good = True
        self.said: dict[str, str] = {}

    def full(self) -> None:
        _say("Full: memory and disks of one instant, while a process counts; the guest runs on as they are written")
        _in_guest(f"{COUNT_ON}; {COUNTED}")
        _type("snapshot", "create", MACHINE, "counting", "--kind", "full")
        with reading() as store:
            (snapshot,) = store.snapshots(MACHINE)
        assert snapshot.vmstate
        output.say(f"the guest was held for {snapshot.pause_ms or 0:.1f} ms ({snapshot.vmstate.mode})")
        _in_guest(f"sleep 1; {END_COUNTER}")
        _type("snapshot", "revert", MACHINE, "counting", "--discard")
        first, then = (int(count) for count in _in_guest(COUNTED_TWICE).split())
        self._judge(f"{'the process':15} is back and counts on: {first}, a second later {then}", good=then > first)
        _type("snapshot", "delete", MACHINE, "counting")

    def create(self) -> None:
        _say("Three snapshots of the disk while the guest runs")
        for name in SNAPSHOTS:
            self.said[name] = _in_guest(WRITE.format(16) + READ)
            _type("snapshot", "create", MACHINE, name, "-m", f"sha256 {self.said[name][:16]}")
        _type("tree", MACHINE)
        _type("chain", MACHINE)

    def stream(self) -> None:
        _say("Stream: the active layer absorbs the layers down to a base; no snapshot is harmed")
        _type("stream", MACHINE, "vda", "--base", "first")
        _type("chain", MACHINE)
        self._compare("the guest", _in_guest(READ), "third")

    def mirror(self) -> None:
        _say("Mirror: a copy that stands alone, made while the guest runs")
        copy = self.folder / "copy.qcow2"
        _type("mirror", MACHINE, "vda", str(copy), "--finish")
        self._compare("the copy", self._content("third", path=str(copy)), "third")

    def branch(self) -> None:
        _say("Revert: back to the first snapshot; what was active is kept, and the tree branches")
        _type("snapshot", "revert", MACHINE, "first")
        self._compare("the guest", _in_guest(READ), "first")
        _type("snapshot", "create", MACHINE, "branch")
        _type("tree", MACHINE)

    def commit(self) -> None:
        _say("Commit: the active layer goes into the one below it, and the guest runs on")
        self.said["now"] = _in_guest(WRITE.format(4) + READ)
        _type("commit", MACHINE, "vda", "--base", "branch", code=4)
        _type("commit", MACHINE, "vda", "--base", "branch", "--consume")
        _type("chain", MACHINE)
        self._compare("the guest", _in_guest(READ), "now")

    def prove(self) -> None:
        _say("What every snapshot holds, read from the images and compared with what the guest had said")
        for name in SNAPSHOTS:
            self._compare(f"snapshot {name}", self._content(name), name)

    def delete(self) -> None:
        _say("Delete: the layer that nobody needs is merged, here of a stopped machine, and the rest stays as it was")
        _type("snapshot", "delete", MACHINE, "second", "--dry-run")
        _type("snapshot", "delete", MACHINE, "second")
        _type("tree", MACHINE)
        for name in ("first", "third"):
            self._compare(f"still {name}", self._content(name), name)

    def _compare(self, what: str, found: str, name: str) -> None:
        """Whether something has the hash that the guest told at that moment."""
        self._judge(f"{what:15} reads {found}", good=found == self.said[name])

    def _judge(self, what: str, *, good: bool) -> None:
        output.say(f"{'ok ' if good else 'BAD'}  {what}")
        self.good &= good

    def _content(self, name: str, *, path: str | None = None) -> str:
        """SHA-256 of a snapshot's content as the images hold it; with ``path`` of that image."""
        with reading() as store:
            snapshot = next(found for found in store.snapshots(MACHINE) if found.name == name)
            layer = store.layer(snapshot.points[0].layer)
        layer = replace(layer, path=path or layer.path)
        raw = self.folder / "content.raw"

        async def act(controller: qmpsnap.Controller) -> None:
            await content.copy_out(layer, raw, length=WRITTEN, qemu_img=controller.context.image.binary)

        controlling(act)
        found = hashlib.sha256(raw.read_bytes()).hexdigest()
        raw.unlink()
        return found


def _say(text: str) -> None:
    output.note(f"\n== {text}")


def _in_guest(script: str) -> str:
    """Run a script in the guest; returns what it says."""
    words = ["sh", "-c", script]
    output.note(f"$ qmpsnap exec {MACHINE} -- {shlex.join(words)}")

    async def act(controller: qmpsnap.Controller) -> str:
        vm = await controller.machine(MACHINE)
        return (await vm.run(words)).stdout.decode().strip()

    said = controlling(act)
    output.say(f"the guest says {said}")
    return said


def _type(*words: str, code: int = 0) -> None:
    """Run one command of ours as if it were typed; ``code`` is how it should end."""
    from qmpsnap.cli.main import main

    output.note(f"$ qmpsnap {shlex.join(words)}")
    if (found := main(words)) != code:
        raise QmpsnapError(f"the demo's command ended with exit code {found}")


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
            "the small guest could not be built",
            hint=f"{launch_dir() / 'guest' / 'build'} says what it needs",
        )
    return guest
