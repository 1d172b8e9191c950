"""Giving a fork's guest an identity of its own, through its agent; until then it is its parent's twin."""

from collections.abc import Sequence

from msgspec.structs import replace

from qmpsnap.errors import QmpsnapError
from qmpsnap.machine import agent, identity
from qmpsnap.machine.starting import argv
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import numbered
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.memory import post_resume
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Monitor

ANSWER = 30.0
"""Seconds the agent has until it answers: the guest has just gone on, and under TCG translates all its code again."""
DEADLINE = 60.0
"""Seconds for all of it, the spec's hook included."""
_QUOTED = 300


async def renew(context: Context, machine: Machine, parent: Machine) -> Machine:
    """Give the running guest an identity of its own and record what came of it; returns the machine as it is then.

    Its network cards that share a network with others are connected only if nothing of its parent's is left.
    """
    assert machine.origin
    async with context.monitor(machine) as qemu:
        assert qemu
        addresses = [
            (old, argv.mac(nic, machine.uuid, number))
            for number, nic in numbered(machine.spec.nics)
            if (old := await commands.mac_of(qemu, argv.card(number)))
        ]
        try:
            lacks = await _in_guest(context, machine, addresses)
        except QmpsnapError as error:
            lacks = [f"the guest agent did not do it: {error.message}"]
        lacks += await _unchanged(qemu, machine, parent)
        origin = replace(machine.origin, identity="twin" if lacks else "fresh", lacks=tuple(lacks))
        await context.astore.apply(machine.name, Change(origin=origin))
        if not lacks:
            await _connect(qemu, machine)
    return await context.astore.machine(machine.name)


async def _in_guest(context: Context, machine: Machine, addresses: Sequence[tuple[str, str]]) -> list[str]:
    socket = context.home.run_dir(machine.name) / AGENT_SOCKET
    changed = [(old, new) for old, new in addresses if old != new]
    command = identity.command(machine.name, hook=machine.spec.identity_hook, addresses=changed)
    async with agent.connect(socket, machine=machine.name, deadline=ANSWER, keep=agent.KEEP) as guest:
        done = await guest.run(command, deadline=DEADLINE, stdin=identity.seed())
        lacks = [line.strip()[:_QUOTED] for line in done.stdout.decode(errors="replace").splitlines()]
        if done.exit_status:
            said = done.stderr.decode(errors="replace").strip()[:_QUOTED]
            lacks.append(f"the script in the guest ended with status {done.exit_status}: {said}")
        clock = await post_resume.set_clock(guest)
        if clock.clock_error_ms is None or abs(clock.clock_error_ms) > post_resume.NEAR_MS:
            lacks += clock.notes
    return lacks


async def _unchanged(qemu: Monitor, machine: Machine, parent: Machine) -> list[str]:
    """The cards with an address that is not theirs, as QEMU sees them: what the guest says of itself is not enough."""
    found = []
    for number, nic in numbered(machine.spec.nics):
        now, own = await commands.mac_of(qemu, argv.card(number)), argv.mac(nic, machine.uuid, number)
        if now not in (None, own):
            found.append(f"network card {number} still has the address {now} of {parent.name}")
    return found


async def _connect(qemu: Monitor, machine: Machine) -> None:
    if any(nic.kind != "user" for nic in machine.spec.nics):
        for number, _ in numbered(machine.spec.nics):
            await commands.set_link(qemu, argv.cable(number), up=True)
        await commands.announce_self(qemu)
