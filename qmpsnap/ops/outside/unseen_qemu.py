"""A machine's QEMU that cannot be seen from here: in another PID namespace, a container, or another user's."""

from qmpsnap.block.usage import survey
from qmpsnap.errors import StateError
from qmpsnap.machine.starting.run_files import USER_SOCKET
from qmpsnap.model.home import Home
from qmpsnap.model.machines.record import Machine
from qmpsnap.qmp import unixsocket
from qmpsnap.store.store import Store


def answers(home: Home, machine: Machine) -> bool:
    """Whether somebody listens on the monitor that users have; that of an adopted machine is not ours to play with."""
    return not machine.adopted and unixsocket.listens(home.run_dir(machine.name) / USER_SOCKET)


def may_run(home: Home, store: Store, machine: Machine) -> bool:
    """Whether a machine without a QEMU that we see may have one; its images are waited for a moment only."""
    if answers(home, machine):
        return True
    return survey.glance({machine.name: survey.wanted(store.images.read_by(machine.name), None)})[machine.name].unseen


def not_running(name: str, *, hidden: bool, hint: str = "") -> StateError:
    """The error for a machine without a QEMU that we see; ``hidden``: it may have one all the same."""
    if hidden:
        return StateError(
            f"the state of machine {name} is unknown: its QEMU may run in another PID namespace, in a container or as"
            " another user",
            hint="try again where it was started",
            machine=name,
        )
    return StateError(f"machine {name} is not running", hint=hint, machine=name)
