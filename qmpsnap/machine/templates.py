"""Templates: the memory of a full snapshot in a file that any number of forks map, each for itself.

A template is derived data: made ("baked") from a state file when a fork needs it first, and made again when it is
lost. Its folder, named after a key of all that it depends on, has three files: ``ram`` is the guest's memory byte by
byte, ``devices`` QEMU's stream of everything else, ``template.json`` says what they are. It gets its name once it is
whole, by a rename. Its files are never written to or truncated again, as that would change or kill the forks that map
them; removing their names does no harm.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import msgspec
from msgspec import Struct

from qmpsnap.errors import HostCannot, UsageError
from qmpsnap.hint import call
from qmpsnap.host import files
from qmpsnap.host.files import extents
from qmpsnap.machine.starting.alive import boot_id
from qmpsnap.model.home import Home
from qmpsnap.model.layers.vmstate import Hardware

RAM: Final = "ram"
DEVICES: Final = "devices"
ABOUT: Final = "template.json"
MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a folder of this user's own below it
LIMIT: Final = "QMPSNAP_TEMPLATES_LIMIT"
_PART: Final = ".part"
_FORMAT: Final = 1
"""Part of each key: a release that makes templates otherwise does not take these."""
_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK)


class Seen(Struct, frozen=True):
    """A file as it was when the template was made: whatever is different now was not done by us."""

    device: int
    inode: int
    size: int
    ctime_ns: int
    owner: int

    @classmethod
    def of(cls, descriptor: int) -> Self:
        """An open file."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns, status.st_uid)


class Template(Struct, frozen=True, kw_only=True):
    """What a template says of itself.

    Attributes:
        key: of the state file's digest and the hardware; its folder's name.
        source: the snapshot that it was made of first, as ``web@warm``.
        digest: of the memory, see :func:`digest_of`.
        boot: the host's boot in which it was made: after another one nobody knows what was written out.
        created: seconds since the epoch, UTC.
    """

    key: str
    source: str
    state: str
    digest: str
    boot: str
    created: float
    ram: Seen
    devices: Seen


class Shelf(Struct, frozen=True):
    """A folder with templates, of this user alone."""

    folder: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held by whoever adds or removes templates; ``BlockingIOError`` while another does."""
        with files.opened_folder(self.folder) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def is_own(self) -> bool:
        """Whether the folder is there, and nobody else can put anything into it."""
        try:
            status = self.folder.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022

    def of(self, key: str) -> Path:
        """The folder of one template."""
        return self.folder / key

    def names(self) -> list[str]:
        """What lies there, unfinished templates included."""
        try:
            return sorted(os.listdir(self.folder))  # noqa: PTH208
        except FileNotFoundError:
            return []

    def all(self) -> list[Template]:
        """Every template that can be used, that of the longest ago used first."""
        found = [(self.used(name), template) for name in self.names() if (template := self.read(name))]
        return [template for _, template in sorted(found, key=lambda each: each[0])]

    def used(self, key: str) -> float:
        """When a template was last needed, in seconds since the epoch; 0 of one that is gone."""
        with contextlib.suppress(OSError):
            return (self.of(key) / ABOUT).stat().st_mtime
        return 0.0

    def read(self, key: str) -> Template | None:
        """A template, if it is whole and nobody has changed its files."""
        with self.opened(key) as found:
            return found[0] if found else None

    @contextmanager
    def opened(self, key: str) -> Iterator[tuple[Template, int, int] | None]:
        """A template with descriptors of its memory and its devices, which stay what they are if it is removed now."""
        with contextlib.ExitStack() as stack:
            if not self.is_own():
                yield None
                return
            try:
                about = stack.enter_context(files.opened(self.of(key) / ABOUT))
                template = msgspec.json.decode(os.read(about, 1 << 20), type=Template)
                ram = stack.enter_context(files.opened(self.of(key) / RAM))
                devices = stack.enter_context(files.opened(self.of(key) / DEVICES))
            except (OSError, msgspec.MsgspecError):
                yield None
                return
            seen = (template.ram, template.devices) == (Seen.of(ram), Seen.of(devices))
            owned = {template.ram.owner, template.devices.owner} == {os.geteuid()}
            if not seen or not owned or template.key != key or template.boot != boot_id():
                yield None
                return
            yield template, ram, devices

    def mark_used(self, key: str) -> None:
        """Let it be the last one that is removed for others."""
        with contextlib.suppress(OSError):
            os.utime(self.of(key) / ABOUT)

    def remove(self, name: str) -> None:
        """Take the names of its files away; who maps them keeps them."""
        import shutil

        shutil.rmtree(self.folder / name, ignore_errors=True)

    def unfinished(self) -> list[Path]:
        """Folders of templates that were not finished; only whoever holds the lock knows that nobody is at it."""
        return [self.folder / name for name in self.names() if name.endswith(_PART)]


def key_of(digest: str, hardware: Hardware, *, user: int | None) -> str:
    """The key of the template of a state with that digest, for that hardware and QEMU's user; pure."""
    common = msgspec.structs.replace(hardware, uuid="", vmgenid="any" if hardware.vmgenid else "")
    text = msgspec.json.encode((_FORMAT, digest, common, user))
    return hashlib.sha256(text).hexdigest()[:32]


