"""Notes on the scope that a QEMU runs in, on the images of an adopted machine, and on those that are not qmpsnap's."""

import os

from qmpsnap.block.image import header
from qmpsnap.cli import output
from qmpsnap.cli.common import answering, home
from qmpsnap.errors import QmpsnapError
from qmpsnap.model.layers.chain import Layer


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
    file = home().active(name)[0]
    if not os.path.lexists(file):  # the file of adopted machines; most are none
        return
    with answering() as store:
        machine, chains = store.machine(name), store.chains(name)
    if machine.adopted and machine.adopted.taken:  # nobody else is to start it
        return
    active = ", ".join(f"{output.printable(chain.active.path)} ({chain.disk})" for chain in chains)
    output.note(f"{name} was adopted: its next start has to open {active}; an image below is part of snapshots")
    output.note(f"  its start script finds these names in {file}")


def tell_cost(name: str, *, snapshot: str | None = None) -> None:
    """Say what the first delete copies because the image below it is not qmpsnap's, where snapshots have one.

    ``snapshot``: it has just been taken; None where the machine is new.
    """
    with answering() as store:
        machine, chains = store.machine(name), store.chains(name)
    for chain in chains:
        disk = machine.spec.disk(chain.disk)
        image = chain.layers[-1 if snapshot is None else -2] if len(chain.layers) > (snapshot is not None) else None
        if image is None or image.writable or disk is None or disk.read_only or not disk.snapshot:
            continue
        what = f"snapshot {snapshot}" if snapshot else "the first snapshot"
        output.note(
            f"disk {chain.disk}: deleting {what} will copy {_allocated(image)}, as {output.printable(image.shown)} is"
            " not qmpsnap's to write to"
        )
        if snapshot is None:
            output.hint("'own: true' on the disk in a spec, or adopt --own, gives it to qmpsnap")


def _allocated(image: Layer) -> str:
    """What an image occupies, for people."""
    try:
        return output.size(header.read(image.path, format=image.format).allocated)
    except QmpsnapError:
        return "all of it"
