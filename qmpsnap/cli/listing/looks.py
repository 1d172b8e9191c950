"""What reading verbs find and say of images, and of who has them open."""

from __future__ import annotations

import os

from qmpsnap.block.usage import survey
from qmpsnap.cli import output
from qmpsnap.host.value import replaced

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Protocol

    from qmpsnap.block.usage.survey import Seen
    from qmpsnap.model.layers.snapshot import Taken
    from qmpsnap.store.sqlite.images import ImageTable

    class Hosted(Protocol):
        """A machine, and the host it lives on."""

        @property
        def name(self) -> str:
            """Of the machine."""

        @property
        def host(self) -> str:
            """Its node name."""

    class Named(Taken, Protocol):
        """A snapshot of that name."""

        @property
        def name(self) -> str:
            """Of the snapshot."""


def is_here(machine: Hosted) -> bool:
    """Whether it is a machine of this host: the files of others are not these."""
    return machine.host == os.uname().nodename


def images(table: ImageTable, machines: Sequence[Hosted], pids: Mapping[str, int]) -> dict[str, Seen]:
    """How the images are of those machines that are this host's; ``pids``: of the QEMUs that run."""
    here = [machine.name for machine in machines if is_here(machine)]
    return survey.glance({name: survey.wanted(table.read_by(name), pids.get(name)) for name in here})


def images_of_all(table: ImageTable, machines: Sequence[Hosted], pids: Mapping[str, int]) -> dict[str, Seen]:
    """The same; where there are very many images, of those alone that guests write to."""
    if table.count() <= survey.MANY:
        return images(table, machines, pids)
    here = {machine.name for machine in machines if is_here(machine)}
    found = survey.glance(
        {name: survey.wanted(reads, pids.get(name)) for name, reads in table.active().items() if name in here}
    )
    return {name: replaced(seen, whole=False) for name, seen in found.items()}


def states(table: ImageTable, machine: Hosted, found: Sequence[Named]) -> dict[str, str]:
    """The state of each snapshot: the recorded one, or where that is ``ok`` what its files tell at once instead."""
    if not found or not is_here(machine):
        return {snapshot.name: snapshot.state for snapshot in found}
    name, reads = machine.name, table.read_by(machine.name)
    look = survey.glance({name: survey.frozen_in(reads, found)})[name]
    told = {one.name: survey.taken_as(one, reads, look) for one in found}
    if not look.asked:
        output.note(f"{name}: images were not checked: their storage did not answer at once")
    for trouble in ("missing", "replaced", "overwritten"):
        if names := [one.name for one in found if one.state == "ok" and told[one.name] == trouble]:
            output.note(f"{name}: an image of {', '.join(names)} is {trouble}; qmpsnap check {name}")
    return told


def tell(name: str, found: Seen) -> None:
    """Say what is wrong with the images of a machine, for people."""
    if not found.asked:
        output.note(f"{name}: images were not checked: their storage did not answer at once")
    for user in found.users.values():
        output.note(f"{name}: {output.printable(user.path)} {user.does} {output.printable(user.who)}")
    for trouble in ("missing", "replaced"):
        if layers := sorted(layer for layer, of in found.gone.items() if of == trouble):
            output.note(f"{name}: {trouble}: {', '.join(layers)}; qmpsnap check {name}")
    if found.changed:
        changed = ", ".join(found.changed)
        output.note(f"{name}: {changed} was written to after it was frozen; qmpsnap check {name}")


def tell_all(found: Mapping[str, Seen]) -> None:
    """The same of all machines, and of what was left out."""
    for name, seen in found.items():
        tell(name, seen)
    if not all(seen.whole for seen in found.values()):
        output.note(
            f"only active images were checked, as there are more than {survey.MANY}; qmpsnap show VM checks all of one"
            " machine"
        )
