"""Text: what store, journal and QEMU can keep, and what a message may show."""


def is_text(name: str) -> bool:
    """Whether a name is UTF-8, as all that store and journal keep is; a file's name in Linux need not be."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def printable(text: str | bytes, limit: int = 300) -> str:
    """Foreign text made fit for a message: control characters escaped, cut to ``limit`` characters."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    short = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in short)
