"""Sizes as people write them: a number with a unit, powers of 1024."""

import re
from fractions import Fraction
from typing import Final

UNITS: Final = "units are K, M, G, T and P, powers of 1024"
"""For a hint."""

_SIZE: Final = re.compile(r"(-?[0-9]{1,20}(?:\.[0-9]{1,20})?) ?(?:([kKmMgGtTpP])(?:iB)?|(B))?")
_POWERS: Final = {unit: 1 << (10 * (1 + power)) for power, unit in enumerate("kmgtp")}


def in_bytes(text: str, *, plain: int = 1) -> int | None:
    """The size in bytes, None for a text that is no whole number of them; ``plain``: what a bare number counts."""
    found = _SIZE.fullmatch(text)
    if not found:
        return None
    number, unit, one = found.groups()
    # QEMU would round an odd size up without a word; whoever asks says exactly what he gets.
    exact = Fraction(number) * (_POWERS[unit.lower()] if unit else 1 if one else plain)
    return int(exact) if exact.denominator == 1 else None
