"""What a guest is told that went on with memory of an earlier time: what time it is, and where its network is."""

import time

from qmpsnap.errors import QmpsnapError
from qmpsnap.machine import agent
from qmpsnap.machine.argv import AGENT_SOCKET
from qmpsnap.model.machine import Machine
from qmpsnap.ops.context import Context
from qmpsnap.qmp import commands

DEADLINE = 5.0
"""Seconds the guest's agent has; a guest without one keeps the time it had."""


async def tell(context: Context, machine: Machine) -> tuple[str, ...]:
    """Announce the network cards and set the guest's clock; returns what did not succeed, one sentence each."""
    notes = []
    try:
        async with context.monitor(machine) as qemu:
            if qemu and machine.spec.nics:
                await commands.announce_self(qemu)
    except QmpsnapError as error:
        notes.append(f"the network was not told: {error.message}")
    if machine.spec.agent:
        try:
            socket = context.home.run_dir(machine.name) / AGENT_SOCKET
            async with agent.connect(socket, machine=machine.name, deadline=DEADLINE) as guest:
                await guest.set_time(time.time_ns(), deadline=DEADLINE)
        except QmpsnapError as error:
            notes.append(f"the guest's clock was not set: {error.message}")
    return tuple(notes)