def part_name(key: str, uuid: str) -> str:
    """The name of a template's folder while the QEMU with that UUID makes it."""
    return f"{key}.{uuid}{_PART}"


def uuid_of(part: Path) -> str:
    """The UUID of the QEMU that makes it."""
    return part.name.removesuffix(_PART).rpartition(".")[2]


# --- where they lie ---------------------------------------------------------------------------------------------------


def shelves(home: Home) -> tuple[Shelf, ...]:
    """Where templates may lie: the folder that the user names; else in memory, or beside the machines."""
    if home.templates:
        return (Shelf(home.templates),)
    return (Shelf(MEMORY / f"qmpsnap-{os.geteuid()}"), Shelf(home.data / "templates"))


def choose(home: Home, size: int) -> Shelf:
    """Where a new template of that size goes, its folder made.

    Raises:
        HostCannot: there is no room, or somebody else can write to it.
    """
    *preferred, last = shelves(home)
    for shelf in preferred:
        if roomy(size) and (
            shelf.is_own() or not os.path.lexists(shelf.folder)
        ):  # else another user has taken its name
            return _made(shelf)
    if size > free(last.folder):
        raise HostCannot(
            f"{last.folder} has no room for the template of {size >> 20} MiB of memory",
            hint="free some space there, or name another folder in QMPSNAP_TEMPLATES",
        )
    return _made(last)


def roomy(size: int) -> bool:
    """Whether a template of that size can be kept in memory: it takes at most half of what is free."""
    return is_memory(MEMORY) and size <= free(MEMORY) // 2 and size <= available() // 2


def _made(shelf: Shelf) -> Shelf:
    try:
        files.make_folder(shelf.folder)
    except OSError as error:
        raise HostCannot(f"{shelf.folder} cannot be created: {error.strerror}") from error
    if not shelf.is_own():
        raise HostCannot(
            f"templates cannot be kept in {shelf.folder}: another user can write to it",
            hint="name a folder of this user alone in QMPSNAP_TEMPLATES",
        )
    return shelf


