"""``scripts/bench pause``: how long full snapshots hold a guest that writes to 64 MiB of its memory without end.

By QEMU's own STOP and RESUME, for each size of memory, and for some sizes with all of it in use. Beside it how long the
same guest stands still when it is saved while it is stopped.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

from tests.bench.program import PYTHON, QEMU_IMG, QMPSNAP, in_turns, typed

WAYS = ("bare", "qmpsnap")
PREFERRED = ["nice", "-n", "-10"] if os.geteuid() == 0 else []
"""Before what is timed in milliseconds: on a busy host who has worked longer until then would wait longer."""

SPEC = """\
name: bench
memory: {memory}M
kernel: "@guest/vmlinux"
initrd: "@guest/initrd"
append: console=ttyS0 quiet panic=-1
disks: [{{name: vda, size: 64M}}]
"""

DIRTY = """\
mount -o remount,size=95% tmpfs /dev/shm && dd if=/dev/urandom of=/run/mib bs=1M count=1 2>/dev/null || exit 1
pass() { i=0; while [ $i -lt 64 ]; do dd if=/run/mib of=/dev/shm/dirty bs=1M seek=$i conv=notrunc; i=$((i + 1)); done; }
pass 2>/dev/null
(while :; do pass; done) >/dev/null 2>&1 </dev/null &
"""
"""Writes to the same 64 MiB of memory without end; each MiB of it is no zeroes."""

FILL = """\
left=$(($(awk '/^MemAvailable/ {print $2}' /proc/meminfo) / 1024 - 48))
while [ $left -gt 0 ]; do cat /run/mib; left=$((left - 1)); done >/dev/shm/fill; rm /dev/shm/fill
"""
"""Writes to all memory that is free: the host never gets it back."""

BARE = """\
import asyncio, json, os, sys, time
from qemu.qmp import QMPClient

async def main(socket, node, overlay, state):
    qemu = QMPClient("bare")
    await qemu.connect(socket)
    await qemu.execute("blockdev-add", {"driver": "qcow2", "node-name": "bare", "backing": None,
        "file": {"driver": "file", "filename": overlay}})
    version = (await qemu.execute("query-version"))["qemu"]
    uri = "file:" + state
    file = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    if (version["major"], version["minor"]) < (8, 2):
        qemu.send_fd_scm(file)
        await qemu.execute("getfd", {"fdname": "bare"})
        uri = "fd:bare"
    def background(on):
        return qemu.execute("migrate-set-capabilities",
            {"capabilities": [{"capability": "background-snapshot", "state": on}]})
    await background(True)
    await qemu.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    steps, at = {}, {}
    async def step(name, *command):
        since = time.monotonic()
        await qemu.execute(*command)
        steps[name] = (time.monotonic() - since) * 1000
    with qemu.listener(("STOP", "RESUME")) as events:
        await step("stop", "stop")
        await step("transaction", "transaction",
            {"actions": [{"type": "blockdev-snapshot", "data": {"node": node, "overlay": "bare"}}]})
        await step("migrate", "migrate", {"uri": uri})
        since = time.monotonic()
        while True:
            found = await qemu.execute("query-migrate")
            ram = found.get("ram", {})
            if found["status"] == "completed" or ram.get("normal", 0) + ram.get("duplicate", 0) > 0:
                break
        steps["tracking"] = (time.monotonic() - since) * 1000
        await step("cont", "cont")
        while len(at) < 2:
            event = await events.get()
            stamp = event["timestamp"]
            at.setdefault(event["event"], stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3)
    while (found := await qemu.execute("query-migrate"))["status"] != "completed":
        assert found["status"] == "active", found
        await asyncio.sleep(0.01)
    await background(False)
    # Back to the chain as it was: the next one is to find what this one has found.
    with qemu.listener("JOB_STATUS_CHANGE") as events:
        async def comes(status):
            async for event in events:
                if event["data"]["id"] == "bare" and event["data"]["status"] == status:
                    return
        await qemu.execute("block-commit", {"job-id": "bare", "device": "bare", "auto-dismiss": False})
        await comes("ready")
        await qemu.execute("job-complete", {"id": "bare"})
        await comes("concluded")
    await qemu.execute("job-dismiss", {"id": "bare"})
    await qemu.execute("blockdev-del", {"node-name": "bare"})
    await qemu.disconnect()
    os.close(file)
    os.unlink(overlay)
    os.unlink(state)
    print(json.dumps({"pause": at["RESUME"] - at["STOP"], "steps": steps}))

asyncio.run(main(*sys.argv[1:]))
"""
"""The recipe and nothing else: no journal, no check, no digest."""

STEPS = ("stop", "transaction", "migrate", "tracking", "cont")
SAVES = 3
"""Stopped saves of each size: each means another QEMU."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What ``pause`` takes."""
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="snapshots of each size and way (10)")
    parser.add_argument(
        "--memory",
        type=sizes,
        default=(256, 1024, 4096, 8192),
        metavar="MIB,...",
        help="sizes of the guest (256,1024,4096,8192; 0: none)",
    )
    parser.add_argument(
        "--resident",
        type=sizes,
        default=(1024,),
        metavar="MIB,...",
        help="sizes of the guest that uses all of it (1024; 0: none)",
    )
    parser.add_argument("--limit", type=float, default=3, metavar="MS", help="how much of our own is a failure (3)")


