"""``bench fork``: how soon a fork runs and answers, beside a bare script, an in-process load and a revert."""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anyio
from msgspec.structs import replace
from qemu.qmp import ConnectError, QMPClient

import qmpsnap
from qmpsnap.machine import agent, templates
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.model.layers.vmstate import version_of
from qmpsnap.ops.fork import bake, upkeep
from qmpsnap.ops.fork import run as forking
from qmpsnap.ops.fork.identity import ANSWER
from qmpsnap.ops.fork.pool import pss
from tests.bench import guests
from tests.bench.guests import MIB

RATIO, MEDIAN_MS = 1.6, 200.0
"""What a fork may take: times the bare script, and milliseconds, on a quiet host under TCG."""
POOL_MS, POOL_P99_MS = 80.0, 200.0
"""Milliseconds until a test has a machine from a pool and that one's first answer."""
GROWTH = 1.2
"""Times the smallest guest's fork that one of the largest may take."""
HUNDRED = 100
LOADED_MIB, ANSWERED_MIB = 4096.0, 4915.0
"""What a hundred forks of 256 MiB may take up, loaded and waiting, and after a first command."""

SIZE = 4
"""Forks that a pool has waiting."""
BAKES = 3
"""Times that a template is made."""

Times = dict[str, list[float]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="forks of each way (10)")
    parser.add_argument("--memory", default="256,2048", metavar="MIB,...", help="sizes of the guest (256,2048)")
    parser.add_argument("--forks", default="1,10,50,100", metavar="N,...", help="forks whose memory is measured")
    parser.add_argument("--limit", action="store_true", help="fail where a fork is slower than it may be")


