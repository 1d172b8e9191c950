"""Images of a Ceph cluster, by what its programs say: JSON out, no shell, no key in an argument, bounded in time.

Called in a thread, as everything that reads images: a cluster that does not answer has its program killed. Only what
may take hours, :func:`followed`, is awaited.
"""

import contextlib
import errno
import json
import os
import re
import subprocess
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import anyio

from qmpsnap.errors import HostCannot, ImageRefused, StorageHangs
from qmpsnap.host import storage_wait
from qmpsnap.host.programs import running
from qmpsnap.host.threads import to_read

_SAID: Final = 300
_UNREACHED: Final = b"connect to the cluster"
_KEPT: Final = 4096
_PERCENT: Final = re.compile(rb"(\d+)% complete")
_SILENCE: Final = 30.0
"""Seconds after which a cluster is asked whether it still answers: of a large image one percent may take as long."""
_SILENCES: Final = 120
"""So often; a cluster that is full answers, and takes no data."""


class Failed(HostCannot):
    """A program has refused or failed; ``status`` is what it has exited with, of ``rbd`` mostly an ``errno``."""

    def __init__(self, message: str, *, status: int) -> None:
        """What it has said last, and its exit status."""
        super().__init__(message)
        self.status = status


class Image(Protocol):
    """An image of a pool; as text its name for people."""

    @property
    def pool(self) -> str:
        """The pool's name."""

    @property
    def arguments(self) -> list[str]:
        """Arguments that name it to ``rbd``, the client's before the others."""

    @property
    def client(self) -> list[str]:
        """Those that say which cluster is meant, and as whom."""

    @property
    def snapshot(self) -> str | None:
        """The name of one of its snapshots."""


class Info(NamedTuple):
    """Bytes of an image or snapshot, what tells it from all others, and all that is said of the image."""

    size: int
    identity: str
    said: dict[str, Any]


def info(image: Image) -> Info:
    """What the cluster says of an image.

    Raises:
        ImageRefused: it has no such image.
        HostCannot: it refuses, or there is no ``rbd``.
        StorageHangs: it does not answer.
    """
    found = asked(image, "info")
    try:
        size, number = int(found["size"]), str(found["id"])
    except (KeyError, TypeError, ValueError) as error:
        raise HostCannot(f"rbd info of rbd:{image} says nothing that is known: {found!r:.{_SAID}}") from error
    if (key := (*image.client, image.pool)) not in _pools:
        _pools[key] = _pool(image)
    fsid, pool = _pools[key]
    identity = f"rbd:{fsid}/{pool}/{number}"
    if image.snapshot is None:
        return Info(size, identity, found)
    kept = {str(one["name"]): one for one in snapshots(image)}
    if image.snapshot not in kept:
        raise ImageRefused(f"there is no snapshot rbd:{image}")
    return Info(int(kept[image.snapshot]["size"]), f"{identity}/{kept[image.snapshot]['id']}", found)


def watchers(image: Image) -> tuple[str, ...]:
    """The addresses of clients that have an image open for writing; one that only reads it has none."""
    found = asked(image, "status")
    # As a list in JSON of this release; older ones have had a mapping.
    listed = found.get("watchers", ())
    listed = listed.values() if isinstance(listed, dict) else listed
    return tuple(str(one["address"]) for one in listed)


def writers(image: Image) -> tuple[str, ...]:
    """The addresses of clients that hold an image's exclusive lock, as whoever has written to it."""
    return tuple(str(one["address"]) for one in asked(image, "lock", "ls"))


def snapshots(image: Image) -> list[dict[str, Any]]:
    """The snapshots of an image (or of that which it is one of), with ``id``, ``name``, ``size``."""
    found = asked(image, "snap", "ls", snapshot=False)
    return [one for one in found if isinstance(one, dict)]


def has_mark(image: Image, key: str) -> bool:
    """Whether an image has metadata of that name; not by its list, which is no JSON where it is empty."""
    try:
        _run(["rbd", *image.arguments, "image-meta", "get", key], image, seconds=storage_wait.deadline())
    except ImageRefused:
        return False
    return True


def asked(image: Image, *words: str, snapshot: bool = True) -> Any:
    """What ``rbd`` answers to these words about an image, without its ``snapshot`` if that is not to be named."""
    named = [word for word in image.arguments if snapshot or not word.startswith("--snap=")]
    return _asked(["rbd", *named, *words], image)


def done(image: Image, *words: str, seconds: float, snapshot: bool = True) -> None:
    """Let ``rbd`` change something, which takes no longer than ``seconds``.

    Raises:
        Failed: it says that it could not.
        StorageHangs: it was killed after that time; what became of it is unknown.
    """
    named = [word for word in image.arguments if snapshot or not word.startswith("--snap=")]
    _run(["rbd", *named, *words], image, seconds=max(seconds, storage_wait.deadline()), changes=True)


_pools: dict[tuple[str, ...], tuple[str, int]] = {}
"""Each asked for once: an image in another pool of the same name has another id, too."""


