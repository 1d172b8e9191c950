"""The tutorial of snapshots, chains, commits and pulls, typed command by command on a booted guest.

Every form begins at the same start, on a disk of its own: three snapshots, a random file before each and one after the
last, and so a chain of four layers. What the disks held at each moment the guest says, and the images are read for it.
"""

import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

import qmpsnap
from qmpsnap.block.image import content
from qmpsnap.cli.main import main
from qmpsnap.model.names import LayerId
from tests.live.machine import context_of, hold_invariants
from tests.live.printed import hold, steady

Hashes = dict[tuple[str, str], str]
Typed = Callable[..., str]


class Form(NamedTuple):
    """One command, and the snapshots it costs by the number of their moment."""

    command: str
    lost: tuple[int, ...] = ()


# Snapshot a1 is the moment at which the lowest layer of vda was frozen, a2 that of the layer above ... A tutorial for
# virsh calls those two files "base" and "s1", after the overlay that a snapshot leaves behind.
FORMS = {
    "vda": Form("commit guest vda --base a1 --top a2", (1,)),
    "vdb": Form("commit guest vdb --base b2 --top b3", (2,)),
    "vdc": Form("commit guest vdc --base c1 --top c3", (1, 2)),
    "vdd": Form("commit guest vdd", (1, 2, 3)),
    "vde": Form("stream guest vde --base e2"),
    "vdf": Form("stream guest vdf"),
}
MOMENTS = (1, 2, 3)
SPEC = """\
name: guest
kernel: "{guest}/vmlinux"
initrd: "{guest}/initrd"
append: console=ttyS0 quiet panic=-1
memory: 256M
disks:
""" + "".join(f"  - {{{{name: {disk}, size: 2M}}}}\n" for disk in FORMS)

HASHES = "echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/vd[a-f]"
# A quarter of each disk at a time: after the fourth file nothing of it is what it was at first.
WRITE = (
    "for disk in /dev/vd[a-f]; do test -b $disk"
    " && dd if=/dev/urandom of=$disk bs=512k seek={0} count=1 conv=fsync 2>/dev/null || exit 1; done; " + HASHES
)


