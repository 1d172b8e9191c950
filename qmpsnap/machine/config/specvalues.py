"""Readers of a spec's values: a checked value of a YAML tree, or what was expected there and what was found.

Every reader raises SpecError with the value's place; none looks at a file or at another key.
"""

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from qmpsnap.errors import NameRefused
from qmpsnap.machine.config.yamltree import Tree
from qmpsnap.model.names import check_disk_name, check_name

Reader = Callable[[Tree, str], Any]
"""Makes a checked value of a tree; the second argument is what errors call it."""

GUEST = "@guest/"
"""A path that begins so lies in the small guest's folder."""
SECTOR = 512
MIB = 1 << 20
MAX_MEMORY = 16 << 40
MAX_DISK = (1 << 63) - SECTOR

_SIZE = re.compile(r"(-?[0-9]{1,20}(?:\.[0-9]{1,20})?) ?(?:([kKmMgGtTpP])(?:iB)?|B)?")
_UNITS = {unit: 1 << (10 * (1 + power)) for power, unit in enumerate("kmgtp")}
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def nearest(word: str, known: list[str]) -> str:
    """The question whether a known word was meant, when one looks like this; else nothing."""
    found = get_close_matches(word[:40].lower().replace("_", "-"), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def items(tree: Tree, what: str) -> tuple[Tree, ...]:
    """A list's items."""
    if not isinstance(tree.value, tuple):
        tree.refuse(f"expected {what} to be a list, found {tree.described()}")
    return tree.value


def string(tree: Tree, what: str) -> str:
    """One line of text; a number is not taken for one, as ``010`` and ``1e3`` would not come back as written."""
    if not isinstance(tree.value, str):
        hint = f"put it in quotes: '{tree.text}'" if tree.text and tree.value is not None else ""
        tree.refuse(f"expected {what} to be a string, found {tree.described()}", hint)
    for char in tree.value:
        # QEMU would end the argument at a NUL; a lone surrogate is no text at all.
        if (char < " " and char != "\t") or char == "\x7f" or "\ud800" <= char <= "\udfff":
            tree.refuse(f"{what} holds the character U+{ord(char):04X}", "write it on one line, without control codes")
    return tree.value


def strings(tree: Tree, what: str) -> tuple[str, ...]:
    """A list of strings."""
    return tuple(string(item, what) for item in items(tree, what))


def matching(pattern: re.Pattern[str], expected: str) -> Reader:
    """A reader of strings that the pattern matches as a whole; ``expected`` describes one."""

    def reader(tree: Tree, what: str) -> str:
        text = string(tree, what)
        if not pattern.fullmatch(text):
            tree.refuse(f"expected {what} to be {expected}, found {tree.described()}")
        return text

    return reader


def one_of(words: Any, remedy: str = "") -> Reader:
    """A reader of a ``Literal``'s words, or of the words of a tuple; ``remedy`` goes with what is none of them."""
    known: tuple[str, ...] = get_args(words) or words

    def reader(tree: Tree, what: str) -> str:
        if tree.value not in known:
            near = nearest(tree.text, list(known))
            tree.refuse(f"expected {what} to be one of {', '.join(known)}, found {tree.described()}{near}", remedy)
        return tree.text

    return reader


def flag(tree: Tree, what: str) -> bool:
    """True or false; yes, no, on and off are strings in YAML 1.2, which these keys understand."""
    found = _FLAGS.get(tree.text.lower())
    if found is None:
        tree.refuse(f"expected {what} to be true or false, found {tree.described()}")
    return found


def whole(least: int, most: int) -> Reader:
    """A reader of whole numbers within the bounds, both included."""

    def reader(tree: Tree, what: str) -> int:
        value = tree.value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            tree.refuse(f"expected {what} to be a whole number from {least} to {most}, found {tree.described()}")
        return value

    return reader


def disk_size(tree: Tree, what: str) -> int:
    """Bytes, whole sectors of them; a number without a unit is bytes."""
    return _size(tree, what, plain=1, grain=SECTOR, largest=MAX_DISK)


def memory(tree: Tree, what: str) -> int:
    """Bytes, whole MiB of them; a number without a unit is MiB, as for QEMU's ``-m``."""
    # QEMU would round an odd size up without a word; a spec says exactly what it gets.
    return _size(tree, what, plain=MIB, grain=MIB, largest=MAX_MEMORY)


def _size(tree: Tree, what: str, *, plain: int, grain: int, largest: int) -> int:
    """Bytes; ``plain`` is what a number without a unit counts, ``grain`` what the size must be a multiple of."""
    value = str(tree.value) if type(tree.value) is int else tree.value
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not found:
        hint = "units are K, M, G, T and P, powers of 1024"
        tree.refuse(f"expected {what} to be a size such as 512M or 1.5G, found {tree.described()}", hint)
    number, unit = found.groups()
    scale = _UNITS[unit.lower()] if unit else 1 if found[0].endswith("B") else plain
    exact = Fraction(number) * scale
    if exact <= 0:
        tree.refuse(f"{what} must be above zero, found {tree.described()}")
    if exact > largest:
        tree.refuse(f"{what} can be at most {_shown(largest)}, found {tree.described()}")
    if exact % grain:
        near = max(grain, round(exact / grain) * grain)
        tree.refuse(f"{what} must be a multiple of {_shown(grain)}, found {tree.described()}; nearest: {_shown(near)}")
    return int(exact)


def _shown(size: int) -> str:
    """A size as it can be written in a spec."""
    return f"{size // MIB}M" if size % MIB == 0 else f"{size}B"


def machine_name(tree: Tree, what: str) -> str:
    """A machine's name."""
    try:
        return check_name(string(tree, what), "machine")
    except NameRefused as error:
        tree.refuse(error.message, error.hint)


def disk_name(tree: Tree, what: str) -> str:
    """A disk's name."""
    try:
        return check_disk_name(string(tree, what))
    except NameRefused as error:
        tree.refuse(error.message, error.hint)


def file_path(tree: Tree, what: str, folder: Path, guest_dir: Path) -> str:
    """An absolute path; symbolic links stay as they are, for they may be meant to change."""
    text = string(tree, what)
    if not text or text.endswith("/"):
        tree.refuse(f"expected {what} to be a file's path, found {tree.described()}")
    if text.startswith("~"):
        tree.refuse(f"{what}: '~' is not expanded", "write the whole path")
    if text.startswith("@") and not text.startswith(GUEST):
        tree.refuse(f"{what}: only {GUEST} is known among the paths that begin with '@'", f"as in {GUEST}vmlinuz")
    if text.startswith(GUEST):
        return os.path.abspath(guest_dir / text.removeprefix(GUEST))  # noqa: PTH100 - Path.resolve follows links
    return os.path.abspath(folder / text)  # noqa: PTH100 - as above
