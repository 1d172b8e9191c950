"""What store, journal and QEMU can keep as text."""


def is_text(name: str) -> bool:
    """Whether a name is UTF-8, as all that store and journal keep is; a file's name in Linux need not be."""
    return not any("\ud800" <= char <= "\udfff" for char in name)
