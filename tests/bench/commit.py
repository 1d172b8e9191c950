"""``scripts/bench commit``: the active layer, full of random bytes, goes into an empty base under a paused QEMU.

Both are processes of their own and end alike: job dismissed, node closed, file of the merged layer removed.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from tests.bench.merging import SCRIPT
from tests.bench.program import PYTHON, QEMU_IMG, QMPSNAP, fill, in_turns, typed

WAYS = ("bare", "qmpsnap")
SPEC = "name: bench\nmemory: 64M\nagent: false\ndisks: [{{name: vda, size: {size}M}}]\n"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What ``commit`` takes."""
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="times each is run (6), an even number")
    parser.add_argument("--mib", type=int, default=1024, metavar="N", help="size in MiB (1024)")
    parser.add_argument("--limit", type=float, default=5, metavar="PERCENT", help="how much slower is a failure (5)")


def run(folder: Path, arguments: argparse.Namespace) -> int:
    """Time commits; returns the exit code."""
    times: dict[str, list[float]] = {"bare": [], "qmpsnap": []}
    (folder / "bench.yaml").write_text(SPEC.format(size=arguments.mib))
    fill(folder / "random", arguments.mib)
    print(f"commit of {arguments.mib} MiB, seconds")
    print("round     bare  qmpsnap")
    for number in range(arguments.rounds):
        for way in in_turns(WAYS, number):
            times[way].append(commit(folder, way))
        print(f"{number + 1:5}  {times['bare'][-1]:7.3f}  {times['qmpsnap'][-1]:7.3f}", flush=True)
    bare, ours = (statistics.median(times[way]) for way in ("bare", "qmpsnap"))
    print(f"median {bare:7.3f}  {ours:7.3f}  ratio {ours / bare:.3f}")
    return int(ours > bare * (1 + arguments.limit / 100))


def commit(folder: Path, way: str) -> float:
    """Time one commit on a machine made for it; seconds."""
    typed("define", str(folder / "bench.yaml"))
    typed("snapshot", "create", "bench", "--no-snapshot")  # else the script's commit would be refused as damage
    layers = json.loads(typed("chain", "bench", "-o", "json"))["disks"][0]["layers"]
    base, overlay = (Path(layer["path"]) for layer in layers)
    subprocess.run([QEMU_IMG, "convert", "-n", "-f", "raw", "-O", "qcow2", folder / "random", overlay], check=True)
    typed("start", "bench", "--paused")
    os.sync()  # what the set-up has written must not be waited for by what is timed
    socket = folder / "home" / "run" / "bench" / "user.sock"
    argv: list[str | Path] = [PYTHON, SCRIPT, "commit", socket, *(layer["layer"] for layer in layers), overlay]
    if way == "qmpsnap":
        argv = [QMPSNAP, "commit", "bench", "vda"]
    since = time.monotonic()
    subprocess.run(argv, check=True, capture_output=True)
    took = time.monotonic() - since
    typed("stop", "bench", "--force")
    assert not overlay.exists()
    subprocess.run([QEMU_IMG, "compare", "-q", "-f", "raw", "-F", "qcow2", folder / "random", base], check=True)
    typed("undefine", "bench", "--remove-disks")
    return took