def sizes(text: str) -> tuple[int, ...]:
    """Sizes in MiB as typed."""
    return tuple(int(size) for size in text.split(","))


def run(folder: Path, arguments: argparse.Namespace) -> int:
    """Time full snapshots; returns the exit code."""
    print(f"pause in ms, {arguments.rounds} full snapshots of each guest, {SAVES} stopped saves")
    print(
        f"{'MiB':>16} {'way':9}{'best':>8}{'median':>8}{'worst':>8}  medians:"
        + "".join(f"{step:>12}" for step in STEPS)
    )
    guests = [(size, False) for size in arguments.memory if size]
    guests += [(size, True) for size in arguments.resident if size]
    over = [label for size, used in guests if (label := pauses(folder, size, arguments, used=used))]
    for label in over:
        print(f"own share above {arguments.limit:g} ms: {label}")
    return int(bool(over))


def pauses(folder: Path, size: int, arguments: argparse.Namespace, *, used: bool) -> str:
    """Time one size of guest, ``used``: all of its memory; returns what it is called if our share is over the limit."""
    (folder / "bench.yaml").write_text(SPEC.format(memory=size))
    typed("define", str(folder / "bench.yaml"))
    try:
        typed("start", "bench")
        typed("exec", "--timeout", "300", "bench", "--", "sh", "-c", DIRTY + (FILL if used else ""))
        held: dict[str, list[tuple[float, dict[str, float]]]] = {way: [] for way in WAYS}
        for number in range(arguments.rounds):
            for way in in_turns(WAYS, number):
                held[way].append(pause_bare(folder) if way == "bare" else pause_ours())
        resident = in_memory()
        saved = [stopped() for _ in range(SAVES)]
    finally:
        subprocess.run([QMPSNAP, "stop", "bench", "--force"], check=False, capture_output=True)
    typed("undefine", "bench", "--remove-disks")

    label = f"{size} ({resident} used)"
    for way in WAYS:
        show(label if way == "bare" else "", way, held[way])
    shares = [ours - bare for (bare, _), (ours, _) in zip(held["bare"], held["qmpsnap"], strict=True)]
    own = statistics.median(shares)
    bare, ours = (statistics.median(pause for pause, _ in held[way]) for way in WAYS)
    print(f"{'':17}own share {own:.1f} ms (median of the rounds), ratio of the medians {ours / bare:.2f}")
    show("", "stopped", saved)
    return f"{label}: {own:.1f} ms" if own > arguments.limit else ""


def show(label: str, way: str, found: list[tuple[float, dict[str, float]]]) -> None:
    """One line of the table."""
    pauses = [pause for pause, _ in found]
    medians = (statistics.median(steps.get(step, 0) for _, steps in found) for step in STEPS)
    line = "".join(f"{median:12.1f}" for median in medians)
    held = "".join(f"{found:8.1f}" for found in (min(pauses), statistics.median(pauses), max(pauses)))
    print(f"{label:>16} {way:9}{held}  {'':8}{line}", flush=True)


def pause_ours() -> tuple[float, dict[str, float]]:
    """Hold the guest by a full snapshot of qmpsnap's, which is deleted again; ms, and ms of each step."""
    found = json.loads(typed("snapshot", "create", "bench", "--kind", "full", "-o", "json", by=PREFERRED))["snapshot"]
    typed("snapshot", "delete", "bench", found["name"])
    assert found["vmstate"]["mode"] == "background", "this host has no background snapshots: qmpsnap doctor"
    return found["pause_ms"], found["vmstate"]["steps_ms"]


def pause_bare(folder: Path) -> tuple[float, dict[str, float]]:
    """Hold the guest by the bare script, the same way."""
    active = json.loads(typed("chain", "bench", "-o", "json"))["disks"][0]["layers"][-1]
    overlay, socket = folder / "bare.qcow2", folder / "home" / "run" / "bench" / "user.sock"
    backing = ["-b", active["path"], "-F", "qcow2"]
    subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", *backing, overlay], check=True)
    argv = [*PREFERRED, PYTHON, "-c", BARE, socket, active["layer"], overlay, folder / "bare.state"]
    found = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
    return found["pause"], found["steps"]


def stopped() -> tuple[float, dict[str, float]]:
    """Save the guest while it stands still and let it go on; ms from its stop until all is written."""
    found = json.loads(typed("save", "bench", "--progress", "none", "-o", "json"))["snapshot"]
    typed("restore", "bench", "--discard")
    typed("snapshot", "delete", "bench", found["name"])
    steps = found["vmstate"]["steps_ms"]
    return sum(steps.values()), steps


def in_memory() -> int:
    """MiB of the guest that lie in the host's memory, with QEMU itself."""
    pid = json.loads(typed("show", "bench", "-o", "json"))["pid"]
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
