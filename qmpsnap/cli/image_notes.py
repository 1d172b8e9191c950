"""Notes about images, and the programs that have them open, for `list`, `show` and changes of adopted machines."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from qmpsnap.block.usage import survey as files
from qmpsnap.block.usage.survey import Seen
from qmpsnap.cli import output
from qmpsnap.cli.common import answering, home
from qmpsnap.model.machines.record import Machine, Process

if TYPE_CHECKING:
    from qmpsnap.store.store import Store


def images(store: "Store", machines: Sequence[Machine], alive: Mapping[str, Process]) -> dict[str, Seen]:
    """How the images are of those machines that are this host's."""
    from qmpsnap.ops.outside import layer_changes

    here = [machine for machine in machines if machine.host == os.uname().nodename]
    pids = {name: process.pid for name, process in alive.items()}
    return files.glance({machine.name: layer_changes.asked(store, machine, pids.get(machine.name)) for machine in here})


def snapshots(store: "Store", machine: str) -> dict[str, str]:
    """The state of each snapshot: the recorded one, or where that is ``ok`` what its files tell at once instead."""
    from qmpsnap.ops.outside import layer_changes

    found, record = store.snapshots(machine), store.machine(machine)
    if record.host != os.uname().nodename or not found:
        return {snapshot.name: snapshot.state for snapshot in found}
    asked = layer_changes.asked(store, record, None)
    look = files.glance({machine: replace(asked, paths={}, active=frozenset())})[machine]
    forest = store.forest()
    states = {one.name: layer_changes.taken_as(one, forest, asked.stamps, look) for one in found}
    if not look.asked:
        output.note(f"{machine}: images were not checked: their storage did not answer at once")
    for trouble in ("missing", "replaced", "overwritten"):
        if names := [one.name for one in found if one.state == "ok" and states[one.name] == trouble]:
            output.note(f"{machine}: an image of {', '.join(names)} is {trouble}; qmpsnap check {machine}")
    return states


def state(machine: Machine, process: Process | None, found: Seen | None) -> str:
    """``running`` or ``stopped``; ``unknown`` where a QEMU that cannot be seen from here may run."""
    if process:
        return "running"
    from qmpsnap.ops.outside import unseen_qemu

    return "unknown" if (found and found.unseen) or unseen_qemu.answers(home(), machine) else "stopped"


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


def tell_scope(name: str) -> None:
    """Say that QEMU will end with the session or unit that started it, if that can be avoided."""
    from qmpsnap.machine.starting import scope

    with answering() as store:
        machine = store.machine(name)
    if machine.process and not machine.adopted and (sentence := scope.warning(name, machine.process)):
        output.note(sentence)
        output.hint("qmpsnap doctor shows why")


def tell_owner(name: str) -> None:
    """Say to the owner of an adopted machine what has to be started from now on."""
    with answering() as store:
        if not store.machine(name).adopted:
            return
        chains = store.chains(name)
    active = ", ".join(f"{output.printable(chain.active.path)} ({chain.disk})" for chain in chains)
    output.note(f"{name} was adopted: start its QEMU on {active} from now on;")
    output.note("  on an image below, it would overwrite snapshots")
