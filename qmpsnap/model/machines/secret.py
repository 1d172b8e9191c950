"""The key of an encrypted disk: a value that nothing prints, and that only a descriptor carries to QEMU."""

from collections.abc import Mapping
from typing import Final

from qmpsnap.errors import UsageError

LEAST: Final = 32
"""Bytes a key has at least: every layer has a LUKS header whose key derivation is quick, so the key must be long."""
MOST: Final = 512

ENCRYPT: Final = "luks"
"""QAPI ``BlockdevQcow2EncryptionFormat``."""


class Secret:
    """A key as QEMU takes it: text in UTF-8, :data:`LEAST` to :data:`MOST` bytes, every one of them counts."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes, *, what: str) -> None:
        """Check a key, which an error calls ``what``; it does not tell the key."""
        problem = ""
        if not LEAST <= len(value) <= MOST:
            problem = f"has {len(value) if len(value) <= MOST else 'more'} bytes; {LEAST} to {MOST} are possible"
        elif b"\0" in value:
            problem = "contains a zero byte"
        else:
            try:
                value.decode()
            except UnicodeDecodeError:
                problem = "is not UTF-8 text"
        if problem:
            raise UsageError(
                f"{what} {problem}",
                hint="create a random one: (umask 077; head -c 32 /dev/urandom | base64 -w0 > FILE)",
            ) from None
        self._value = value

    def reveal(self) -> bytes:
        """The bytes, for the descriptor that carries them."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"


def given(secrets: Mapping[str, bytes]) -> dict[str, Secret]:
    """Keys that a program hands over, by ``machine/disk``."""
    return {place: Secret(value, what=f"the secret of {place}") for place, value in secrets.items()}


def secret_id(disk: str) -> str:
    """What QEMU calls the key of a disk (``-object secret``), for as long as it runs."""
    return f"qs-secret-{disk}"
