"""A machine that was taken from its owner, once the QEMU that the owner launched has ended: it is one of our own."""

from pathlib import Path

from qmpsnap.errors import HostCannot
from qmpsnap.host import files
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base import vmgenid
from qmpsnap.ops.base.context import Context


def settle(context: Context, machine: Machine) -> bool:
    """Record that it is our own, if it was taken, its QEMU has ended and no operation is open; whether that was so.

    The lock is held. A death in between leaves a machine that is still adopted, and the next verb does all of it again:
    so the files come before the record.

    Raises:
        HostCannot: the owner's UEFI variables cannot be copied.
    """
    taken = machine.adopted.taken if machine.adopted else None
    if taken is None or context.process(machine) or context.store.operations(machine.name, only_open=True):
        return False
    if taken.variables:
        _copy(taken.variables, context.home.variables(machine.name), machine=machine.name)
    for file in context.home.active(machine.name):  # nobody may start these images by themselves any more
        file.unlink(missing_ok=True)
    change = Change(spec=taken.spec, adopted=None, vmgenid=vmgenid.new() if taken.vmgenid else None)
    context.store.apply(machine.name, change)
    return True


def _copy(source: str, target: Path, *, machine: str) -> None:
    try:
        files.replace_durably(target, Path(source).read_bytes())
    except OSError as error:
        raise HostCannot(
            f"the UEFI variables {source} of machine {machine} cannot be copied to {target}: {error.strerror}",
            hint="put the file back where it was",
            machine=machine,
        ) from error
