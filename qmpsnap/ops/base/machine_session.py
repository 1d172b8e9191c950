"""What one verb works with for its length: the home, a machine, and the QEMU that runs it."""

from msgspec import Struct

from qmpsnap.model.machines.record import Machine
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp.session import Monitor


class MachineSession(Struct, frozen=True):
    """A machine that is ours for the length of one verb; ``qemu`` is None when it is stopped.

    ``basis``: what the store said of it when the verb began; one that removes layers has it with the sharers.
    """

    context: Context
    machine: Machine
    qemu: Monitor | None = None
    basis: Basis = Basis(name="")

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.machine.name
