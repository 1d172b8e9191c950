"""Snapshots by a Ceph cluster: ``rbd snap create`` takes milliseconds, a clone shares all data with its snapshot.

A snapshot is protected from its birth, so that ``rbd snap purge`` leaves it where it is. A clone is an image of the
same pool and namespace; one whose making was interrupted lacks our mark.
"""

import contextlib
import errno
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import ImageRefused, NotFoundError, StateError, StorageHangs, StoreMismatch
from qmpsnap.host import ceph
from qmpsnap.host.ceph import Failed
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.volumes.driver import Ability, DriverName, Size, Volume, VolumeState
from qmpsnap.volumes.names import VolumeName

DEADLINE: Final = 60.0
"""Seconds that a snapshot or clone may take."""
REMOVAL: Final = 600.0
"""Seconds that removing one may take: an image goes object by object."""
WHOLE: Final = "qmpsnap.whole"
"""The key in the metadata of a clone that is complete."""
_LAYERING: Final = "layering"
_DEEP: Final = "deep-flatten"


class Rbd(Struct, frozen=True):
    """The driver for images of a Ceph cluster."""

    @property
    def name(self) -> DriverName:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        return "rbd"

    def where(self, near: Volume, name: VolumeName) -> str:
        """A snapshot of the image itself; a clone beside it, in its pool and namespace."""
        image = _image(near)
        if name.role == "snapshot":
            return replace(image, snapshot=name.text).filename
        return replace(image, image=name.text, snapshot=None).filename

    async def probe(self, origin: Volume | None) -> Ability:
        """Whether ``rbd`` is there and the image can have clones; asks the cluster about the origin alone."""
        if lacking := [program for program in ("rbd", "ceph") if shutil.which(program) is None]:
            remedy = "install Ceph's client programs (Debian: ceph-common)"
            return Ability(why=f"there is no program {lacking[0]}", remedy=remedy)
        if origin is None:
            return Ability()
        image = _image(origin)
        try:
            found = await to_read(_recorded, origin, image)
        except ImageRefused as error:
            return Ability(why=error.message, remedy=error.hint)
        if _LAYERING not in found.said.get("features", ()):
            return Ability(why=f"rbd:{image} has no feature {_LAYERING}", remedy="copy it to a new image: rbd deep cp")
        return Ability()

    async def snapshot(self, origin: Volume, name: VolumeName) -> Volume:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        return await to_end(_snapshot, origin, _parsed(self.where(origin, name)), name)

    async def clone(self, snapshot: Volume, name: VolumeName) -> Volume:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        return await to_end(_clone, snapshot, _parsed(self.where(snapshot, name)), name)

    async def remove(self, volume: Volume) -> None:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        await to_end(_remove, volume, _image(volume))

    async def list(self, near: Volume, machine: str) -> tuple[Volume, ...]:
        """Those of the image, of the machine's clones beside it, and of the images that these come from."""
        found = await to_read(lambda: [*_list(replace(_image(near), snapshot=None), machine.replace("-", ""))])
        return tuple(sorted(found, key=lambda volume: volume.name.text if volume.name else ""))

    async def size(self, volume: Volume) -> Size:
        """What was written since the snapshot before, as far as that is in its own objects."""
        return Size(own=await to_read(_used, _image(volume)))


def dependents(image: RbdImage) -> tuple[str, ...]:
    """What keeps a snapshot or an image from being removed: clones, or snapshots; asked in a thread.

    ``ImageRefused`` where it is gone.
    """
    if image.snapshot:
        return tuple(_child(one) for one in ceph.asked(image, "children"))
    return tuple(f"rbd:{replace(image, snapshot=str(one['name']))}" for one in ceph.snapshots(image))


class Tie(Struct, frozen=True):
    """What a clone still needs: the snapshot, as people read it, and the bytes of it that a flatten copies, at most."""

    parent: str
    moves: int


def tie(volume: Volume) -> Tie | None:
    """The snapshot that an image reads what was never written to it from; None where it has none. Asked in a thread.

    Raises:
        NotFoundError: the image is gone.
        StateError: its own snapshots would keep the tie.
    """
    image = _image(volume)
    found = _found(volume, image).said
    if not (said := found.get("parent")):
        return None
    parent = RbdImage(
        pool=str(said["pool"]),
        namespace=str(said.get("pool_namespace") or "") or None,
        image=str(said["image"]),
        snapshot=str(said["snapshot"]),
        conf=image.conf,
        user=image.user,
    )
    if _DEEP not in found.get("features", ()) and (own := ceph.snapshots(image)):
        raise StateError(
            f"rbd:{image} has no feature {_DEEP}: its snapshots would still depend on rbd:{parent}:"
            f" {', '.join(str(one['name']) for one in own)}",
            hint="delete those snapshots first",
        )
    return Tie(f"rbd:{parent}", _read(parent, int(said["overlap"])))


def _read(parent: RbdImage, overlap: int) -> int:
    """Bytes of a snapshot that there is data in, by whole objects, of the first so many."""
    try:
        found = ceph.asked(parent, "diff", "--whole-object")
    except StorageHangs:  # without the feature fast-diff each object of it is asked about
        return overlap
    return sum(max(0, min(overlap, int(one["offset"]) + int(one["length"])) - int(one["offset"])) for one in found)


def is_tied(volume: Volume) -> bool:
    """Whether an image has a parent; one that is gone has none. Asked in a thread."""
    try:
        return bool(_recorded(volume, _image(volume)).said.get("parent"))
    except ImageRefused:
        return False


async def flatten(volume: Volume, *, told: Callable[[int], None]) -> None:
    """Let an image have all data of its own; fine if it has. ``told`` is given the percentage that is done."""
    if await to_read(is_tied, volume):
        await ceph.followed(_image(volume), "flatten", told=told)


