"""Tags of snapshots: pairs of a key and a value, for people and programs to find them by. Pure."""

from __future__ import annotations

from qmpsnap.errors import UsageError

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MAX_TAGS = 64
"""Of one snapshot: a list reads them all."""
MAX_VALUE = 255
"""Bytes."""

MAX_KEY = 63
"""Characters."""


def check_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return ``tags``, sorted by key, when a snapshot may bear them."""
    if len(tags) > MAX_TAGS:
        raise UsageError(f"a snapshot can have {MAX_TAGS} tags, not {len(tags)}", hint="remove some of them")
    for key, value in tags.items():
        check_key(key)
        if not value.isprintable() or len(value.encode()) > MAX_VALUE:
            raise UsageError(
                f"the value of tag {key} is not allowed", hint=f"use at most {MAX_VALUE} bytes of printable characters"
            )
    return dict(sorted(tags.items()))


def check_key(key: str) -> str:
    """Return ``key`` when a tag may bear it."""
    if key[:1].isalnum() and key.isascii() and len(key) <= MAX_KEY and all(c.isalnum() or c in "._/-" for c in key):
        return key
    raise UsageError(
        f"tag key {key[:80]!r} is not allowed",
        hint="use 1 to 63 of A-Z, a-z, 0-9, '.', '_', '-' and '/', beginning with a letter or digit",
    )


def has(tags: Mapping[str, str], wanted: Mapping[str, str | None]) -> bool:
    """Whether all that are wanted are there; None stands for any value."""
    return all(key in tags and value in (None, tags[key]) for key, value in wanted.items())


def written(tags: Mapping[str, str]) -> str:
    """The tags in one line, for people."""
    return ", ".join(f"{key}={value}" for key, value in tags.items())


def parsed(texts: Sequence[str]) -> dict[str, str]:
    """Tags as people write them, ``key=value`` each."""
    found: dict[str, str] = {}
    for key, value in _pairs(texts):
        if value is None:
            raise UsageError(f"tag {key!r} has no value", hint=f"write {key}=VALUE")
        found[key] = value
    return check_tags(found)


def parsed_wanted(texts: Sequence[str]) -> dict[str, str | None]:
    """What is to be found: ``key=value``, or ``key`` with any value."""
    return {check_key(key): value for key, value in _pairs(texts)}


def _pairs(texts: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    seen: set[str] = set()
    for text in texts:
        key, equals, value = text.partition("=")
        if check_key(key) in seen:
            raise UsageError(f"tag {key} is given twice")
        seen.add(key)
        yield key, value if equals else None
