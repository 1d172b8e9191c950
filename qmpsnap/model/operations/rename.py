"""The plan of ``rename``: a machine gets another name."""

from msgspec import Struct

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import LayerId


class RenamePlan(Struct, frozen=True, kw_only=True, tag="rename"):
    """Give a stopped machine another name, and its folder with it.

    Attributes:
        new: its name afterwards.
        folder: the path of its folder; ``new_folder``: afterwards.
        moved: every layer in that folder, as recorded before.
        rewritten: the layers whose headers name one of those as their backing file, wherever they are.
        others: the other machines that read such a layer.
    """

    machine: str
    new: str
    folder: str
    new_folder: str
    moved: tuple[Layer, ...]
    rewritten: tuple[LayerId, ...]
    others: tuple[str, ...]
