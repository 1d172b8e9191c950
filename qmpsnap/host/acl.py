"""POSIX access control lists, as Linux keeps them: who besides a file's owner may touch it, and one more user who may.

By ``system.posix_acl_access``, so that no program has to be there, and on an open descriptor. Where a file has such a
list the group's bits of its mode are only the most that anybody named in it gets.
"""

import errno
import os
import struct
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

READ: Final = 4
WRITE: Final = 2
ENTER: Final = 1
"""What ``x`` is for a folder."""

_NAME: Final = "system.posix_acl_access"
_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")
_OWNER, _USER, _GROUP, _NAMED_GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NOBODY: Final = 0xFFFFFFFF
"""The id in an entry that names nobody."""

_NONE_THERE: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS})

File = int | str
"""An open descriptor, or a path whose last part is no link."""


class Rule(Struct, frozen=True, order=True):
    """One entry: its kind, whom it names, and which of ``rwx`` it gives."""

    tag: int
    name: int
    rights: int


class Rights(Struct, frozen=True, kw_only=True):
    """What others than its owner may do to a file, as ``rwx`` bits; named users and groups by their ids."""

    group: int
    other: int
    users: dict[int, int]
    groups: dict[int, int]

    def beyond(self, trusted: frozenset[int]) -> int:
        """What anybody may do who is neither the owner nor one of these users."""
        named = [rights for user, rights in self.users.items() if user not in trusted]
        found = self.group | self.other
        for rights in (*named, *self.groups.values()):
            found |= rights
        return found


def rights(file: File, mode: int) -> Rights:
    """What others may do to a file of that mode; links are followed."""
    rules = _read(file)
    if not rules:
        return Rights(group=mode >> 3 & 7, other=mode & 7, users={}, groups={})
    mask = next((rule.rights for rule in rules if rule.tag == _MASK), 7)
    return Rights(
        group=next((rule.rights for rule in rules if rule.tag == _GROUP), 0) & mask,
        other=mode & 7,
        users={rule.name: rule.rights & mask for rule in rules if rule.tag == _USER},
        groups={rule.name: rule.rights & mask for rule in rules if rule.tag == _NAMED_GROUP},
    )


def grant(descriptor: int, user: int, wanted: int) -> bool:
    """Let a user do that much to an open file, besides what it may already; say whether anything had to be changed."""
    mode = os.fstat(descriptor).st_mode
    if rights(descriptor, mode).users.get(user, 0) & wanted == wanted:
        return False
    rules = _read(descriptor) or [
        Rule(_OWNER, _NOBODY, mode >> 6 & 7),
        Rule(_GROUP, _NOBODY, mode >> 3 & 7),
        Rule(_OTHER, _NOBODY, mode & 7),
    ]
    # A mask that a chmod has left must not give anybody named before more than they have now.
    mask = next((rule.rights for rule in rules if rule.tag == _MASK), 7)
    kept = [
        Rule(rule.tag, rule.name, rule.rights & mask if rule.tag in (_USER, _GROUP, _NAMED_GROUP) else rule.rights)
        for rule in rules
        if rule.tag != _MASK and (rule.tag, rule.name) != (_USER, user)
    ]
    had = next((rule.rights & mask for rule in rules if (rule.tag, rule.name) == (_USER, user)), 0)
    kept.append(Rule(_USER, user, had | wanted))
    most = 0
    for rule in kept:
        most |= rule.rights if rule.tag in (_USER, _GROUP, _NAMED_GROUP) else 0
    _write(descriptor, [*kept, Rule(_MASK, _NOBODY, most)])
    return True


def revoke(descriptor: int) -> None:
    """Take the list off an open file: then its mode alone counts, which is to give others nothing."""
    try:
        os.removexattr(descriptor, _NAME)
    except OSError as error:
        if error.errno not in _NONE_THERE:
            raise


def _read(file: File) -> list[Rule]:
    try:
        raw = os.getxattr(file, _NAME)
    except OSError as error:
        if error.errno in _NONE_THERE:
            return []
        raise
    if raw[:4] != _VERSION or (len(raw) - 4) % _ENTRY.size:
        raise OSError(errno.EINVAL, "its access control list is of an unknown form")
    return [Rule(tag, name, given) for tag, given, name in _ENTRY.iter_unpack(raw[4:])]


def _write(descriptor: int, rules: Sequence[Rule]) -> None:
    raw = b"".join(_ENTRY.pack(rule.tag, rule.rights, rule.name) for rule in sorted(rules))
    os.setxattr(descriptor, _NAME, _VERSION + raw)
