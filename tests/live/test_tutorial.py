"""The tutorial of snapshots, chains, commits and pulls, typed command by command on a booted guest.

Every form begins at the same start, on a disk of its own: three snapshots, a random file before each and one after the
last, and so a chain of four layers. What the disks held at each moment the guest says, and the images are read for it.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.main import main
from tests.live.machine import content_hash, hold_invariants
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


async def _guest_says(script: str) -> dict[str, str]:
    """Runs a script in the guest that ends with the SHA-256 of each disk."""
    async with qmpsnap.open() as q:
        done = await (await q.machine("guest")).run(script)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == len(FORMS)
    return {path.removeprefix("/dev/"): found for found, path in map(str.split, lines)}


async def _holds(hashes: Hashes) -> None:
    async with qmpsnap.open() as q:
        await hold_invariants(await q.machine("guest"), hashes)


async def _active() -> dict[str, str]:
    """What a stopped machine's disks hold."""
    async with qmpsnap.open() as q:
        vm = await q.machine("guest")
        return {view.disk: await content_hash(vm, view.layers[-1].layer.id) for view in await vm.chains()}
