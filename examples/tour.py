"""A tour of the command line on a small guest; what each snapshot holds is compared with what the guest said.

Usage: qmpsnap demo [--keep], or python tour.py GUEST [--keep]

GUEST is a folder with `vmlinux` and `initrd`, as `launch/guest/build` prints it. The machine is made in a temporary
home, so that no machine of yours is touched; `--keep` leaves that home behind. The exit code is 0 if all of it holds.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SPEC = """\
name: demo
kernel: "{guest}/vmlinux"
initrd: "{guest}/initrd"
append: console=ttyS0 quiet panic=-1
memory: 256M
disks:
  - {{name: vda, size: 64M}}
"""
ENVIRONMENT = dict(os.environ)
"""Of every command; :func:`main` adds the temporary home."""
WRITTEN = 16 << 20
"""Bytes at the start of the disk that are hashed."""
HASH = "echo 3 >/proc/sys/vm/drop_caches && dd if=/dev/vda bs=1M count=16 2>/dev/null | sha256sum | cut -c1-64"
WRITE = "test -b /dev/vda && dd if=/dev/urandom of=/dev/vda bs=1M count={0} conv=fsync 2>/dev/null && " + HASH
COUNT = "i=0; while :; do i=$((i + 1)); echo $i >/run/count; usleep 10000; done"
START_COUNTER = f"setsid sh -c {shlex.quote(COUNT)} >/dev/null 2>&1 </dev/null & echo $! >/run/counter; sleep 1"


class Failed(Exception):
    """A command did not end as it should, or something does not hold what the guest wrote."""


def tour(folder: Path) -> None:
    """Go from station to station."""
    said = {}

    station("A machine")
    qmpsnap("define", str(folder / "demo.yaml"))
    qmpsnap("start", "demo")

    station("A full snapshot: disks and memory of one instant, while a process counts in the guest")
    in_guest(START_COUNTER)
    qmpsnap("snapshot", "create", "demo", "counting", "--kind", "full")
    full = shown("counting")
    print(f"the guest was paused for {full['pause_ms']:.1f} ms ({full['vmstate']['mode']})")
    in_guest("kill -9 $(cat /run/counter)")
    qmpsnap("snapshot", "revert", "demo", "counting", "--discard")
    first, second = (int(count) for count in in_guest("cat /run/count; sleep 1; cat /run/count").split())
    judge(f"the process counts again: {first}, a second later {second}", good=second > first)
    qmpsnap("snapshot", "delete", "demo", "counting")

    station("Three snapshots of the disk while the guest runs")
    for name in ("first", "second", "third"):
        said[name] = in_guest(WRITE.format(16))
        qmpsnap("snapshot", "create", "demo", name, "-m", f"sha256 {said[name][:16]}")
    qmpsnap("tree", "demo")
    qmpsnap("chain", "demo")

    station("Stream: the active layer absorbs the layers above a base; every snapshot stays readable")
    qmpsnap("stream", "demo", "vda", "--base", "first")
    qmpsnap("chain", "demo")
    judge("the guest reads what it wrote", good=in_guest(HASH) == said["third"])

    station("Mirror: a copy without a backing file, made while the guest runs")
    qmpsnap("mirror", "demo", "vda", str(folder / "copy.qcow2"), "--finish")
    judge("the copy holds the same", good=content(folder / "copy.qcow2") == said["third"])

    station("Revert: back to the first snapshot; what was active is kept, and the tree branches")
    qmpsnap("snapshot", "revert", "demo", "first")
    judge("the guest reads what it had written first", good=in_guest(HASH) == said["first"])
    qmpsnap("snapshot", "create", "demo", "branch")
    qmpsnap("tree", "demo")

    station("Commit: the active layer is merged into the one below it while the guest runs")
    now = in_guest(WRITE.format(4))
    qmpsnap("commit", "demo", "vda", "--base", "branch", code=4)
    qmpsnap("commit", "demo", "vda", "--base", "branch", "--consume")
    qmpsnap("chain", "demo")
    judge("the guest reads what it wrote last", good=in_guest(HASH) == now)

    station("What the snapshots hold, read from the images by qemu-img")
    qmpsnap("stop", "demo", "--timeout", "20", "--force")
    for name, hashed in said.items():
        judge(f"snapshot {name} holds {hashed}", good=content(shown(name)["disks"]["vda"]["path"]) == hashed)

    station("Delete: the layer that no snapshot needs any more is merged, here of a stopped machine")
    qmpsnap("snapshot", "delete", "demo", "second", "--dry-run")
    qmpsnap("snapshot", "delete", "demo", "second")
    qmpsnap("tree", "demo")
    for name in ("first", "third"):
        judge(f"snapshot {name} still holds it", good=content(shown(name)["disks"]["vda"]["path"]) == said[name])


def station(title: str) -> None:
    """Begin a new part."""
    print(f"\n== {title}", flush=True)


def judge(claim: str, *, good: bool) -> None:
    """Print whether a claim holds."""
    print(f"{'ok ' if good else 'BAD'}  {claim}", flush=True)
    if not good:
        raise Failed(claim)


def qmpsnap(*words: str, code: int = 0) -> None:
    """Type a command; ``code`` is the exit code it should end with."""
    print(f"$ qmpsnap {shlex.join(words)}", flush=True)
    ended = command(*words).returncode
    if ended != code:
        raise Failed(f"qmpsnap ended with exit code {ended}")


def in_guest(script: str) -> str:
    """Run a shell script in the guest; returns its output."""
    patient = ("--timeout", "600")  # a busy host may take minutes to boot the guest
    print(f"$ qmpsnap exec {' '.join(patient)} demo -- sh -c {shlex.quote(script)}", flush=True)
    output = command("exec", *patient, "demo", "--", "sh", "-c", script, check=True, stdout=subprocess.PIPE).stdout
    print(output, end="", flush=True)
    return output.strip()


def shown(name: str) -> dict[str, Any]:
    """A snapshot as ``snapshot show`` describes it."""
    answer = command("snapshot", "show", "demo", name, "-o", "json", check=True, stdout=subprocess.PIPE).stdout
    snapshot: dict[str, Any] = json.loads(answer)["snapshot"]
    return snapshot


def command(*words: str, check: bool = False, **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run qmpsnap with the demo's home."""
    argv = [sys.executable, "-m", "qmpsnap", *words]
    return subprocess.run(argv, check=check, env=ENVIRONMENT, text=True, **streams)


def content(image: str | Path) -> str:
    """SHA-256 of what an image and its backing files hold in the bytes that the guest wrote."""
    with tempfile.NamedTemporaryFile() as raw:
        qemu_img = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"
        subprocess.run([qemu_img, "convert", "-f", "qcow2", "-O", "raw", image, raw.name], check=True)
        return hashlib.sha256(raw.read(WRITTEN)).hexdigest()


def main(guest: str, *options: str) -> int:
    """Take the tour in a home of its own; returns the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="qmpsnap-demo-"))
    ENVIRONMENT["QMPSNAP_HOME"] = str(folder)
    (folder / "demo.yaml").write_text(SPEC.format(guest=guest))
    try:
        tour(folder)
    except (Failed, subprocess.CalledProcessError) as error:
        print(f"\nthe tour failed: {error}", file=sys.stderr)
        return 1
    else:
        print("\neverything holds what the guest wrote")
        return 0
    finally:
        command("stop", "demo", "--force", stderr=subprocess.DEVNULL)
        if "--keep" in options:
            print(f"kept: export QMPSNAP_HOME={folder}")
        else:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
