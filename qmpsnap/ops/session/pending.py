"""An operation that nobody ended, as recovery works on it."""

from typing import Generic, Literal

from msgspec import Struct

from qmpsnap.errors import OperationPending
from qmpsnap.hint import call
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Operation, P_co
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp.jobs import Report, unreported

Direction = Literal["forward", "back"]
"""How an operation is ended: finished, or undone."""

Unfinished = Literal["refuse", "carry on", "cancel"]
"""What to do with a job that still works: leave it to its work, see it to its end, or end it."""


class Broken(Struct, Generic[P_co], frozen=True, kw_only=True):
    """An open operation of a machine whose lock we hold, and what is wanted of its end.

    ``unfinished``: what to do with a job that still works; ``report`` is told about its progress when it is carried on.
    ``error``: why it did not come to its own end; kept with an operation that is undone.
    """

    context: Context
    machine: Machine
    operation: Operation[P_co]
    unfinished: Unfinished
    error: str = "interrupted"
    report: Report = unreported

    async def mark_failed(self) -> None:
        """Record that it is undone."""
        await self.context.astore.mark(self.operation.id, "failed", error=self.error)

    async def mark_settled(self, *, error: str | None = None) -> None:
        """Record that it is finished, or as finished as it will be: ``error`` is what is not."""
        await self.context.astore.mark(self.operation.id, "settled", step=steps.SETTLED, error=error)

    def pending(self, why: str) -> OperationPending:
        """It cannot be ended now."""
        of = self.operation
        stop: str = ""
        if self.context.process(self.machine) and not self.machine.adopted:
            stop = "; if QEMU goes on failing, as it does once a flush has failed, first "
            stop += call("stop", of.machine, force=True)
        return OperationPending(
            f"operation {of.id} ({of.verb}) on machine {of.machine} cannot be recovered now: {why}",
            hint="fix that, then "
            + call("recover", of.machine)
            + stop
            + "; or give it up with "
            + call("undefine", of.machine, disks="keep"),
            machine=of.machine,
            operation=str(of.id),
        )

    def still_works(self, status: str) -> OperationPending:
        """Its job goes on, and nobody has said what to do with it."""
        of = self.operation
        return OperationPending(
            f"the job of operation {of.id} ({of.verb}) on machine {of.machine} is {status}",
            hint=call("wait", of.machine) + ", or " + call("cancel", of.machine),
            machine=of.machine,
            operation=str(of.id),
        )