def _image(volume: Volume) -> RbdImage:
    return _parsed(volume.path)


def _parsed(path: str) -> RbdImage:
    image = RbdImage.parse(path)
    if image is None:
        raise ValueError(f"{path} is no RBD image")
    return image


def _recorded(volume: Volume, image: RbdImage) -> ceph.Info:
    """What the cluster says of a volume, which is the recorded one."""
    found = ceph.info(image)
    if volume.identity and volume.identity != found.identity:
        raise StoreMismatch(f"rbd:{image} is not the recorded image; it was not touched")
    return found


def _found(volume: Volume, image: RbdImage) -> ceph.Info:
    try:
        return _recorded(volume, image)
    except ImageRefused as error:
        raise NotFoundError(error.message, hint=error.hint) from error


def _snapshot(origin: Volume, image: RbdImage, name: VolumeName) -> Volume:
    _found(origin, replace(image, snapshot=None))
    try:
        ceph.done(image, "snap", "create", "--no-progress", seconds=DEADLINE)
    except Failed as error:
        if error.status == errno.EEXIST:
            raise StateError(f"there is a snapshot rbd:{image} already") from error
        raise
    with _undone(image):
        ceph.done(image, "snap", "protect", seconds=DEADLINE)
    return _volume(image, name)


@contextlib.contextmanager
def _undone(image: RbdImage) -> Iterator[None]:
    """Remove a snapshot again that could not be protected, as far as the cluster still answers."""
    try:
        yield
    except Failed:
        with contextlib.suppress(Failed):
            ceph.done(image, "snap", "rm", "--no-progress", seconds=DEADLINE)
        raise


def _clone(snapshot: Volume, image: RbdImage, name: VolumeName) -> Volume:
    source = _image(snapshot)
    _found(snapshot, source)
    target = [f"--dest-pool={image.pool}", f"--dest={image.image}"]
    target += [f"--dest-namespace={image.namespace}"] if image.namespace else []
    try:
        ceph.done(source, "clone", *target, seconds=DEADLINE)
    except Failed as error:
        if error.status == errno.EEXIST:
            raise StateError(f"there is an image rbd:{image} already") from error
        raise
    ceph.done(image, "image-meta", "set", WHOLE, "yes", seconds=DEADLINE)
    return _volume(image, name)


def _remove(volume: Volume, image: RbdImage) -> None:
    try:
        _recorded(volume, image)
    except ImageRefused:
        return
    if found := dependents(image):
        raise dependent(image, found)
    if image.snapshot:
        _remove_snapshot(image)
        return
    try:
        ceph.done(image, "rm", "--no-progress", seconds=REMOVAL)
    except Failed as error:
        if error.status == errno.EBUSY:
            raise StateError(f"rbd:{image} is open in a client of the cluster") from error
        if error.status != errno.ENOENT:
            raise


def dependent(image: RbdImage, others: Collection[str]) -> StateError:
    """The error for what cannot be removed yet."""
    what = "clones depend on it" if image.snapshot else "it has snapshots"
    return StateError(
        f"rbd:{image} cannot be removed: {what}: {', '.join(others)}", hint="remove these first, or flatten the clones"
    )


def _remove_snapshot(image: RbdImage) -> None:
    for words in (("unprotect",), ("rm", "--no-progress")):
        try:
            ceph.done(image, "snap", *words, seconds=REMOVAL)
        except Failed as error:
            # It may not be protected, or be gone, where an earlier try was interrupted.
            if error.status not in (errno.EINVAL, errno.ENOENT):
                raise


def _child(said: dict[str, Any]) -> str:
    parts = (said.get("pool"), said.get("pool_namespace"), said.get("image"))
    return "rbd:" + "/".join(str(part) for part in parts if part)


def _list(image: RbdImage, machine: str) -> Iterator[Volume]:
    pool = RbdImage(pool=image.pool, namespace=image.namespace, conf=image.conf, user=image.user, image="")
    known = {str(name) for name in ceph.asked(pool, "ls")}
    own = {name for name in known if (parsed := VolumeName.parse(name)) and parsed.machine == machine}
    pending, seen = [image.image, *sorted(own)], set[str]()
    while pending:
        at = replace(image, image=pending.pop(0))
        if at.image in seen or at.image not in known:
            continue
        seen.add(at.image)
        found = ceph.info(at)
        parent = found.said.get("parent", {})
        if (parent.get("pool"), parent.get("pool_namespace") or None) == (image.pool, image.namespace):
            pending.append(str(parent["image"]))
        if at.image in own:
            yield _told(at, found.identity, found.size, part=not ceph.has_mark(at, WHOLE))
        for one in ceph.snapshots(at):
            if (parsed := VolumeName.parse(str(one["name"]))) and parsed.machine == machine:
                kept = replace(at, snapshot=str(one["name"]))
                yield _told(kept, f"{found.identity}/{one['id']}", int(one["size"]))


def _volume(image: RbdImage, name: VolumeName) -> Volume:
    found = ceph.info(image)
    return replace(_told(image, found.identity, found.size), name=name)


def _told(image: RbdImage, identity: str, size: int, *, part: bool = False) -> Volume:
    name = VolumeName.parse(image.snapshot or image.image)
    state: VolumeState = "part" if part else "ok"
    return Volume(path=image.filename, identity=identity, bytes=size, name=name, state=state)


def _used(image: RbdImage) -> int:
    try:
        found = ceph.asked(image, "du")
        return next(int(one["used_size"]) for one in found["images"] if one.get("snapshot") == image.snapshot)
    except ImageRefused as error:
        raise NotFoundError(error.message, hint=error.hint) from error
    except StopIteration:
        raise NotFoundError(f"there is no rbd:{image}") from None
