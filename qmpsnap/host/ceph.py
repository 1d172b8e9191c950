"""Images of a Ceph cluster, by what its programs say: JSON out, no shell, no key in an argument, bounded in time.

Called in a thread, as everything that reads images: a cluster that does not answer has its program killed.
"""

import contextlib
import json
import os
import subprocess
from typing import Any, Final, NamedTuple, Protocol

from qmpsnap.errors import HostCannot, ImageRefused, StorageHangs
from qmpsnap.host import storage_wait

_NOT_THERE: Final = 2
"""Exit code of ``rbd`` where there is no such pool, namespace or image: ENOENT."""
_SAID: Final = 300


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


class Info(NamedTuple):
    """Bytes of an image, and what tells it from all others."""

    size: int
    identity: str


def info(image: Image) -> Info:
    """What the cluster says of an image.

    Raises:
        ImageRefused: it has no such image.
        HostCannot: it refuses, or there is no ``rbd``.
        StorageHangs: it does not answer.
    """
    found = _asked(["rbd", *image.arguments, "info"], image)
    try:
        size, number = int(found["size"]), str(found["id"])
    except (KeyError, TypeError, ValueError) as error:
        raise HostCannot(f"rbd info of rbd:{image} says nothing that is known: {found!r:.{_SAID}}") from error
    if (key := (*image.client, image.pool)) not in _pools:
        _pools[key] = _pool(image)
    fsid, pool = _pools[key]
    return Info(size, f"rbd:{fsid}/{pool}/{number}")


def watchers(image: Image) -> tuple[str, ...]:
    """The addresses of clients that have an image open for writing; one that only reads it has none."""
    found = _asked(["rbd", *image.arguments, "status"], image)
    # As a list in JSON of this release; older ones have had a mapping.
    listed = found.get("watchers", ())
    listed = listed.values() if isinstance(listed, dict) else listed
    return tuple(str(one["address"]) for one in listed)


def writers(image: Image) -> tuple[str, ...]:
    """The addresses of clients that hold an image's exclusive lock, as whoever has written to it."""
    return tuple(str(one["address"]) for one in _asked(["rbd", *image.arguments, "lock", "ls"], image))


_pools: dict[tuple[str, ...], tuple[str, int]] = {}
"""Each asked for once: an image in another pool of the same name has another id, too."""


def _pool(image: Image) -> tuple[str, int]:
    """The cluster's fsid and the pool's id."""
    found = _asked(["ceph", *image.client, "osd", "dump"], image)
    with contextlib.suppress(KeyError, TypeError, StopIteration):
        number = next(int(one["pool"]) for one in found["pools"] if one["pool_name"] == image.pool)
        return str(found["fsid"]), number
    raise HostCannot(f"ceph osd dump does not name pool {image.pool}")


def _asked(argv: list[str], image: Image) -> Any:
    """What a program answers, as JSON; killed once it has taken as long as storage may."""
    seconds = storage_wait.deadline()
    argv = [*argv, "--format=json"]
    try:
        done = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,  # a Ctrl-C is ours to answer
        )
    except subprocess.TimeoutExpired as error:
        what = f"{argv[0]} {argv[-2]} of rbd:{image} has waited for {seconds:g} s"
        raise StorageHangs(
            f"the Ceph cluster does not answer: {what}",
            path=f"rbd:{image}",
            hint=f"check that cluster (ceph health); {storage_wait.DEADLINE} sets a longer wait",
        ) from error
    except OSError as error:
        raise HostCannot(
            f"{argv[0]} cannot be run: {error.strerror}",
            hint="install Ceph's client programs (Debian: ceph-common)",
        ) from error
    if done.returncode == 0:
        with contextlib.suppress(ValueError):
            return json.loads(done.stdout)
    said = _last(done.stderr) or f"exit {done.returncode}"
    if argv[0] == "rbd" and done.returncode == _NOT_THERE:
        raise ImageRefused(f"there is no image rbd:{image}: {said}", hint=f"rbd {_lists(image)} lists the images")
    raise HostCannot(f"{argv[0]} {argv[-2]} of rbd:{image} failed: {said}")


def _lists(image: Image) -> str:
    pool = str(image).rpartition("/")[0]
    return " ".join([*image.client, "ls", pool])


def _last(stderr: bytes) -> str:
    """The last line that a program wrote, which says what was in the way; lines of librados have a time before them."""
    lines = [line.strip() for line in stderr.decode(errors="backslashreplace").splitlines()]
    ours = [line for line in lines if line.startswith(("rbd: ", "Error ", "error "))]
    text = (ours or [line for line in lines if line] or [""])[-1].removeprefix("rbd: ")
    return "".join(c if c.isprintable() else "?" for c in text)[:_SAID]
