"""What is asked of a fork, and what cannot be forked."""

import itertools
from collections.abc import Iterator
from typing import Literal

from msgspec import Struct

from qmpsnap.errors import StateError, UsageError
from qmpsnap.hint import call, option
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.names import check_description, check_name
from qmpsnap.ops.base.context import require_spec

MOST = 1000
"""Forks that one call makes at most."""


class ForkRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        snapshot: the parent's full snapshot; None takes one of the running machine first.
        name: the fork's; None takes the next free ``PARENT-fN``. Of several each gets a number behind it.
        count: how many.
        ephemeral: all of a fork is removed once its QEMU has ended.
        paused: leave the vCPUs stopped.
        identity: ``fresh`` lets the guest's agent replace what the guest has in common with its parent.
        description: of the snapshot that is taken.
        owner: an ephemeral fork ends with this process.
    """

    snapshot: str | None = None
    name: str | None = None
    count: int = 1
    ephemeral: bool = False
    paused: bool = False
    identity: Literal["keep", "fresh"] = "keep"
    description: str = ""
    owner: Process | None = None


def require_sensible(request: ForkRequest) -> None:
    """Refuse what no machine could be asked."""
    if not 1 <= request.count <= MOST:
        raise UsageError(f"{request.count} forks cannot be made at once", hint=f"ask for 1 to {MOST}")
    check_description(request.description)
    if request.description and request.snapshot:
        raise UsageError(
            "a description is that of the snapshot which is taken, but a snapshot is named",
            hint="omit the description or the snapshot",
        )
    if request.name is not None:
        check_name(request.name, "machine")
        if request.count > 1:
            check_name(f"{request.name}-{request.count}", "machine")


def require_forkable(machine: Machine) -> None:
    """Refuse machines whose guest cannot be there twice."""
    require_spec(machine, "fork it")
    if machine.spec.tpm or any("tpm" in argument for argument in machine.spec.extra):
        raise StateError(
            f"machine {machine.name} has a TPM, and its forks would have the same keys in theirs",
            hint="make a linked clone of its disks with 'base:' in a spec instead",
            machine=machine.name,
        )


def memory_of(machine: Machine, snapshot: Snapshot) -> Vmstate:
    """The memory in a file that a fork goes on with."""
    if snapshot.vmstate is None:
        raise StateError(
            f"snapshot {snapshot.name} of machine {machine.name} is of kind {snapshot.kind} and has no memory in a"
            " file to go on from",
            hint="fork a full snapshot: " + call("snapshot", machine.name, kind="full"),
            machine=machine.name,
        )
    if snapshot.state != "ok":
        raise StateError(
            f"snapshot {snapshot.name} of machine {machine.name} is {snapshot.state}",
            hint="fork another snapshot",
            machine=machine.name,
        )
    if snapshot.vmstate.frozen:
        raise StateError(
            f"the guest's file systems are frozen in the memory of snapshot {snapshot.name}",
            hint="fork a full snapshot that was taken without " + option("quiesce"),
            machine=machine.name,
        )
    for disk in machine.spec.disks:
        if snapshot.point(disk.name) is None:
            raise StateError(
                f"snapshot {snapshot.name} does not include disk {disk.name} of machine {machine.name}, which the"
                " guest has in its memory",
                hint="fork a full snapshot of a machine without read-only disks",
                machine=machine.name,
            )
    return snapshot.vmstate


def names(parent: str, request: ForkRequest, taken: frozenset[str]) -> Iterator[str]:
    """The names of the forks, in order; where none is given without an end, as another process may take one first."""
    if request.name:
        yield from (
            [request.name] if request.count == 1 else (f"{request.name}-{n}" for n in range(1, request.count + 1))
        )
        return
    stem = parent[:50]
    yield from (name for number in itertools.count(1) if (name := f"{stem}-f{number}") not in taken)
