"""In what condition a store's file is, before one is made in its place."""

from pathlib import Path
from typing import Literal

from qmpsnap.errors import StoreMismatch, StoreTooNew
from qmpsnap.store.sqlite.backend import SqliteStore

Condition = Literal["missing", "damaged", "empty", "whole"]
"""``empty``: it has no machine, as one that was made a moment ago."""


def look(path: Path, *, machines: Path) -> Condition:
    """The condition of a store, unless it cannot be opened or a newer qmpsnap wrote it."""
    if not path.exists():
        return "missing"
    try:
        with SqliteStore(path, machines=machines) as store:
            if not store.is_sound():
                return "damaged"
            return "whole" if store.machines() else "empty"
    except StoreTooNew:
        raise
    except StoreMismatch:
        return "damaged"
