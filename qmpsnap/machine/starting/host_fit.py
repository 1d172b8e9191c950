"""What a spec asks of this host that it does not have: QEMU would refuse to start, each time in other words.

A spec may be written for another host, and what is missing may be there by the time of the start. So ``define`` only
tells it, and a start is refused.
"""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from qmpsnap.errors import HostCannot
from qmpsnap.machine.starting import accel
from qmpsnap.machine.starting.privileges import RunAs
from qmpsnap.machine.starting.probe import Abilities
from qmpsnap.model.machines.spec import Forward, MachineSpec, NicSpec
from qmpsnap.model.text import nearest

NETWORK: Final = Path("/sys/class/net")
MEMORY: Final = Path("/proc/meminfo")
OVERCOMMIT: Final = Path("/proc/sys/vm/overcommit_memory")
_ALWAYS: Final = "1"
"""The kernel then lets a program reserve any amount of memory."""


class Misfit(Struct, frozen=True):
    """One thing that is missing, and what to do."""

    fact: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.fact}: {self.remedy}"


def require(spec: MachineSpec, abilities: Abilities | None, *, runs: Literal["kvm", "tcg"], user: RunAs | None) -> None:
    """Refuse a start that QEMU would refuse with that accelerator.

    Raises:
        HostCannot: the first thing that is missing.
    """
    for found in look(spec, abilities, runs=runs, user=user):
        raise HostCannot(found.fact, hint=found.remedy, machine=spec.name)


def look(
    spec: MachineSpec, abilities: Abilities | None, *, runs: Literal["kvm", "tcg"] | None, user: RunAs | None
) -> Iterator[Misfit]:
    """All that is missing.

    ``runs`` is the accelerator that it would be started with, None where that is open. ``abilities``: of QEMU, needed
    only for a CPU that the spec names.
    """
    if spec.accel == "kvm" and (why := accel.device_obstacle(user=user)):
        yield Misfit(f"machine {spec.name} needs KVM, and {why}", "use 'accel: auto', or a host with KVM")
    yield from _cpu(spec, abilities, runs)
    memory = _reservable()
    if memory is not None and spec.memory > memory:
        fact = f"machine {spec.name} has {spec.memory >> 20} MiB of memory, this host {memory >> 20} MiB with its swap"
        yield Misfit(fact, "use a smaller 'memory'")
    for nic in spec.nics:
        yield from _nic(spec, nic, user)


def _reservable() -> int | None:
    """Bytes that the kernel lets a program reserve at most; None for any number."""
    if OVERCOMMIT.read_text().strip() == _ALWAYS:
        return None
    sizes = dict(line.split()[:2] for line in MEMORY.read_text().splitlines())
    return (int(sizes["MemTotal:"]) + int(sizes["SwapTotal:"])) << 10


def _cpu(spec: MachineSpec, abilities: Abilities | None, runs: str | None) -> Iterator[Misfit]:
    model = spec.cpu.partition(",")[0]
    if model == "host":
        if runs == "tcg":
            yield Misfit(f"machine {spec.name} has CPU host, which needs KVM", "use another 'cpu', or leave it out")
    elif model and abilities and abilities.cpu_models and model not in abilities.cpu_models:
        fact = f"QEMU {abilities.version} has no CPU model {model!r}{nearest(model, abilities.cpu_models)}"
        yield Misfit(fact, "qemu-system-x86_64 -cpu help lists them")


def _nic(spec: MachineSpec, nic: NicSpec, user: RunAs | None) -> Iterator[Misfit]:
    if nic.kind == "bridge" and not (NETWORK / str(nic.bridge) / "bridge").is_dir():
        yield Misfit(f"this host has no bridge {nic.bridge}", f"ip link add {nic.bridge} type bridge, or name another")
    makes = os.geteuid() == 0 and user is None  # root's QEMU makes the interface itself
    if nic.kind == "tap" and not makes and not (NETWORK / str(nic.ifname)).exists():
        owner = user.name if user else os.geteuid()
        yield Misfit(f"this host has no interface {nic.ifname}", f"ip tuntap add {nic.ifname} mode tap user {owner}")
    for forward in nic.forwards:
        yield from _port(spec, forward)


def _port(spec: MachineSpec, forward: Forward) -> Iterator[Misfit]:
    """Whether a port can be listened on now: as QEMU does it, and let go of at once."""
    what = f"{forward.protocol.upper()} port {forward.host} of {forward.address}"
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as endpoint:
        try:
            if kind == socket.SOCK_STREAM:
                endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            endpoint.bind((forward.address, forward.host))
            if kind == socket.SOCK_STREAM:
                endpoint.listen()
        except OSError as error:
            why = {
                errno.EADDRINUSE: "is in use",
                errno.EADDRNOTAVAIL: "is on no interface of this host",
                errno.EACCES: "may be used by root alone",
            }.get(error.errno or 0, f"cannot be used: {error.strerror}")
            yield Misfit(f"{what}, which machine {spec.name} forwards, {why}", "forward another one in 'forwards'")
