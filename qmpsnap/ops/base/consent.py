"""A machine's further QEMU arguments (``extra``), which can undo every protection: no QEMU gets them unasked."""

import os
import shlex

from qmpsnap.errors import StateError
from qmpsnap.hint import call
from qmpsnap.model.machines.record import Consent, Machine
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base.context import Context


def require(machine: Machine) -> None:
    """Make sure that somebody whom this user trusts has agreed to the arguments as they are recorded now."""
    extra = machine.spec.extra
    if not extra or (machine.consent and machine.consent.covers(extra, user=os.geteuid())):
        return
    raise StateError(
        f"this user has not accepted the extra QEMU arguments of machine {machine.name}: {_said(extra)}",
        hint="accept them: " + call("start", machine.name, allow_extra=True),
        machine=machine.name,
    )


async def give(context: Context, machine: Machine) -> Machine:
    """Agree to the arguments that a machine has now; returns it as recorded then."""
    extra = machine.spec.extra
    if extra and not (machine.consent and machine.consent.covers(extra, user=os.geteuid())):
        agreed = Consent(extra=extra, user=os.geteuid())
        await context.astore.apply(machine.name, Change(consent=agreed))
        return await context.astore.machine(machine.name)
    return machine


def _said(extra: tuple[str, ...]) -> str:
    text = shlex.join(extra)
    return "".join(one if one.isprintable() else "?" for one in text)
