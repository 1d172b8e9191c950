"""Which users can write to a home: such a user decides what QEMU runs, with the rights of the user who starts it.

So a home is refused as OpenSSH refuses keys (``StrictModes``): by root, where anybody else may write to it or to a
folder that it lies in; by every user, where it belongs to somebody else who is not root. A user's own folder may lie
in one that is not root's: whose that is, the user has not decided. For root folders are looked at from
``/`` on downwards: where only trusted users can write to a folder, nobody else can replace what lies in it.
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from qmpsnap.errors import HomeUntrusted, HostCannot
from qmpsnap.host import acl
from qmpsnap.host.files import opened
from qmpsnap.host.outstanding import briefly
from qmpsnap.model.home import Home
from qmpsnap.store.sqlite.devices import PATIENCE

_INSIDE = ("qmpsnap.db", "qmpsnap.db-wal", "qmpsnap.db-shm", "records", "locks")
_WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Flaw(Struct, frozen=True):
    """A file or folder of a home that somebody else can change, or (``foreign``) owns; ``remedy`` is a command.

    ``above``: the home only lies in it.
    """

    path: str
    text: str
    remedy: str
    foreign: bool
    above: bool = False


def require(folder: Path, machines: Path | None = None) -> None:
    """Make sure that nobody else can write to a home, as far as that matters to this user; see the module.

    ``folder`` has the store, or sockets; beside a store lies the machines' folder, which a link may lead to.
    """
    user, found = os.geteuid(), [*flaws(folder, *([machines] if machines and not machines.is_symlink() else []))]
    if machines and machines.is_symlink():  # to storage that may hang, which what needs no image does not wait for
        found += briefly(lambda: [*flaws(machines)], [], seconds=PATIENCE)
    for flaw in found:
        if user == 0 or flaw.foreign:
            raise HomeUntrusted(
                f"{'root' if user == 0 else 'this user'} does not use {folder}: {flaw.text}",
                hint=flaw.remedy,
            )


def flaws(data: Path, *others: Path) -> Iterator[Flaw]:
    """What of a home somebody else can change: the folders that it lies in first; nothing of one that is not there."""
    folders = [data, *others]
    inside = [*folders, *(data / name for name in _INSIDE)]
    of_it = dict.fromkeys(os.path.realpath(place) for place in inside)
    above = (part for folder in folders for part in _above(folder)) if os.geteuid() == 0 else ()
    for part in dict.fromkeys(above):
        if part not in of_it:
            yield from _flaw(part, above=True)
    for path in of_it:
        yield from _flaw(path, above=False)


def of_machine(home: Home, machine: str) -> Iterator[Flaw]:
    """What of a home somebody else can change, and which of a machine's folders are somebody else's."""
    yield from flaws(home.data, home.machines, home.run)
    for folder in (home.machine_dir(machine), home.run_dir(machine)):
        yield from (flaw for flaw in _flaw(str(folder), above=False) if flaw.foreign)  # its mode is a finding already


def of_folder(path: Path) -> Iterator[Flaw]:
    """How somebody else can change what is in one folder."""
    yield from _flaw(str(path), above=False)


def close_to_others(path: str) -> None:
    """Take the right to write to it from everybody but the owner of a file or folder."""
    try:
        with opened(path) as descriptor:
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & ~_WRITE_BY_OTHERS)
    except OSError as error:
        raise HostCannot(f"the mode of {path} cannot be changed: {error.strerror}") from error


def _above(folder: Path) -> Iterable[str]:
    """The folders and links that lead to a folder, from the root on."""
    if not folder.exists():
        return []
    named = [str(part) for part in reversed(folder.parents)]
    real = [str(part) for part in reversed(Path(os.path.realpath(folder)).parents)]
    return [*named, *([str(folder)] if folder.is_symlink() else []), *real]


def _flaw(path: str, *, above: bool) -> Iterator[Flaw]:
    try:
        status = os.lstat(path)
    except OSError:
        return
    if not _is_trusted(status.st_uid, above=above):
        text = f"{path} belongs to user {_user(status.st_uid)}, with mode {stat.S_IMODE(status.st_mode):04o}"
        remedy = f"chown {_user(os.geteuid())} {path}, if all its content is yours"
        if above:
            remedy = "put the home (QMPSNAP_HOME) where only this user and root can write"
        yield Flaw(path, text, remedy, foreign=True, above=above)
    elif not stat.S_ISLNK(status.st_mode) and (who := _writers(path, status, above=above)):
        text = f"{path}, of user {_user(status.st_uid)} and with mode {stat.S_IMODE(status.st_mode):04o},"
        text += f" is writable by {who}"
        bare = "chmod g-w,o-w" if who in (_EVERYBODY, _group(status.st_gid)) else "setfacl -b"
        yield Flaw(path, text, f"{bare} {path}", foreign=False, above=above)


_EVERYBODY = "everybody"


def _writers(path: str, status: os.stat_result, *, above: bool) -> str:
    """Who else can write to a file or folder; empty for nobody that matters."""
    if not status.st_mode & _WRITE_BY_OTHERS:  # with an access control list the group's bits are the most it gives
        return ""
    if above and status.st_mode & stat.S_ISVTX:  # others may create files there but not replace ours
        return ""
    try:
        rights = acl.rights(path, status.st_mode)
    except OSError:
        rights = acl.Rights(group=7, other=status.st_mode & 7, users={}, groups={})
    if rights.other & acl.WRITE:
        return _EVERYBODY
    for user, given in rights.users.items():
        if given & acl.WRITE and not _is_trusted(user, above=False):
            return f"user {_user(user)}"
    for group, given in {**rights.groups, status.st_gid: rights.group}.items():
        if given & acl.WRITE and not _is_private(group, status.st_uid):
            return _group(group)
    return ""


def _is_trusted(user: int, *, above: bool) -> bool:
    return user in (0, os.geteuid()) or (above and user == _outside())


def _outside() -> int:
    """The user that stands for all who are outside of our user namespace, as the owners of a container's folders."""
    try:
        first = Path("/proc/self/uid_map").read_text().split()
        if first != ["0", "0", "4294967295"]:
            return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        pass
    return -1


def _is_private(group: int, user: int) -> bool:
    """Whether nobody but that user is in a group: Debian gives every user such a one."""
    try:
        members = set(grp.getgrgid(group).gr_mem)
        members |= {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == group}
        return members <= {pwd.getpwuid(user).pw_name}
    except KeyError:
        return False


def _user(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _group(group: int) -> str:
    try:
        return f"group {grp.getgrgid(group).gr_name}"
    except KeyError:
        return f"group {group}"
