"""Notes for whoever starts QEMUs: on the scope that one runs in, and on the images of an adopted machine."""

from qmpsnap.cli import output
from qmpsnap.cli.common import answering


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
