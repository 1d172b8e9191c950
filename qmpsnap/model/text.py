"""Text: what store, journal and QEMU can keep, what a message may show, and which word another was meant for."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterable


def is_text(name: str) -> bool:
    """Whether a name is UTF-8, as all that store and journal keep is; a file's name in Linux need not be."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def printable(text: str | bytes, limit: int = 300) -> str:
    """Foreign text made fit for a message: control characters escaped, cut to ``limit`` characters."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    short = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in short)


_LONGEST = 70
"""Characters of a word that are compared: no name is longer."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The question whether a known word was meant, when one looks like this; otherwise an empty string."""
    from difflib import get_close_matches  # slow to load, and only errors ask

    found = get_close_matches(word[:_LONGEST].lower().replace("_", "-"), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
