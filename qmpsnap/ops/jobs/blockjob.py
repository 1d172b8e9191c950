"""A block job of an operation as a value, and the QEMU it runs in: the machine's own, or a worker."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from msgspec import Struct

from qmpsnap.block import graph
from qmpsnap.errors import QemuGone, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.machine import worker
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import JobId, OperationId, job_id
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Change, Merge, MirrorPlan
from qmpsnap.ops.base import luks
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor


class BlockJob(Struct, frozen=True, kw_only=True):
    """A job from before its start to after its end, even if another qmpsnap process started it.

    The QEMU it runs in is not part of it: if QEMU has died, the job still has to be ended.

    Attributes:
        context: where.
        machine: whose disk it works on.
        operation: the operation it belongs to.
        step: what it does; a mirror's plan is its only step.
        report: told about its progress.
    """

    context: Context
    machine: Machine
    operation: OperationId
    step: Merge | MirrorPlan
    report: Report = unreported

    @property
    def id(self) -> JobId:
        """What QEMU calls it."""
        return job_id(self.operation, self.step.disk)

    def words(self, phase: str, *, running: bool = False) -> str:
        """How the journal words a phase of it; ``running``: a guest runs, and we may have stopped its vCPUs."""
        raise NotImplementedError

    @property
    def moves_guest(self) -> bool:
        """Whether the guest writes to another layer once it has taken effect."""
        raise NotImplementedError

    @property
    def is_mirror(self) -> bool:
        """Whether QEMU copies while the guest writes to the source, as a mirror and a commit of the active layer do."""
        raise NotImplementedError

    async def require_files(self) -> None:
        """Refuse where a name leads to another file: QEMU opens what it writes to anew, by its name."""

    async def take_back(self, monitor: Monitor) -> None:
        """Make QEMU's chain what it was, of a job that failed when it was finalized."""
        raise NotImplementedError

    @property
    def result(self) -> Layer:
        """The layer that holds what it has written."""
        raise NotImplementedError

    async def carry_on(self, monitor: Monitor) -> None:
        """Run it to its end from any state, even if another qmpsnap process started it."""
        raise NotImplementedError

    async def settle(self, monitor: Monitor | None, *, running: bool = False) -> None:
        """Verify what has become of QEMU's chain, make the headers say the same, and record it.

        Args:
            monitor: the QEMU it ran in; None where that ended after both sides were equal.
            running: the guest runs, and we have stopped its vCPUs.
        """
        raise NotImplementedError

    async def close(self, monitor: Monitor) -> None:
        """Have QEMU forget it, after it took effect, and close the nodes that are nobody's now."""
        raise NotImplementedError

    async def let_go(self, monitor: Monitor) -> None:
        """End it where it still is, so that the chain is as before."""
        raise NotImplementedError

    async def mark(self, phase: str, *, running: bool = False) -> None:
        """Make durable that it is in this phase from now on."""
        words = self.words(phase, running=running)
        await self.context.astore.mark(self.operation, "running", step=words)

    async def record(self, change: Change, *, running: bool) -> None:
        """Record what it has made true, and that it is settled, in one SQL transaction."""
        words = self.words(steps.SETTLED, running=running)
        await self.context.astore.settle(self.operation, self.machine.name, change, step=words)

    async def require_chain(self, monitor: Monitor, expected: Iterable[Layer], *, known: Iterable[Layer]) -> None:
        """Make sure that the disk's chain in QEMU is this one now."""
        wanted = tuple(layer.id for layer in expected)
        disks = graph.by_disk(await graph.read(monitor), frozenset(layer.id for layer in known))
        disk, found = self.step.disk, disks.get(self.step.disk)
        if found is None or found.nodes != wanted:
            raise StoreMismatch(
                f"QEMU's chain of disk {disk} is {' <- '.join(found.nodes) if found else 'empty'} after the job, not"
                f" {' <- '.join(wanted)}",
                hint=call("chains", self.machine.name, disk) + " shows both sides",
                effect="unknown",
                machine=self.machine.name,
            )


@asynccontextmanager
async def qemu_for(job: BlockJob, qemu: Monitor | None) -> AsyncIterator[Monitor]:
    """Where a job is to run: in the machine's QEMU for its live chain, in a new worker for any other.

    Raises:
        QemuGone: the machine's QEMU, given as ``qemu``, has ended; or the worker does not start.
    """
    if job.step.live:
        if qemu is None:
            raise QemuGone(f"QEMU of machine {job.machine.name} has ended", machine=job.machine.name)
        yield qemu
        return
    async with luks.worker_on(job.context, job.machine, Chain(job.step.disk, job.step.chain)) as monitor:
        yield monitor


@asynccontextmanager
async def qemu_of(job: BlockJob, qemu: Monitor | None) -> AsyncIterator[Monitor | None]:
    """The QEMU in which an earlier qmpsnap process left a job: the machine's or a worker; None if it has ended."""
    if job.step.live:
        yield qemu
        return
    async with worker.left_behind(job.machine, job.context.home.run_dir(job.machine.name)) as monitor:
        yield monitor