def run(folder: Path, given: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    os.environ["QMPSNAP_TEMPLATES"] = str(_shelf(folder))
    sizes, counts = ([int(word) for word in text.split(",")] for text in (given.memory, given.forks))
    try:
        slow = anyio.run(_all, folder, given.rounds, sizes, counts)
    finally:
        shutil.rmtree(os.environ["QMPSNAP_TEMPLATES"], ignore_errors=True)
    return int(bool(given.limit and slow))


def _shelf(folder: Path) -> Path:
    """In memory, where there is room."""
    return templates.MEMORY / folder.name if templates.is_memory(templates.MEMORY) else folder / "templates"


async def _all(folder: Path, rounds: int, sizes: Sequence[int], counts: Sequence[int]) -> bool:
    slow, first = False, True
    forks: list[float] = []
    async with qmpsnap.open() as q:
        for size in sizes:
            vm = await q.define(replace(guests.booting(f"guest{size}"), memory=size * MIB))
            await vm.start()
            guests.answers(guests.agent_of(vm.name))
            await vm.snapshot("warm", kind="full")
            print(f"\n{size} MiB of memory, QEMU {(await _process(vm)).qemu_version}, load {os.getloadavg()[0]:.1f}")
            is_slow, fork = await _forks(folder, vm, rounds)
            forks.append(fork)
            await _others(vm, rounds)
            slow |= is_slow | await _pool(vm, rounds)
            if first:
                slow |= await _memory(vm, counts)
            first = False
            await vm.stop(force=True)
    if len(sizes) > 1:
        growth = forks[-1] / forks[0]
        print(f"\n  {f'fork to running, {sizes[-1]} MiB to {sizes[0]}':44} {growth:8.2f}   (limit: {GROWTH:g})")
        slow |= growth > GROWTH
    return slow


async def _process(vm: qmpsnap.MachineHandle) -> qmpsnap.Process:
    found = (await vm.record()).process
    assert found
    return found


# --- one fork ---------------------------------------------------------------------------------------------------------


async def _forks(folder: Path, vm: qmpsnap.MachineHandle, rounds: int) -> tuple[bool, float]:
    """Whether they are slow, and what a fork takes."""
    q = vm._context
    baking = await _baking(vm)
    _say("bake alone", baking)
    await vm.fork("warm", "pattern", paused=True)
    pattern = qmpsnap.MachineHandle(q, "pattern")
    script = await _script(folder, pattern)
    times: Times = {}
    for number in range(-1, rounds):
        kept: Times = {} if number < 0 else times
        if number % 2:
            await _bare(script, kept)
        await _fork(vm, kept)
        if not number % 2:
            await _bare(script, kept)
    await pattern.stop(force=True)
    await pattern.undefine(disks="remove")
    for name, found in times.items():
        _say(name, found)
    fork, bare = (statistics.median(times[name]) for name in ("fork to running", "bare script to running"))
    print(f"  {'ratio':44} {fork / bare:8.2f}   (limits: {RATIO:g} and {MEDIAN_MS:g} ms)")
    return fork > MEDIAN_MS or fork / bare > RATIO, fork


async def _baking(vm: qmpsnap.MachineHandle) -> list[float]:
    """What the template takes, which every snapshot's first fork makes."""
    found: list[float] = []

    async def baking() -> None:
        pass

    source = await forking.source_of(vm._context, vm.name, "warm")
    for _ in range(BAKES):
        await upkeep.prune(vm._context, all=True)
        since = time.monotonic()
        async with bake.template_of(vm._context, source, baking=baking):
            found.append(_ms(since))
    return found


async def _fork(vm: qmpsnap.MachineHandle, times: Times) -> None:
    since = time.monotonic()
    (fork,) = await vm.fork("warm", ephemeral=True)
    times.setdefault("fork to running", []).append(_ms(since))
    child = qmpsnap.MachineHandle(vm._context, fork.machine.name)
    await child.run(["true"])
    times.setdefault("fork to the agent's first answer", []).append(_ms(since))
    since = time.monotonic()
    await child.run(["true"])
    times.setdefault("one more command", []).append(_ms(since))
    await child.stop(force=True)


# --- the bare script --------------------------------------------------------------------------------------------------


class Script(NamedTuple):
    """A QEMU's folder and arguments, the stream that it loads, and the file below its disk.

    ``by_name``: it can be given the stream's name; else a descriptor.
    """

    folder: Path
    words: list[str]
    devices: str
    backing: str
    by_name: bool


async def _script(folder: Path, pattern: qmpsnap.MachineHandle) -> Script:
    """The arguments of a fork's QEMU, changed so that a script can start it: files by name, nothing inherited."""
    process = await _process(pattern)
    words = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[:-1]
    (shelf,) = templates.shelves(pattern._context.home)
    place = shelf.of(shelf.all()[-1].key)
    overlay = (await pattern.chains())[0].active
    backing = (await pattern.chains())[0].layers[-2].layer
    mine = folder / "bare"
    mine.mkdir(exist_ok=True)
    changed = []
    for word in words:
        if "/proc/self/fd/" in word:
            memory = json.loads(word) | {"mem-path": str(place / templates.RAM)}
            changed.append(json.dumps(memory))
        else:
            changed.append(word.replace(overlay.path, str(mine / "overlay")))
    by_name = version_of(process.qemu_version) >= (8, 2)
    return Script(mine, changed, str(place / templates.DEVICES), backing.path, by_name)


async def _bare(script: Script, times: Times) -> None:
    folder = script.folder
    image = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"
    since = time.monotonic()
    with contextlib.suppress(FileNotFoundError):
        (folder / "overlay").unlink()
    create = [image, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", script.backing, str(folder / "overlay")]
    made = await asyncio.create_subprocess_exec(*create)
    assert await made.wait() == 0
    null = subprocess.DEVNULL
    process = subprocess.Popen(script.words, cwd=folder, stdin=null, stdout=null, stderr=null)
    qemu = QMPClient("bare")
    try:
        while True:
            try:
                await qemu.connect(str(folder / "qmp.sock"))
                break
            except ConnectError:
                assert process.poll() is None, "the script's QEMU has ended"
                await asyncio.sleep(0.002)
        state = [{"capability": "x-ignore-shared", "state": True}]
        await qemu.execute("migrate-set-capabilities", {"capabilities": state})
        if script.by_name:
            await qemu.execute("migrate-incoming", {"uri": f"file:{script.devices}"})
        else:
            descriptor = os.open(script.devices, os.O_RDONLY)
            qemu.send_fd_scm(descriptor)
            await qemu.execute("getfd", {"fdname": "state"})
            os.close(descriptor)
            await qemu.execute("migrate-incoming", {"uri": "fd:state"})
        while True:
            status: Any = await qemu.execute("query-status")
            if status["status"] != "inmigrate":
                break
            await asyncio.sleep(0.001)
        await qemu.execute("cont")
        times.setdefault("bare script to running", []).append(_ms(since))
        async with agent.connect(folder / AGENT_SOCKET, machine="bare", deadline=ANSWER) as guest:
            await guest.run(["true"], deadline=ANSWER)
        times.setdefault("bare script to the agent's first answer", []).append(_ms(since))
        await qemu.disconnect()
    finally:
        process.kill()
        process.wait()
        (folder / "qmp.sock").unlink(missing_ok=True)


# --- what there was before --------------------------------------------------------------------------------------------


async def _others(vm: qmpsnap.MachineHandle, rounds: int) -> None:
    await vm.snapshot("inside", kind="internal")
    times: Times = {}
    for _ in range(max(2, rounds // 3)):
        since = time.monotonic()
        await vm.revert("inside", discard=True, after=False)
        times.setdefault("in-process load (snapshot-load), library", []).append(_ms(since))
    await vm.delete_snapshots("inside")
    for _ in range(max(2, rounds // 3)):
        since = time.monotonic()
        await vm.revert("warm", discard=True, after=False)
        times.setdefault("snapshot revert to memory, library", []).append(_ms(since))
    for name, found in times.items():
        _say(name, found)


# --- pools and memory -------------------------------------------------------------------------------------------------


async def _pool(vm: qmpsnap.MachineHandle, rounds: int) -> bool:
    times: Times = {}
    async with vm.pool("warm", size=SIZE) as pool:
        for refill in ("idle", "running"):
            for _ in range(rounds):
                while pool.waiting < (SIZE if refill == "idle" else 1):  # an empty pool is not warm
                    await anyio.sleep(0.01)
                since = time.monotonic()
                async with pool.take() as machine:
                    times.setdefault(f"from a pool, refill {refill}", []).append(_ms(since))
                    await machine.run(["true"])
                    times.setdefault(f"and its first answer, refill {refill}", []).append(_ms(since))
    for name, found in times.items():
        _say(name, found)
    answers = [found for name, found in times.items() if "answer" in name]
    print(f"  {'limits of the first answer from a pool':44} {POOL_MS:8.0f} ms  p99 {POOL_P99_MS:8.0f}")
    return any(statistics.median(found) > POOL_MS or _p99(found) > POOL_P99_MS for found in answers)


async def _memory(vm: qmpsnap.MachineHandle, counts: Iterable[int]) -> bool:
    slow = False
    names: list[str] = []
    context = vm._context
    for count in counts:
        made = await vm.fork("warm", count=count - len(names), ephemeral=True, paused=True)
        names += [fork.machine.name for fork in made]
        slow |= await _tell_pss(context, names, "loaded and waiting", LOADED_MIB)
    forks = [qmpsnap.MachineHandle(context, name) for name in names]
    for fork in forks:
        await fork.resume()
        await fork.run(["true"])
        await fork.pause()
    slow |= await _tell_pss(context, names, "after a first command", ANSWERED_MIB)
    for fork in forks:
        await fork.stop(force=True)
    return slow


async def _tell_pss(context: Any, names: Sequence[str], when: str, limit: float) -> bool:
    """Print it; returns whether it is too much."""
    found = await _pss(context, names)
    limited = f"   (limit: {limit:.0f} MiB)" if len(names) == HUNDRED else ""
    print(f"  {f'PSS of {len(names)} forks, {when}':44} {found:8.0f} MiB{limited}")
    return bool(limited) and found > limit


async def _pss(context: Any, names: Sequence[str]) -> float:
    machines = [await context.astore.machine(name) for name in names]
    return sum(pss(found.pid) for machine in machines if (found := context.process(machine))) / MIB


def _ms(since: float) -> float:
    return (time.monotonic() - since) * 1000


def _p99(found: Sequence[float]) -> float:
    return sorted(found)[max(0, -(-len(found) * 99 // 100) - 1)]


def _say(name: str, found: Sequence[float]) -> None:
    middle, worst, best = statistics.median(found), _p99(found), min(found)
    print(f"  {name:44} {middle:8.0f} ms  p99 {worst:8.0f}  best {best:8.0f}  ({len(found)})")
