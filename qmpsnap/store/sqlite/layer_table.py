"""Rows of layers, and the parts of the layer graph that one machine's plans ask about.

A store may have the layers of many machines; what is asked about one of them must not take longer for it. So each
question here walks indexes from the layers that it is about: down by ``backing``, up by the index of that column.
"""

import os
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.rbd import PREFIX
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.planning import sharing
from qmpsnap.model.planning.layer_graph import Forest, Reference, Writer, based
from qmpsnap.model.planning.sharing import Name
from qmpsnap.store.sqlite import queries
from qmpsnap.store.sqlite.queries import absolute, signed, unsigned


class LayerTable:
    """The layers of one store, with paths as this host has them.

    Args:
        machines: folder that layer paths of pool ``machines`` are relative to.
    """

    def __init__(self, machines: Path) -> None:
        self._machines = machines

    def place(self, path: str) -> tuple[str, str]:
        """(pool, relative path): layers in the machines' folder move with it, others are this host's or a cluster's."""
        if path.startswith(PREFIX):
            return "rbd", path
        # As text: a layer's path is the very string in the header above it, and pathlib would tidy it up.
        inside = path.removeprefix(f"{self._machines}/")
        return ("machines", inside) if inside != path else (f"host:{os.uname().nodename}", path.removeprefix("/"))

    def path(self, pool: str, path: str) -> str:
        """The other way round."""
        return absolute(pool, path, machines=self._machines)

    def read(self, row: sqlite3.Row) -> Layer:
        """A row of :data:`qmpsnap.store.sqlite.queries.LAYER` as a value."""
        layer, pool, path, layer_format, backing, size, device, inode, owned, state, birth, storage, identity = row
        return Layer(
            id=layer, path=self.path(pool, path), format=layer_format, backing=backing, virtual_size=size,
            device=unsigned(device), inode=unsigned(inode), owned=bool(owned), state=state, birth=birth,
            storage=storage, identity=identity,
        )  # fmt: skip

    def put(self, sql: sqlite3.Connection, layer: Layer) -> None:
        """Add a layer, or replace the one of that id."""
        values = (
            layer.id, *self.place(layer.path), layer.format, layer.backing, layer.virtual_size,
            signed(layer.device), signed(layer.inode), layer.owned, layer.state, layer.birth,
            layer.storage, layer.identity,
        )  # fmt: skip
        sql.execute(queries.PUT_LAYER, values)

    def at(self, sql: sqlite3.Connection, path: str) -> Layer | None:
        """The layer recorded for an absolute path."""
        row = sql.execute(f"SELECT {queries.LAYER} FROM layer WHERE pool = ? AND path = ?", self.place(path)).fetchone()
        return self.read(row) if row else None

    def of_file(self, sql: sqlite3.Connection, device: int, inode: int) -> list[Layer]:
        """The layers recorded for a file."""
        asked = f"SELECT {queries.LAYER} FROM layer WHERE inode = ? AND device = ?"
        return [self.read(row) for row in sql.execute(asked, (signed(inode), signed(device)))]

    def known(self, sql: sqlite3.Connection, wanted: Iterable[LayerId]) -> dict[LayerId, Layer]:
        """Those of the layers that are recorded."""
        asked = f"SELECT {queries.LAYER} FROM layer WHERE {queries.AMONG} ORDER BY rowid"
        return {row[0]: self.read(row) for row in sql.execute(asked, (_listed(wanted),))}

    def chain(self, sql: sqlite3.Connection, active: LayerId) -> tuple[Layer, ...]:
        """The layers from an active one down to its base, base first."""
        return chain_in(self.known(sql, self._connected(sql, queries.BELOW, [active])), active)

    def whole(self, sql: sqlite3.Connection) -> Forest:
        """Every layer, disk and point."""
        layers = [self.read(row) for row in sql.execute(f"SELECT {queries.LAYER} FROM layer ORDER BY rowid")]
        return Forest(
            {layer.id: layer for layer in layers},
            tuple(Writer(*row) for row in sql.execute(queries.WRITERS.format("1"))),
            tuple(Reference(*row) for row in sql.execute(queries.REFERENCES.format("1"))),
        )

    def around(self, sql: sqlite3.Connection, layers: Iterable[LayerId]) -> Forest:
        """All that is connected with these, from layer to layer, whichever reads which."""
        return self._part(sql, self._connected(sql, queries.AROUND, layers))

    def below(self, sql: sqlite3.Connection, layers: Iterable[LayerId]) -> Forest:
        """These and what they read, with every disk and point there; not what others have above it."""
        return self._part(sql, self._connected(sql, queries.BELOW, layers))

    def of_machine(self, sql: sqlite3.Connection, machine: str) -> list[LayerId]:
        """The layers that a machine's disks and snapshots name, and those that lie in its folder."""
        return [row[0] for row in sql.execute(queries.OWN, (machine, machine, f"{machine}/", f"{machine}0"))]

    def nobodys(self, sql: sqlite3.Connection) -> list[LayerId]:
        """Layers at chosen places that no machine reads; each layer at such a place is looked at for it."""
        chosen = "(pool < 'machines' OR pool > 'machines')"  # by the index, unlike <>
        return [row[0] for row in sql.execute(f"SELECT id FROM layer WHERE {chosen} AND {queries.UNREAD}")]

    def unread(self, sql: sqlite3.Connection, layers: Iterable[LayerId]) -> list[LayerId]:
        """Those of the layers that are recorded and that no machine reads."""
        asked = f"SELECT id FROM layer WHERE {queries.AMONG} AND {queries.UNREAD} ORDER BY rowid"
        return [row[0] for row in sql.execute(asked, (_listed(layers),))]

    def named(self, sql: sqlite3.Connection, names: Collection[Name]) -> set[LayerId]:
        """The layers known by one of these names: by id, by path, by identity, by device and inode."""
        texts = [name for name in names if isinstance(name, str)]
        found = {*self.known(sql, [LayerId(name) for name in texts])}
        if identities := [name for name in texts if ":" in name and not sharing.is_path(name)]:
            identified = f"SELECT id FROM layer WHERE identity <> '' AND identity IN ({queries.LISTED_VALUES})"
            found |= {row[0] for row in sql.execute(identified, (_listed(identities),))}
        for name in names:
            if not isinstance(name, str):
                found |= {layer.id for layer in self.of_file(sql, *name)}
            elif sharing.is_path(name) and (layer := self.at(sql, name)):
                found.add(layer.id)
        return found

    def remove_unreferenced(self, sql: sqlite3.Connection, layers: Collection[LayerId]) -> list[Layer]:
        """Forget those of the layers that neither a disk, nor a point, nor a layer above needs; from the top down."""
        gone: list[Layer] = []
        asked = layers
        while asked:
            rows = sql.execute(f"{queries.UNREFERENCED} ORDER BY rowid", (_listed(asked),))
            found = [self.read(row) for row in rows]
            self.remove(sql, [layer.id for layer in found])
            gone += found
            asked = {
                layer.backing for layer in found if layer.backing and layer.backing in layers
            }  # what nothing may need now
        return gone

    def remove(self, sql: sqlite3.Connection, layers: Iterable[LayerId]) -> None:
        """Forget layers."""
        sql.executemany("DELETE FROM layer WHERE id = ?", [(layer,) for layer in layers])

    def is_whole(self, sql: sqlite3.Connection, change: Change) -> bool:
        """Whether all that a change names is recorded, and nobody needs what it has removed: else COMMIT fails."""
        layers = [layer.id for layer in change.layers]
        points = [point.layer for snapshot in change.snapshots for point in snapshot.points]
        named = {*change.active.values(), *points}
        lacking = sql.execute(queries.LACKING, (_listed(layers), _listed(named), _listed(change.removed_layers)))
        return lacking.fetchone() is None

    def _part(self, sql: sqlite3.Connection, layers: Collection[LayerId]) -> Forest:
        listed = (_listed(layers),)
        return Forest(
            self.known(sql, layers),
            tuple(Writer(*row) for row in sql.execute(queries.WRITERS.format(queries.ACTIVE_AMONG), listed)),
            tuple(Reference(*row) for row in sql.execute(queries.REFERENCES.format(queries.POINT_AMONG), listed)),
        )

    def _connected(self, sql: sqlite3.Connection, how: str, layers: Iterable[LayerId]) -> list[LayerId]:
        return [row[0] for row in sql.execute(how, (_listed(layers),))]


def chain_in(known: Mapping[LayerId, Layer], active: LayerId) -> tuple[Layer, ...]:
    """The same of layers that were read before."""
    layers: list[Layer] = []
    at: LayerId | None = active
    while at is not None and at in known and len(layers) <= len(known):
        layers.append(known[at])
        at = known[at].backing
    return based(reversed(layers))


def _listed(layers: Iterable[str]) -> str:
    """Texts as one value of a question."""
    return msgspec.json.encode([*layers]).decode()
