"""``scripts/bench volume``: how long volume snapshots hold a guest that reads and writes, and a reflink under pause.

On an xfs of its own, on a loop mount: only root can run it. The image is in pieces of 4 KiB. Beside the transaction's
time stands the guest's longest uncached read and write while the snapshot was taken, by its own clock (10 ms).
Then a series of snapshots: what the last cost beside the first, and what deleting half of them moved.
"""

import argparse
import fcntl
import json
import os
import statistics
import time
from pathlib import Path

from qmpsnap.volumes.reflink import FICLONE
from tests.bench.program import fail, typed
from tests.harness import mounts

_BLOCK = 4096
_WINDOW = 20
"""How many snapshots at each end of a series are compared, by their median."""
_SPEC = """\
name: bench
memory: 256M
kernel: "@guest/vmlinux"
initrd: "@guest/initrd"
append: console=ttyS0 quiet panic=-1
disks: [{{name: vda, image: {image}, format: raw, cache: none}}]
"""
_LOAD = """\
io() {
  m=0
  while :; do
    [ -e /run/reset-$1 ] && { m=0; echo 0 >/run/max-$1; rm /run/reset-$1; }
    read a _ </proc/uptime; dd $2 bs=4k count=1 2>/dev/null; read b _ </proc/uptime
    d=$((${b%.*}${b#*.} - ${a%.*}${a#*.})); [ $d -gt $m ] && { m=$d; echo $m >/run/max-$1; }
  done
}
exec >/dev/null 2>&1 </dev/null
io read "if=/dev/vda of=/dev/null iflag=direct skip=777" &
io write "if=/dev/zero of=/dev/vda oflag=direct seek=777 conv=notrunc" &
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What ``volume`` takes."""
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="snapshots of each kind (6)")
    parser.add_argument("--extents", type=int, default=20_000, metavar="N", help="pieces of the image (20000)")
    parser.add_argument("--series", type=int, default=200, metavar="N", help="snapshots in a row after them (200)")
    parser.add_argument("--limit", type=float, default=5, metavar="MS", help="median pause that is a failure (5)")


def run(folder: Path, arguments: argparse.Namespace) -> int:
    """Take snapshots; returns the exit code."""
    with mounts.mounted("xfs", folder, mib=4096) as place:
        image = place / "image.raw"
        _scatter(image, arguments.extents)
        (folder / "bench.yaml").write_text(_SPEC.format(image=image))
        typed("define", str(folder / "bench.yaml"), "--allow", str(place))
        typed("start", "bench")
        try:
            typed("exec", "bench", "--", "sh", "-c", _LOAD)
            over = _rounds(image, arguments)
            return _series(arguments.series) | over
        finally:
            typed("stop", "bench", "--force")


def _scatter(image: Path, extents: int) -> None:
    """An image of 1 GiB with every piece apart from the next."""
    half = (1 << 30) // _BLOCK // 2
    places = [number * 7919 % half for number in range(min(extents, half))]
    with image.open("wb") as file:
        file.truncate(1 << 30)
        for at in places:
            os.pwrite(file.fileno(), os.urandom(_BLOCK), 2 * at * _BLOCK)
        os.fsync(file.fileno())


def _rounds(image: Path, arguments: argparse.Namespace) -> int:
    print(f"image of {arguments.extents} extents on xfs, Linux {os.uname().release}; milliseconds")
    print("round   volume: pause  longest read  longest write   reflink while paused")
    pauses: list[float] = []
    held: list[float] = []
    for number in range(arguments.rounds):
        typed("exec", "bench", "--", "sh", "-c", "touch /run/reset-read /run/reset-write; sleep 1")
        taken = json.loads(typed("snapshot", "create", "bench", "--kind", "volume", "-o", "json"))
        worst = typed("exec", "bench", "--", "sh", "-c", "cat /run/max-read /run/max-write").split()
        pauses.append(taken["snapshot"]["pause_ms"])
        held.append(_paused_reflink(image))
        read, write = (int(value) * 10 for value in worst)
        print(f"{number + 1:5}   {pauses[-1]:13.1f}  {read:12}  {write:13}   {held[-1]:20.1f}", flush=True)
    print(f"median  {statistics.median(pauses):13.1f}  {'':12}  {'':13}   {statistics.median(held):20.1f}")
    return int(statistics.median(pauses) > arguments.limit)


def _series(number: int) -> int:
    """Take snapshots in a row and delete every second one; returns 1 where they get dearer or anything is moved."""
    if number < 2 * _WINDOW:
        return 0
    took: list[float] = []
    for taken in range(number):
        since = time.monotonic()
        typed("snapshot", "create", "bench", f"s{taken}", "--kind", "volume")
        took.append((time.monotonic() - since) * 1000)
    depth = len(json.loads(typed("chain", "bench", "-o", "json"))["disks"][0]["layers"])
    first, last = statistics.median(took[:_WINDOW]), statistics.median(took[-_WINDOW:])
    gone = [f"s{taken}" for taken in range(0, number, 2)]
    moved = json.loads(typed("snapshot", "delete", "bench", *gone, "-o", "json"))["bytes"]
    print(f"{number} in a row: the first {_WINDOW} {first:.0f} each, the last {_WINDOW} {last:.0f}: {last / first:.2f}")
    print(f"layers of the disk then: {depth}; deleting {len(gone)} of them moved {moved} bytes")
    return int(last > 1.5 * first or depth != 1 or moved > 0)


def _paused_reflink(image: Path) -> float:
    """What others do: hold the guest, clone the image, let it go on."""
    copy = image.with_name("copy")
    typed("pause", "bench")
    try:
        with image.open("rb") as source, copy.open("wb") as target:
            since = time.monotonic()
            fcntl.ioctl(target, FICLONE, source.fileno())
            took = (time.monotonic() - since) * 1000
    except OSError as error:
        fail(["FICLONE", str(image)], 1, str(error))
    finally:
        typed("resume", "bench")
        copy.unlink(missing_ok=True)
    return took
