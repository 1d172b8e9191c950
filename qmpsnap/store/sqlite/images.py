"""The images that a machine reads, asked of the store without the models of what they are for."""

from __future__ import annotations

from qmpsnap.model.layers.reads import ReadImage, Reads
from qmpsnap.model.layers.stamp import Stamp
from qmpsnap.store.sqlite import queries
from qmpsnap.store.sqlite.queries import absolute, unsigned

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from qmpsnap.host.files import Name
    from qmpsnap.model.layers.stamp import History
    from qmpsnap.model.names import LayerId
    from qmpsnap.store.sqlite.database import Database


class ImageTable:
    """Those rows of a store.

    Args:
        database: the store.
        machines: the folder with the machines' folders.
    """

    def __init__(self, database: Database, *, machines: Name) -> None:
        self._database = database
        self._machines = machines

    def read_by(self, machine: str) -> Reads:
        """What the machine of that name reads; nothing where there is none."""
        with self._database.reading() as sql:
            row = sql.execute("SELECT id FROM machine WHERE name = ?", (machine,)).fetchone()
            number = row[0] if row else -1
            active = sql.execute("SELECT active FROM disk WHERE machine = ?", (number,)).fetchall()
            images = sql.execute(queries.READ_IMAGES, (number, number)).fetchall()
            stamps = sql.execute(queries.READ_STAMPS, (number, number)).fetchall()
        found = {image.id: image for image in map(self._image, images)}
        known: dict[LayerId, History] = {}
        for layer, *stamp in stamps:
            known[layer] = (*known.get(layer, ()), Stamp(*stamp))
        return Reads(found, frozenset(layer for (layer,) in active), known)

    def active(self) -> dict[str, Reads]:
        """The images that the guest of each machine writes to, and no others; none of a machine without disks."""
        found: dict[str, dict[LayerId, ReadImage]] = {}
        with self._database.reading() as sql:
            for machine, *row in sql.execute(queries.ACTIVE_IMAGES):
                image = self._image(row)
                found.setdefault(machine, {})[image.id] = image
        return {machine: Reads(images, frozenset(images), {}) for machine, images in found.items()}

    def count(self) -> int:
        """How many images there are, of all machines."""
        with self._database.reading() as sql:
            return int(sql.execute("SELECT count(*) FROM layer").fetchone()[0])

    def _image(self, row: Sequence[Any]) -> ReadImage:
        layer, pool, path, form, backing, device, inode, birth, storage, identity = row
        place = absolute(pool, path, machines=self._machines)
        number = unsigned(device), unsigned(inode), birth
        return ReadImage(layer, place, form, backing, *number, storage, identity)
