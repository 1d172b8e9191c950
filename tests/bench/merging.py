"""Merges of 1 GiB of random bytes under a paused QEMU; qmpsnap, the bare script and virsh are processes of their own.

All end alike: job dismissed, node closed, the file of the merged layer removed, which virsh leaves to its caller.
"""

import os
import subprocess
from pathlib import Path

import qmpsnap
from qmpsnap import Layer
from tests.bench import guests
from tests.bench.measure import Way, clock
from tests.bench.program import PYTHON, QEMU_IMG, QMPSNAP, Sample, fill, run
from tests.bench.setting import Setting

MEASURES = ("commit-1g", "stream-1g")
MIB = 1024
SCRIPT = Path(__file__).with_name("bare.py")
SHARE = 0.3


async def measure(at: Setting) -> None:
    """Time them."""
    fill(at.folder / "random", MIB)
    at.folder_for("domain-big")
    async with qmpsnap.open() as q:
        for measure in MEASURES:
            verb = measure.partition("-")[0]
            ways = {"qmpsnap": _ours(at, q, verb, by="qmpsnap"), "bare": _ours(at, q, verb, by="bare")}
            ways["virsh"] = _virsh(at, verb)
            await at.results.compare(measure, ways, share=SHARE)
    (at.folder / "random").unlink()


def _ours(at: Setting, q: qmpsnap.Controller, verb: str, *, by: str) -> Way:
    """On a machine of qmpsnap's, made for it."""

    async def way() -> Sample:
        vm, below, top = await started(q, verb, at.folder / "random")
        argv: list[str | Path] = [QMPSNAP, verb, "big", "vda"]
        if by == "bare":
            gone, left = (top, below) if verb == "commit" else (below, top)
            argv = [PYTHON, SCRIPT, verb, guests.monitor_of("big"), below.id, top.id, gone.path]
            kept = Path(left.path)
        sample = run(*argv)
        await vm.stop(force=True)
        if by == "qmpsnap":
            kept = Path((await vm.chains())[0].active.path)
        _compare(at, kept)
        await vm.undefine(disks="remove")
        return sample

    return way


async def started(q: qmpsnap.Controller, verb: str, random: Path) -> tuple[qmpsnap.MachineHandle, Layer, Layer]:
    """A machine under -S whose layer to be merged has the random bytes, and its two layers, the active one last."""
    vm = await q.define(guests.still("big", size=MIB << 20))
    await vm.add_layers()
    below, top = (view.layer for view in (await vm.chains())[0].layers)
    _write(random, Path((top if verb == "commit" else below).path))
    await vm.start(paused=True)
    os.sync()  # what the set-up has written must not be waited for by what is timed
    return vm, below, top


def _virsh(at: Setting, verb: str) -> Way:
    """On a domain of libvirt's, whose images are made for it."""

    async def way() -> Sample:
        folder = at.folder / "domain-big"
        base, top = folder / "base.qcow2", folder / "top.qcow2"
        subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", base, f"{MIB}M"], check=True)
        if verb == "stream":
            _write(at.folder / "random", base)
        subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top], check=True)
        if verb == "commit":
            _write(at.folder / "random", top)
        at.virt.define("big", top, memory=64, accel=at.accel)
        at.virt.virsh("start", "big", "--paused")
        os.sync()
        words = ("blockcommit", "big", "vda", "--active", "--pivot", "--wait")
        sample = at.virt.timed(*(words if verb == "commit" else ("blockpull", "big", "vda", "--wait")))
        gone, left = (top, base) if verb == "commit" else (base, top)
        with clock() as removal:
            gone.unlink()
        at.virt.virsh("destroy", "big")
        _compare(at, left)
        at.virt.virsh("undefine", "big")
        left.unlink()  # as the other ways leave nothing behind: the one after this would pay for it
        return {**sample, "wall": sample["wall"] + removal["wall"]}

    return way


def _write(random: Path, image: Path) -> None:
    subprocess.run([QEMU_IMG, "convert", "-n", "-f", "raw", "-O", "qcow2", random, image], check=True)


def _compare(at: Setting, image: Path) -> None:
    random = at.folder / "random"
    subprocess.run([QEMU_IMG, "compare", "-q", "-f", "raw", "-F", "qcow2", random, image], check=True)
