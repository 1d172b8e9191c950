"""What every handle of a machine has: its name, its record, and what it is equal to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpsnap.errors import NotFoundError, QmpsnapError
from qmpsnap.host.borders import border
from qmpsnap.model.machines.state import State
from qmpsnap.ops.base.async_store import blocking

if TYPE_CHECKING:
    from qmpsnap.api.job import Running
    from qmpsnap.model.machines.record import Machine
    from qmpsnap.ops.base.context import Context


@border
class MachineBase:
    """One machine of a home, by name."""

    def __init__(self, context: Context, name: str, running: Running | None = None) -> None:
        self._context = context
        self._running: Running = set() if running is None else running
        self._seen: State | None = None
        self.name = name

    def __repr__(self) -> str:
        """The name, and the state it is in as far as that can be said without asking its QEMU."""
        try:
            process = self._context.process(self._context.store.machine(self.name))
        except NotFoundError:
            return f"<Machine {self.name} undefined>"
        except (QmpsnapError, OSError):
            return f"<Machine {self.name}>"
        state = self._seen if self._seen and self._seen.has_qemu else State.RUNNING
        return f"<Machine {self.name} {state if process else State.STOPPED}>"

    def __eq__(self, other: object) -> bool:
        """Whether it is a handle of the same machine of the same home."""
        return isinstance(other, MachineBase) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str]:
        return str(self._context.home.data), self.name

    async def record(self) -> Machine:
        """The machine as the store has it.

        Raises:
            NotFoundError: it was undefined.
        """
        return await blocking(self._context.store.machine, self.name)
