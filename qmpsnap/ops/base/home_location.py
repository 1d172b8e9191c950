"""A home's path and the path that its store has recorded: headers and records contain the recorded one.

They differ if a home was moved or copied. Changes are then refused until ``relocate`` has written the present path into
headers and records.
"""

import contextlib
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.block.image import header
from qmpsnap.errors import HostCannot, ImageRefused, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.model.home import Home
from qmpsnap.model.relocation import HomeRecord
from qmpsnap.store.records import Records
from qmpsnap.store.store import Store


def recorded(home: Home, store: Store) -> HomeRecord:
    """What is recorded of a home; where nothing is, as by an earlier release, what headers say. Writes nothing."""
    import uuid

    if found := store.home.record():
        return found
    # What was written down tells of a store that was made again.
    noted = Records(home.machines).home()
    return noted or HomeRecord(uuid.uuid4().hex, _by_headers(home, store) or str(home.data))


def named(home: Home, record: HomeRecord) -> Home:
    """The places by the name that is recorded, where that leads to the same folder: through a link, or a mount."""
    if record.path == str(home.data):
        return home
    try:
        if not Path(record.path).samefile(home.data):
            return home
    except OSError:
        return home
    data = Path(record.path)
    beneath = {"run": data / "run", "cache": data / "cache"} if home.beneath else {}
    return replace(home, data=data, **beneath)


def recorded_elsewhere(home: Home, store: Store, host: str) -> str | None:
    """The path at which the store believes its home to lie, if that is another than this one.

    Left alone where the store has machines of other hosts, which may have mounted it elsewhere.
    """
    record = recorded(home, store)
    if record.path == str(home.data):
        return None
    return None if any(machine.host != host for machine in store.machines()) else record.path


def original(record: HomeRecord, home: Home) -> str | None:
    """The path of the home that this one is a copy of, as far as that can be seen from here."""
    if record.path == str(home.data):
        return None
    there = Records(replace(home, data=Path(record.path)).machines).home()
    return record.path if there and there.id == record.id else None


def require_here(home: Home, store: Store, host: str) -> None:
    """Refuse to change anything by headers and records that name another folder."""
    if old := recorded_elsewhere(home, store, host):
        raise StoreMismatch(sentence(home, old), hint=REMEDY)


REMEDY = call("relocate") + " accepts the new place"


def sentence(home: Home, old: str) -> str:
    """What is wrong."""
    return f"the home {home.data} was moved or copied: the store and the headers of its images name {old}"


def _by_headers(home: Home, store: Store) -> str | None:
    """The folder that the first header with a backing in the machines' folder names as the home."""
    layers = store.forest().layers
    for layer in layers.values():
        below = layers.get(layer.backing) if layer.backing else None
        if not below or not layer.owned or not below.path.startswith(f"{home.machines}/"):
            continue
        with contextlib.suppress(ImageRefused, HostCannot):
            said = header.read(layer.path, format=layer.format).backing
            if said and (root := root_of(said, below.path.removeprefix(f"{home.data}"))):
                return root
    return None


def root_of(said: str, inside: str) -> str | None:
    """The home's folder by a path that lies in it as ``inside``, which begins with a slash; None for another place."""
    root = said.removesuffix(inside)
    return root if root != said and root.startswith("/") else None