@pytest.fixture
def typed(home: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Types a command and returns it with what it printed: data, or the error that was expected."""

    def type_(line: str, *, code: int = 0) -> str:
        capsys.readouterr()
        found = main(shlex.split(line))
        printed = capsys.readouterr()
        assert found == code, printed.err
        return f"$ qmpsnap {line}\n{steady(printed.err if code else printed.out, home)}"

    return type_


def test_every_commit_and_stream_form(home: Path, small_guest: Path, typed: Typed) -> None:
    spec = home / "guest.yaml"
    spec.write_text(SPEC.format(guest=small_guest))
    typed(f"define {spec}")
    typed("start guest")
    said: Hashes = {}
    for number in MOMENTS:
        now = anyio.run(_guest_says, WRITE.format(number - 1))
        for disk in FORMS:
            said[f"{disk[-1]}{number}", disk] = now[disk]
            typed(f"snapshot create guest {disk[-1]}{number} --disks {disk}")
    now = anyio.run(_guest_says, WRITE.format(len(MOMENTS)))
    assert len({*now.values(), *said.values()}) == len(FORMS) * (len(MOMENTS) + 1)
    transcript = typed("tree guest") + typed("chain guest vda")

    for disk, form in FORMS.items():
        line, lost = form.command, [f"{disk[-1]}{number}" for number in form.lost]
        if lost:
            transcript += typed(line, code=4)
            line += " --consume"
        transcript += typed(line) + typed(f"chain guest {disk}")
        for name in lost:
            del said[name, disk]
        anyio.run(_holds, said)
        assert anyio.run(_guest_says, HASHES) == now
    transcript += typed("tree guest") + typed("snapshot list guest")

    typed("stop guest --timeout 20")
    assert anyio.run(_active) == now
    anyio.run(_holds, said)
    hold("tutorial", transcript)


@pytest.mark.timeout(300)
def test_saved_started_afresh_and_restored(home: Path, small_guest: Path, typed: Typed) -> None:
    """The tutorial of save and restore: a process loops in the guest, and is there again with its memory."""
    spec = home / "guest.yaml"
    spec.write_text(SPEC.format(guest=small_guest))
    typed(f"define {spec}")
    typed("start guest")

    def in_guest(script: str) -> str:
        return typed(f"exec guest -- sh -c {shlex.quote(script)}").partition("\n")[2].strip()

    def counted(at_least: int) -> int:
        script = f"until [ $(cat /run/count) -ge {at_least} ]; do usleep 10000; done; cat /run/count"
        return int(in_guest(script))

    looping = "i=0; while :; do i=$((i + 1)); echo $i >/run/new; mv /run/new /run/count; usleep 10000; done"
    in_guest(
        f"test -b /dev/vda && echo evening | dd of=/dev/vda conv=fsync; echo 0 >/run/count; ({looping}) >&- 2>&- &"
    )
    before = counted(5)
    file = home / "evening.vmstate"
    assert "is saved as saved-1 and stopped; its memory is in" in typed(f"save guest {file}")
    assert "is stopped and has no memory to save" in typed("save guest", code=4)

    typed("start guest")
    assert in_guest("cat /run/count 2>/dev/null; head -c 7 /dev/vda") == "evening"  # a fresh boot, without the process
    in_guest("echo afresh | dd of=/dev/vda conv=fsync")

    assert "is at saved-1, running with its memory" in typed(f"restore guest {file}")
    assert counted(before + 1) > before
    in_guest("echo 3 >/proc/sys/vm/drop_caches")
    assert in_guest("head -c 7 /dev/vda") == "evening"  # the disk is the one it knew

    assert "ms are allowed" in typed("snapshot create guest quick --kind full --max-pause 1", code=4)
    typed("snapshot create guest noon --kind full --max-pause 60000 --degrade --compress zstd -m packed")
    shown = json.loads(typed("snapshot show guest noon -o json").partition("\n")[2])["snapshot"]
    assert (shown["kind"], shown["description"], shown["vmstate"]["compression"]) == ("full", "packed", "zstd")
    assert shown["pause_ms"] > 0
    assert "is at noon, paused with its memory" in typed("snapshot revert guest noon --paused --no-after")
    assert "is at noon, running with its memory" in typed("snapshot revert guest noon --discard")
    counted(before + 2)
    anyio.run(_holds, {})
    typed("stop guest --force")


async def _guest_says(script: str) -> dict[str, str]:
    """Runs a script in the guest that ends with the SHA-256 of each disk."""
    async with qmpsnap.open() as q:
        done = await (await q.machine("guest")).run(script)
    lines = done.stdout.splitlines()
    assert len(lines) == len(FORMS)
    return {path.removeprefix("/dev/"): found for found, path in map(str.split, lines)}


async def _holds(said: Hashes) -> None:
    """The invariants, and that every snapshot reads as what the guest said it had on its disks at that moment."""
    async with qmpsnap.open() as q:
        vm = await q.machine("guest")
        await hold_invariants(vm)
        snapshots = {snapshot.name: snapshot for snapshot in await vm.snapshots()}
        for (name, disk), digest in said.items():
            point = snapshots[name].point(disk)
            assert snapshots[name].state == "ok"
            assert point is not None
            assert await _sha256(vm, point.layer) == digest, f"snapshot {name} of {disk} changed"


async def _sha256(vm: qmpsnap.MachineHandle, layer: LayerId) -> str:
    """As the guest's own sha256sum of the disk would be."""
    context = context_of(vm)
    copy = context.home.data / "copy"
    await content.copy_out(context.store.layer(layer), copy, qemu_img=context.image.binary)
    digest = hashlib.sha256(copy.read_bytes()).hexdigest()
    copy.unlink()
    return digest


async def _active() -> dict[str, str]:
    """What a stopped machine's disks hold."""
    async with qmpsnap.open() as q:
        vm = await q.machine("guest")
        return {view.disk: await _sha256(vm, view.layers[-1].layer.id) for view in await vm.chains()}
