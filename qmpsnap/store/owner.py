"""Which users can write to a home: such a user decides what QEMU runs, with the rights of the user who starts it.

So a home is refused as OpenSSH refuses keys (``StrictModes``): by root, where anybody else may write to it or to a
folder that it lies in; by every user, where it belongs to somebody else who is not root. A user's own folder may lie
in one that is not root's: whose that is, the user has not decided. For root folders are looked at from
``/`` on downwards: where only trusted users can write to a folder, nobody else can replace what lies in it.
"""

from __future__ import annotations

import os
import stat

from qmpsnap.errors import HomeUntrusted, HostCannot
from qmpsnap.host import aside
from qmpsnap.host.files import opened, read
from qmpsnap.host.value import Value

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qmpsnap.host.files import Name
    from qmpsnap.model.home import Home

_INSIDE = ("qmpsnap.db", "qmpsnap.db-wal", "qmpsnap.db-shm", "records", "locks")
_WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Flaw(Value):
    """A file or folder of a home that somebody else can change, or (``foreign``) owns; ``remedy`` is a command.

    ``above``: the home only lies in it.
    """

    path: str
    text: str
    remedy: str
    foreign: bool
    above: bool = False


def require(folder: Name, machines: Name | None = None) -> None:
    """Make sure that nobody else can write to a home, as far as that matters to this user; see the module.

    ``folder`` has the store, or sockets; beside a store lies the machines' folder, which a link may lead to.
    """
    led = machines is not None and os.path.islink(machines)  # noqa: PTH114
    user, found = os.geteuid(), [*flaws(folder, *([machines] if machines and not led else []))]
    if machines and led:  # to storage that may hang, which what needs no image does not wait for
        from qmpsnap.host.outstanding import briefly

        found += briefly(lambda: [*flaws(machines)], [], seconds=aside.PATIENCE)
    for flaw in found:
        if user == 0 or flaw.foreign:
            raise HomeUntrusted(
                f"{'root' if user == 0 else 'this user'} does not use {folder}: {flaw.text}",
                hint=flaw.remedy,
            )


def flaws(data: Name, *others: Name) -> Iterator[Flaw]:
    """What of a home somebody else can change: the folders that it lies in first; nothing of one that is not there."""
    folders = [os.fspath(folder) for folder in (data, *others)]
    inside = [*folders, *(f"{folders[0]}/{name}" for name in _INSIDE)]
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


def of_folder(path: Name) -> Iterator[Flaw]:
    """How somebody else can change what is in one folder."""
    yield from _flaw(str(path), above=False)


def close_to_others(path: str) -> None:
    """Take the right to write to it from everybody but the owner of a file or folder."""
    try:
        with opened(path) as descriptor:
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & ~_WRITE_BY_OTHERS)
    except OSError as error:
        raise HostCannot(f"the mode of {path} cannot be changed: {error.strerror}") from error


def _above(folder: str) -> Iterable[str]:
    """The folders and links that lead to a folder, from the root on."""
    if not os.path.exists(folder):  # noqa: PTH110
        return []
    return [*_parents(folder), *([folder] if os.path.islink(folder) else []), *_parents(os.path.realpath(folder))]  # noqa: PTH114


def _parents(folder: str) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[:count]) or "/" for count in range(1, len(parts))]


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
    from qmpsnap.host import acl

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
        if read("/proc/self/uid_map").split() != ["0", "0", "4294967295"]:
            return int(read("/proc/sys/kernel/overflowuid"))
    except (OSError, ValueError):
        pass
    return -1


def _is_private(group: int, user: int) -> bool:
    """Whether nobody but that user is in a group: Debian gives every user such a one."""
    import grp
    import pwd

    try:
        members = set(grp.getgrgid(group).gr_mem)
        members |= {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == group}
        return members <= {pwd.getpwuid(user).pw_name}
    except KeyError:
        return False


def _user(user: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _group(group: int) -> str:
    import grp

    try:
        return f"group {grp.getgrgid(group).gr_name}"
    except KeyError:
        return f"group {group}"
