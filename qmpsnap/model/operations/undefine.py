"""The removal of a machine's files."""

from msgspec import Struct

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.names import LayerId


class UndefinePlan(Struct, frozen=True, kw_only=True, tag="undefine"):
    """Remove the files of a machine that was forgotten as this was opened; the layers are ours, top first.

    ``sizes``: of frozen layers, the bytes their files had: one of another size was written to, and stays.
    """

    machine: str
    layers: tuple[Layer, ...]
    states: tuple[Vmstate, ...]
    variables: tuple[str, ...]
    sizes: dict[LayerId, int]
