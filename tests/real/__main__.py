"""Snapshots of each kind are taken of a Debian whose database and counters are under load, and gone back to.

``python -m tests.real FOLDER``: the folder has what tests/real/build makes. Says what it does; fails at the first lie.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "debian"
SPEC = """\
name: {name}
memory: 512M
kernel: "{folder}/vmlinuz"
initrd: "{folder}/initrd"
append: root=/dev/vda console=ttyS0 quiet panic=-1
disks:
  - {{name: vda, base: "{folder}/root.raw", format: raw}}
  - {{name: vdb, base: "{folder}/data.raw", format: raw}}
"""
PATIENCE = 1800
"""Seconds for a boot, or for a look at the database: an emulated guest on a busy host takes its time."""


@dataclass(frozen=True)
class Kind:
    """One way to take a snapshot: its options, whether the guest goes on from it, whether e2fsck finds it clean."""

    name: str
    options: tuple[str, ...] = ()
    memory: bool = False
    clean: bool = False


KINDS = (
    Kind("disks"),
    Kind("quiesced", ("--quiesce", "require", "--freeze-window", "60"), clean=True),
    Kind("tags", ("--kind", "internal", "--no-memory")),
    Kind("inside", ("--kind", "internal"), memory=True),
    Kind("full", ("--kind", "full"), memory=True),
)


def say(line: str) -> None:
    """Tell it now, with the seconds since the start."""
    sys.stdout.write(f"{time.monotonic() - SINCE:7.1f} s  {line}\n")
    sys.stdout.flush()


SINCE = time.monotonic()


def typed(*words: str, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
    """One command of qmpsnap."""
    script = Path(sys.executable).with_name("qmpsnap")
    done = subprocess.run([script, *words], check=False, capture_output=True, text=True)
    if done.returncode and not may_fail:
        sys.exit(f"real: qmpsnap {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def asked(*words: str) -> Any:
    """What a command answers."""
    return json.loads(typed(*words, "-o", "json").stdout)


def guest(*words: str) -> str:
    """What a program in the guest prints; it has to succeed."""
    return typed("exec", "--timeout", str(PATIENCE), NAME, "--", *words).stdout.strip()


def wait_for_guest() -> None:
    """Until its agent runs programs."""
    until = time.monotonic() + PATIENCE
    while typed("exec", "--timeout", "30", NAME, "--", "true", may_fail=True).returncode:
        if time.monotonic() > until:
            sys.exit("real: the guest does not come up")
        time.sleep(2)


def counter() -> int:
    """How far the guest has counted."""
    return int(guest("sh", "-c", "wc -l </var/counter"))


def verified() -> int:
    """Counters and database are whole; returns the counter."""
    told = guest("verify")
    return int(told.splitlines()[-1].removeprefix("counter "))


def take(kind: Kind) -> tuple[int, int]:
    """A snapshot under load; between which numbers it was."""
    before = counter()
    snapshot = asked("snapshot", "create", NAME, kind.name, *kind.options)["snapshot"]
    after = counter()
    pause, frozen = snapshot["pause_ms"], snapshot["frozen_ms"]
    say(f"took {kind.name} ({snapshot['level']}): counter {before} to {after}, held {pause} ms, frozen {frozen} ms")
    time.sleep(3)
    return before, after


def go_back(kind: Kind, low: int, high: int) -> None:
    """Revert to it under load; the guest is where it was."""
    reverted = asked("snapshot", "revert", NAME, kind.name)
    wait_for_guest()
    if kind.memory:
        going = counter()
        guest("load", "stop")
        if not low <= going:
            sys.exit(f"real: {kind.name} goes on at {going}, and was taken at {low} to {high}")
    found = verified()
    if not kind.memory and not low <= found <= high + 1:
        sys.exit(f"real: {kind.name} is at {found}, and was taken at {low} to {high}")
    say(f"reverted to {kind.name} ({reverted['state']}): whole, counter {found}")
    guest("load", "start")
    time.sleep(3)


def check_file_systems(kind: Kind, folder: Path) -> None:
    """e2fsck of both disks of a snapshot: clean once the journal is replayed, or at once."""
    points = asked("snapshot", "show", NAME, kind.name)["snapshot"]["disks"]
    tool = os.environ.get("QMPSNAP_QEMU_IMG", "qemu-img")
    for disk, point in points.items():
        raw = folder / "checked.raw"
        inside = ["-l", f"snapshot.name={point['tag']}"] if point["tag"] else []
        subprocess.run([tool, "convert", "-f", "qcow2", "-O", "raw", *inside, point["path"], raw], check=True)
        if not kind.clean and subprocess.run(["e2fsck", "-p", raw], check=False, capture_output=True).returncode > 1:
            sys.exit(f"real: {kind.name}: e2fsck cannot replay the journal of {disk}")
        found = subprocess.run(["e2fsck", "-fn", raw], check=False, capture_output=True, text=True)
        if found.returncode:
            sys.exit(f"real: {kind.name}: {disk} is not clean: {found.stdout}{found.stderr}")
        raw.unlink()
    say(f"e2fsck of {kind.name}: clean")


def run(folder: Path, home: Path) -> None:
    """All of it."""
    spec = home / "debian.yaml"
    spec.write_text(SPEC.format(name=NAME, folder=folder))
    typed("define", str(spec), "--allow", str(folder))
    typed("start", NAME)
    wait_for_guest()
    say(f"it runs: {asked('show', NAME)['qemu']}")
    guest("load", "prepare")
    guest("load", "start")
    say("PostgreSQL and counter are under load")
    time.sleep(5)
    taken = {kind: take(kind) for kind in KINDS}
    for kind in (*KINDS[::-1], KINDS[0]):
        go_back(kind, *taken[kind])
    typed("snapshot", "create", NAME, "last")
    typed("commit", NAME, "vdb", "--base", asked("chain", NAME, "vdb")["disks"][0]["layers"][-2]["layer"], "--consume")
    time.sleep(3)
    typed("stop", NAME, "--force")
    typed("start", NAME)
    wait_for_guest()
    say(f"after a commit of the active layer and a crash: whole, counter {verified()}")
    typed("stop", NAME, "--force")
    for kind in KINDS:
        check_file_systems(kind, home)
    automatic = [one["name"] for one in asked("snapshot", "list", NAME)["snapshots"] if one["name"].startswith("auto-")]
    typed("snapshot", "delete", NAME, *automatic)
    typed("check", NAME, "--deep")
    typed("start", NAME)
    wait_for_guest()
    say(f"after {len(automatic)} deletes: whole, counter {verified()}")
    for kind in KINDS:
        if kind.name != "inside":
            typed("snapshot", "delete", NAME, kind.name)
            say(f"after {kind.name} was deleted under it: whole, counter {verified()}")
    typed("check", NAME)


def main() -> int:
    """Returns the exit code."""
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the guest ends with it
    home = Path(tempfile.mkdtemp(prefix="qr-", dir="/var/tmp"))
    os.environ["QMPSNAP_HOME"] = str(home)
    try:
        run(folder, home)
    finally:
        typed("stop", NAME, "--force", may_fail=True)
        shutil.rmtree(home, ignore_errors=True)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