def free(folder: Path) -> int:
    """Bytes that are free there."""
    while not folder.is_dir():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def available() -> int:
    """Bytes of memory that this host can give to programs without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)


def is_memory(folder: Path) -> bool:
    """Whether a folder lies on a tmpfs: QEMU can track writes to a private mapping of its files, and of no others."""
    return _mount(folder)[0] == "tmpfs"


def _mount(folder: Path) -> tuple[str, str]:
    device = os.stat(folder).st_dev  # noqa: PTH116
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            at = fields.index("-")
            return fields[at + 1], fields[4]
    return "", ""


# --- how much of them there is ----------------------------------------------------------------------------------------


def limit(shelf: Shelf, environment: Mapping[str, str]) -> int:
    """Bytes that the templates of a folder may have together: half of its file system, or what the user says."""
    said = environment.get(LIMIT)
    if not said:
        found = os.statvfs(shelf.folder)
        return found.f_blocks * found.f_frsize // 2
    number, unit = said[:-1], {"K": 10, "M": 20, "G": 30, "T": 40}.get(said[-1])
    if unit is None or not number.isdecimal():
        raise UsageError(f"{LIMIT} is {said[:80]!r}, which is no size", hint="write a number with K, M, G or T: 16G")
    return int(number) << unit


def mapped(pids: Iterable[int], folders: Iterable[Path]) -> dict[tuple[int, int], int]:
    """Device and inode of each memory file in these folders that these processes map, with its size, named or not."""
    below = tuple(f"{folder}/" for folder in folders)
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                name = fields[-1].removesuffix(" (deleted)")
                if name.startswith(below) and name.endswith(f"/{RAM}"):
                    start, _, end = fields[0].partition("-")
                    major, _, minor = fields[3].partition(":")
                    file = os.makedev(int(major, 16), int(minor, 16)), int(fields[4])
                    found[file] = found.get(file, 0) or int(end, 16) - int(start, 16)
    return found


def make_room(shelf: Shelf, size: int, most: int, mapped: Mapping[tuple[int, int], int]) -> list[str]:
    """Remove the templates that were not used for the longest until one of ``size`` fits; returns what is removed.

    One that forks map takes up memory with or without its name, so it counts and stays.

    Raises:
        HostCannot: forks map so much that it does not fit.
    """
    device = os.stat(shelf.folder).st_dev  # noqa: PTH116
    held = sum(bytes_ for (on, _), bytes_ in mapped.items() if on == device)
    free = [found for found in shelf.all() if (found.ram.device, found.ram.inode) not in mapped]
    total, removed = held + sum(found.ram.size for found in free), []
    for found in free:
        if total + size <= most:
            break
        shelf.remove(found.key)
        removed.append(found.key)
        total -= found.ram.size
    if total + size > most:
        raise HostCannot(
            f"a template of {size >> 20} MiB does not fit into {shelf.folder}: running forks use {held >> 20} of the"
            f" {most >> 20} MiB that templates may have",
            hint=f"stop forks, or allow more with {LIMIT}; " + call("templates") + " lists the templates",
        )
    return removed


# --- making one -------------------------------------------------------------------------------------------------------


@contextmanager
def beginning(shelf: Shelf, name: str, size: int) -> Iterator[tuple[Path, int, int]]:
    """A new folder with a file for ``size`` bytes of memory and one for devices, open; only its user can enter it."""
    folder = shelf.folder / name
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)
            ram = files.create_exclusive(folder / RAM, os.O_RDWR)
            stack.callback(os.close, ram)
            os.ftruncate(ram, size)
            devices = files.create_exclusive(folder / DEVICES)
            stack.callback(os.close, devices)
        except OSError as error:
            raise HostCannot(f"{folder} cannot be created: {error.strerror}") from error
        yield folder, ram, devices


def publish(shelf: Shelf, part: Path, ram: int, devices: int, about: Template) -> Template:
    """Say what the files of a new template are, write them out, and give their folder its name."""
    for descriptor in (ram, devices):
        os.fsync(descriptor)
    template = msgspec.structs.replace(
        about, digest=digest_of(ram), ram=Seen.of(ram), devices=Seen.of(devices), boot=boot_id()
    )
    for name in os.listdir(part):  # noqa: PTH208
        if name not in (RAM, DEVICES):
            (part / name).unlink(missing_ok=True)  # QEMU's sockets and logs
    part.chmod(0o700)  # nor may QEMU's user write there any more, where it is another
    files.write_new(part / ABOUT, msgspec.json.encode(template))
    files.sync_folder(part)
    part.rename(shelf.of(template.key))
    files.sync_folder(shelf.folder)
    return template


def damage(shelf: Shelf, template: Template) -> str:
    """What is wrong with a template's memory, a sentence; empty if it is what it was."""
    with shelf.opened(template.key) as found:
        if found is None or digest_of(found[1]) == template.digest:
            return ""
    return f"the memory of {shelf.of(template.key)} is not what it was when the template was made"


def digest_of(descriptor: int) -> str:
    """SHA-256 of a memory file: of the number and content of each of its MiB that is not all zeros.

    So a hole and the zeros that somebody has read there are the same.
    """
    found = hashlib.sha256()
    size = os.fstat(descriptor).st_size
    last = -1
    for start, end in extents(descriptor, size):
        for number in range(max(last + 1, start // _CHUNK), -(-end // _CHUNK)):
            chunk = os.pread(descriptor, _CHUNK, number * _CHUNK)
            if chunk != _ZEROS[: len(chunk)]:
                found.update(number.to_bytes(8, "little"))
                found.update(chunk)
            last = number
    return found.hexdigest()
