"""The generation ID that a guest reads from its ``vmgenid`` device: another one whenever the guest goes back in time.

QEMU takes the GUID as an argument and has no command to change it. Its stream carries only the address where the guest
keeps the GUID; a QEMU that has loaded the stream writes its own GUID there and notifies the guest.
"""

import uuid

from msgspec.structs import replace

from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine, Vmgenid
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base.context import Context


def new() -> Vmgenid:
    """A generation that there has not been yet."""
    return Vmgenid(guid=str(uuid.uuid4()))


def after_revert(machine: Machine, snapshot: Snapshot, *, resumes: bool) -> Vmgenid | None:
    """The generation after a revert: the same only where a saved machine ``resumes`` that has not run since."""
    now = machine.vmgenid
    if now and resumes and now.resting == snapshot.operation:
        return Vmgenid(guid=now.guid)
    return new() if now else None


def saved(machine: Machine, operation: OperationId) -> Vmgenid | None:
    """The generation of a machine whose QEMU has ended with its memory saved by that operation."""
    return replace(machine.vmgenid, resting=operation) if machine.vmgenid else None


async def wake(context: Context, machine: Machine) -> None:
    """Record that a QEMU is about to be started: what was saved before has been left."""
    if machine.vmgenid and machine.vmgenid.resting:
        change = Change(vmgenid=Vmgenid(guid=machine.vmgenid.guid))
        await context.astore.apply(machine.name, change)


def unchanged(machine: Machine) -> tuple[str, ...]:
    """What there is to say after memory was loaded into the QEMU that runs."""
    if not machine.guid:
        return ()
    return ("the guest's generation ID (vmgenid) is unchanged: a running QEMU cannot be given another",)
