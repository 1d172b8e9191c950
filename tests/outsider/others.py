"""Other programs at the images: they read, hold, lock, copy, link, move, replace and overwrite them."""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.outsider import births, looks
from tests.outsider.contents import Anything
from tests.outsider.faults import Fault, Hit
from tests.outsider.known import Violation
from tests.outsider.typed import Answer


def images(hit: Hit, *, frozen: bool = False) -> list[Path]:
    """The machine's images that are its own: active ones, too, unless only the frozen are wanted."""
    found = []
    for layers in (hit.known.seen.chains if hit.known.seen else {}).values():
        found += [Path(layer["path"]) for layer in (layers[:-1] if frozen else layers)]
    return [path for path in found if path.name != "writer.raw"]


def one(hit: Hit, *, frozen: bool = False) -> Path | None:
    """One of them, by the dice."""
    found = images(hit, frozen=frozen)
    return found[int(hit.which * len(found))] if found else None


Beside = Callable[[Hit, Path], contextlib.AbstractContextManager[None]]


def beside(trouble: Beside) -> Callable[[Hit, list[str]], Answer]:
    """A fault that lasts from before the command line to after it."""

    def run(hit: Hit, words: list[str]) -> Answer:
        path = one(hit)
        if path is None or not path.exists():
            return hit.begin(words).wait()
        with trouble(hit, path):
            return hit.begin(words).wait()

    return run


@contextmanager
def reads(hit: Hit, path: Path) -> Iterator[None]:
    """Open for reading, without a lock."""
    with path.open("rb") as file:
        file.read(4096)
        yield


@contextmanager
def holds(hit: Hit, path: Path) -> Iterator[None]:
    """Open for writing, without a lock, and nothing written: check says so."""
    with path.open("r+b"):
        told = looks.asked("check", hit.known.name, may=(7,))
        if "image-in-use" not in told.out:
            raise Violation(f"{path} is open for writing, and check does not say so: {told.out[-500:]}")
        if hit.verb == "check":
            hit.codes = frozenset({7})
        yield


@contextmanager
def locks_it(hit: Hit, path: Path) -> Iterator[None]:
    """A lock of flock, which QEMU does not know."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def uses_it(hit: Hit, path: Path) -> Iterator[None]:
    """qemu-io has it open with QEMU's own locks, for reading or writing."""
    tool = os.environ.get("QMPSNAP_QEMU_IMG", "qemu-img").replace("qemu-img", "qemu-io")
    only = ["-r"] if hit.much < 0.5 else []
    image_format = "raw" if path.suffix == ".raw" else "qcow2"
    argv = [tool, *only, "-f", image_format, str(path)]
    hit.disturbs()
    # Its prompt comes once the image is open, or its end where a QEMU has the lock.
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.read(8)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.wait()


@contextmanager
def copies(hit: Hit, path: Path) -> Iterator[None]:
    """A copy elsewhere."""
    target = hit.world.images / "somebodys-copy"
    shutil.copy2(path, target)
    yield
    target.unlink()


@contextmanager
def links(hit: Hit, path: Path) -> Iterator[None]:
    """A hard link, as ``cp -al`` makes: the time of the inode's change is another."""
    target = hit.world.images / "somebodys-link"
    os.link(path, target)
    path.chmod(path.stat().st_mode)
    yield
    target.unlink()


def moves(hit: Hit, words: list[str]) -> Answer:
    """An image is somewhere else for a moment."""
    path = one(hit)
    if path is None or not path.exists():
        return hit.begin(words).wait()
    away = hit.world.images / "moved-away"
    hit.disturbs()
    command = hit.begin(words)
    hit.pause()
    moved = False
    with contextlib.suppress(OSError):
        path.rename(away)
        moved = True
    answer = command.wait()
    if moved and not path.parent.exists():  # the machine was undefined, and its folder was removed
        away.unlink()
    elif moved and not path.exists():
        away.rename(path)
        there = hit.known.name in births.names()
        waits = there and looks.open_operations(hit.known.name)
        if str(path) not in paths(hit) and not waits and "--keep-disks" not in words:
            path.unlink()
    elif moved:
        raise Violation(f"{path} was moved away, and something else was put there: {' '.join(words)}")
    return answer


def replaces(hit: Hit, words: list[str]) -> Answer:
    """A copy lies in the place of an image: it is told, neither written to nor removed; then the image is back."""
    path = one(hit)
    if path is None or not path.exists() or hit.known.running:
        return hit.begin(words).wait()
    aside, theirs = hit.world.images / "the-recorded-one", hit.world.images / "a-copy"
    shutil.copyfile(path, theirs)
    path.rename(aside)
    theirs.rename(path)
    content, inode = path.read_bytes(), path.stat().st_ino
    hit.codes, hit.recover = frozenset({0, 4, 7}), True
    try:
        answer = hit.begin(words).wait()
        told = looks.asked("check", may=(0, 7, 8))  # of all: this machine may be gone
        if "layer-replaced" not in told.out and str(path) in paths(hit):
            raise Violation(f"{path} is a copy, and check does not say so: {told.out[-300:]}")
        if not path.exists() or path.stat().st_ino != inode or path.read_bytes() != content:
            raise Violation(f"{path} was somebody's copy, and is written to or gone: {' '.join(words)}")
    finally:
        path.unlink(missing_ok=True)
        if str(path) in paths(hit) or "--keep-disks" in words:
            aside.rename(path)
        else:
            aside.unlink()
    return answer


def paths(hit: Hit) -> set[str]:
    """All images that the machine has now."""
    if hit.known.name not in births.names():
        return set()
    chained = looks.asked("chain", hit.known.name, may=(0, 7)).json()["disks"]
    listed = looks.asked("snapshot", "list", hit.known.name).json()["snapshots"]
    held = {str(point["path"]) for snapshot in listed for point in snapshot["disks"].values()}
    return held | {str(layer["path"]) for disk in chained for layer in disk["layers"]}


def overwrites(hit: Hit, words: list[str]) -> Answer:
    """Somebody writes into a frozen image of a machine that stands: told from then on, and its readers are lost."""
    path = one(hit, frozen=True)
    if path is None or hit.known.running or not path.exists() or shared(hit, path):
        return hit.begin(words).wait()
    with path.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes([int(hit.much * 255) + 1]) * 512)
        os.fsync(file.fileno())
    hit.codes, hit.alone = frozenset({0, 4, 7}), False
    for snap in hit.known.snapshots.values():
        snap.moment = Anything()
    hit.known.active = Anything()
    hit.known.spoiled = True
    told = looks.asked("check", hit.known.name, may=(7,))
    if "frozen-written" not in told.out:
        raise Violation(f"{path} was written to by somebody, and check does not say so: {told.out[-500:]}")
    return hit.begin(words).wait()


def shared(hit: Hit, path: Path) -> bool:
    """Whether another machine reads it."""
    return any(str(path) in known.reads() for known in hit.world.machines.values() if known is not hit.known)


OTHERS = (
    Fault("outsider reads", 1, beside(reads)),
    Fault("outsider holds", 2, beside(holds)),
    Fault("outsider flocks", 1, beside(locks_it)),
    Fault("outsider uses", 2, beside(uses_it)),
    Fault("outsider copies", 1, beside(copies)),
    Fault("outsider links", 2, beside(links)),
    Fault("outsider moves", 2, moves),
    Fault("outsider replaces", 2, replaces),
    Fault("outsider overwrites", 1, overwrites),
)
