"""Snapshots with the guest's memory: how long they take, how long they pause the guest, how soon it answers again."""

import time

import qmpsnap
from tests.bench import bare, guests
from tests.bench.creating import domain, undo_virsh
from tests.bench.measure import Way, clock
from tests.bench.program import QMPSNAP, Sample, run
from tests.bench.setting import Setting

FILES = ("full", "revert")
INSIDE = ("load", "load-kept")
MEASURES = (*FILES, *INSIDE)


async def measure(at: Setting) -> None:
    """Time them."""
    async with qmpsnap.open() as q:
        if at.results.wants(*FILES):
            await _in_files(at, q)
        if at.results.wants(*INSIDE):
            await _inside(at, q)


async def _in_files(at: Setting, q: qmpsnap.Controller) -> None:
    domain(at, "memory")
    async with guests.booted(q, "memory") as vm:
        at.virt.virsh("start", "memory")
        guests.answers(at.virt.agent_of("memory"))
        await at.results.compare("full", {"qmpsnap": _full(vm), "virsh": _virsh_full(at)})
        await vm.snapshot("kept", kind="full")
        await at.results.compare("revert", {"qmpsnap": _revert(vm), "virsh": _restore(at)})
        at.virt.virsh("destroy", "memory")


def _full(vm: qmpsnap.MachineHandle) -> Way:
    async def way() -> Sample:
        async with guests.held(guests.monitor_of(vm.name)) as held:
            sample = run(QMPSNAP, "snapshot", "create", vm.name, "s", "--kind", "full")
        await vm.delete_snapshots("s")
        return {**sample, **held}

    return way


def _virsh_full(at: Setting) -> Way:
    async def way() -> Sample:
        state = at.folder / "memory.state"
        words = ("snapshot-create-as", "memory", "s", "--memspec", f"file={state},snapshot=external", "--live")
        async with guests.held(at.virt.monitor_of("memory")) as held:
            sample = at.virt.timed(*words, "--diskspec", "vda,snapshot=external", "--atomic")
        undo_virsh(at, "memory", "s")
        state.unlink()
        return {**sample, **held}

    return way


def _revert(vm: qmpsnap.MachineHandle) -> Way:
    """From a machine that does not run, and without setting the guest's clock, as ``virsh restore`` has it."""

    async def way() -> Sample:
        await vm.stop(force=True)
        since = time.monotonic()
        sample = run(QMPSNAP, "snapshot", "revert", vm.name, "kept", "--discard", "--no-after")
        guests.answers(guests.agent_of(vm.name))
        return {**sample, "wall": (time.monotonic() - since) * 1000}

    return way


def _restore(at: Setting) -> Way:
    async def way() -> Sample:
        state = at.folder / "memory.save"
        at.virt.virsh("save", "memory", str(state))
        since = time.monotonic()
        sample = at.virt.timed("restore", str(state))
        guests.answers(at.virt.agent_of("memory"))
        return {**sample, "wall": (time.monotonic() - since) * 1000}

    return way


# --- inside the images ------------------------------------------------------------------------------------------------


async def _inside(at: Setting, q: qmpsnap.Controller) -> None:
    """Two guests alike: qmpsnap does not know what the script does to the other one."""
    async with guests.booted(q, "inside") as vm, guests.booted(q, "script") as other:
        await vm.snapshot("kept", kind="internal")
        socket, (node, _) = guests.monitor_of("script"), await guests.active(other)
        await bare.save(socket, node, "kept")

        async def load() -> Sample:
            with clock() as sample:
                await bare.load(socket, node, "kept")
            return sample

        async def save_and_load() -> Sample:
            with clock() as sample:
                await bare.save(socket, node, "present")
                await bare.load(socket, node, "kept")
            await bare.delete(socket, node, "present")
            return sample

        await at.results.compare("load", {"library": _load(vm, discard=True), "bare": load})
        await at.results.compare("load-kept", {"library": _load(vm, discard=False), "bare": save_and_load})


def _load(vm: qmpsnap.MachineHandle, *, discard: bool) -> Way:
    async def way() -> Sample:
        with clock() as sample:
            await vm.revert("kept", discard=discard, after=False)
        others = [found.name for found in await vm.snapshots() if found.name != "kept"]
        if others:
            await vm.delete_snapshots(*others)
        return sample

    return way