def _pool(image: Image) -> tuple[str, int]:
    """The cluster's fsid and the pool's id."""
    found = _asked(["ceph", *image.client, "osd", "dump"], image)
    with contextlib.suppress(KeyError, TypeError, StopIteration):
        number = next(int(one["pool"]) for one in found["pools"] if one["pool_name"] == image.pool)
        return str(found["fsid"]), number
    raise HostCannot(f"ceph osd dump does not name pool {image.pool}")


async def followed(image: Image, *words: str, told: Callable[[int], None]) -> None:
    """Let ``rbd`` do what takes as long as it takes, while the cluster answers; a cancelled caller has it killed.

    ``told`` is given the percentage that is done.

    Raises:
        Failed: it says that it could not.
        StorageHangs: it had nothing to say, and the cluster did not answer; what became of it is unknown.
    """
    argv, said, silences = ["rbd", *image.arguments, *words], b"", 0
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "env": _environment()}
    try:
        async with running(argv, **how, start_new_session=True) as process:
            assert process.stderr
            while True:
                with anyio.move_on_after(_SILENCE) as silent:
                    try:
                        said = (said + await process.stderr.receive())[-_KEPT:]
                    except anyio.EndOfStream:
                        break
                    silences = 0
                    if percents := _PERCENT.findall(said):
                        told(int(percents[-1]))
                if silent.cancelled_caught:
                    silences += 1
                    await _require_answer(argv, image, silences)
            status = await process.wait()
    except OSError as error:
        raise _not_run(argv, error) from error
    if status:
        raise _failed(argv, image, status, said)


async def _require_answer(argv: list[str], image: Image, silences: int) -> None:
    """Make sure that a cluster still answers, and that what it is at has said something of late."""
    why = f"it has said nothing for {silences * _SILENCE:g} s"
    try:
        await to_read(lambda: asked(image, "info", snapshot=False))
        if silences < _SILENCES:
            return
    except StorageHangs as error:
        why = error.message
    raise StorageHangs(
        f"{_command(argv)} of rbd:{image} does not go on: {why}",
        path=f"rbd:{image}",
        hint="check that cluster (ceph health)",
        effect="unknown",
    )


def _asked(argv: list[str], image: Image) -> Any:
    """What a program answers, as JSON; killed once it has taken as long as storage may."""
    said = _run([*argv, "--format=json"], image, seconds=storage_wait.deadline())
    try:
        return json.loads(said)
    except ValueError as error:
        raise HostCannot(f"{_command(argv)} of rbd:{image} does not answer in JSON: {said[:_SAID]!r}") from error


def _run(argv: list[str], image: Image, *, seconds: float, changes: bool = False) -> bytes:
    try:
        ended = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C is ours to answer
        )
    except subprocess.TimeoutExpired as error:
        raise StorageHangs(
            f"the Ceph cluster does not answer: {_command(argv)} of rbd:{image} has waited for {seconds:g} s",
            path=f"rbd:{image}",
            hint=f"check that cluster (ceph health); {storage_wait.DEADLINE} sets a longer wait",
            effect="unknown" if changes else "none",
        ) from error
    except OSError as error:
        raise _not_run(argv, error) from error
    if ended.returncode == 0:
        return ended.stdout
    if _UNREACHED in ended.stderr:  # with the status of what is missing: it has no configuration, or no monitor there
        raise HostCannot(
            f"the Ceph cluster of rbd:{image} cannot be reached: {_last(ended.stderr)}",
            hint="check its configuration and the network (" + " ".join(["ceph", *image.client, "health"]) + ")",
        )
    if argv[0] == "rbd" and ended.returncode == errno.ENOENT and not changes:
        said = _last(ended.stderr) or f"exit {ended.returncode}"
        raise ImageRefused(f"there is no image rbd:{image}: {said}", hint=f"rbd {_lists(image)} lists the images")
    raise _failed(argv, image, ended.returncode, ended.stderr)


def _environment() -> dict[str, str]:
    """In English, whose sentences are looked for."""
    return {**os.environ, "LC_ALL": "C"}


def _not_run(argv: list[str], error: OSError) -> HostCannot:
    return HostCannot(
        f"{argv[0]} cannot be run: {error.strerror}", hint="install Ceph's client programs (Debian: ceph-common)"
    )


def _failed(argv: list[str], image: Image, status: int, stderr: bytes) -> Failed:
    said = _last(stderr) or f"exit {status}"
    return Failed(f"{_command(argv)} of rbd:{image} failed: {said}", status=status)


def _command(argv: list[str]) -> str:
    """The program and its verb, without what names the image."""
    return " ".join(word for word in argv if not word.startswith("--"))


def _lists(image: Image) -> str:
    pool = str(image).rpartition("/")[0]
    return " ".join([*image.client, "ls", pool])


def _last(stderr: bytes) -> str:
    """The last line that a program wrote, which says what was in the way; lines of librados have a time before them."""
    lines = [line.strip() for line in stderr.decode(errors="backslashreplace").splitlines()]
    ours = [line for line in lines if line.startswith(("rbd: ", "Error ", "error "))]
    text = (ours or [line for line in lines if line] or [""])[-1].removeprefix("rbd: ")
    return "".join(c if c.isprintable() else "?" for c in text)[:_SAID]
