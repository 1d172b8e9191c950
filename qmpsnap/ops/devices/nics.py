"""``nic attach`` and ``nic detach``: a machine gets one more network card, or gives one up, also while it runs.

A card has a number, by which QEMU knows it and from which its MAC address is made, so that no other card changes when
one goes. Attached cards are plugged in as disks are, see :mod:`qmpsnap.ops.devices.plugging`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import NotFoundError, QmpError, SpecError, StateError
from qmpsnap.hint import call
from qmpsnap.machine.starting import argv
from qmpsnap.machine.starting.argv import card, nic_device
from qmpsnap.machine.starting.root_ports import PORT, free_port
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import MachineSpec, NicSpec, numbered
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.devices import AttachNicPlan, DetachNicPlan
from qmpsnap.model.operations.operation import Change, Operation
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.ops.base import requests
from qmpsnap.ops.base.context import Context, require_spec
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.devices.detach import TIMEOUT
from qmpsnap.ops.devices.plugging import Command, unplug
from qmpsnap.ops.lifecycle import change
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.ops.session.session import begin, inputs, looking, working
from qmpsnap.qmp import devices
from qmpsnap.qmp.session import Monitor

Wanted = Callable[[Machine], MachineSpec]
"""Makes the spec with the new card, as the last one, of the machine's."""
Unloadable = tuple[tuple[str, tuple[str, ...]], ...]


class Nic(Struct, frozen=True, kw_only=True):
    """A network card that a machine was given, or has no more.

    Attributes:
        plan: what was done.
        number: of the card, whose id in QEMU is ``qs-nicNUMBER``.
        mac: its address.
        commands: the exact QMP commands to the QEMU that runs, in order; none for a stopped machine.
        unloadable: names of the snapshots whose memory fits the hardware no more, and why; they can still be reverted
            to with the hardware of their time.
    """

    plan: AttachNicPlan | DetachNicPlan
    number: int
    mac: str
    commands: tuple[Command, ...]
    unloadable: Unloadable


def wanted(nic: Mapping[str, object] | NicSpec, *, folder: Path, guest_dir: Path) -> Wanted:
    """How the new spec is made: of a card as a spec file describes one."""
    from qmpsnap.machine.config import specfile  # YAML is slow to load

    given: dict[str, Any] = dict(nic) if isinstance(nic, Mapping) else msgspec.to_builtins(nic)

    def make(machine: Machine) -> MachineSpec:
        found = specfile.extended(machine.spec, given, of="nics", folder=folder, guest_dir=guest_dir)
        if len(found.nics) == len(machine.spec.nics):
            raise SpecError("kind 'none' is no network card", hint="use 'user', 'tap' or 'bridge'")
        return placed(found)

    return make


def placed(spec: MachineSpec) -> MachineSpec:
    """The spec whose last card is new, with a number and a place that no other one has; pure."""
    *others, new = spec.nics
    before = replace(spec, nics=tuple(others))
    number = 1 + max((number for number, _ in numbered(others)), default=-1)
    return replace(spec, nics=(*others, replace(new, number=number, address=free_port(before) or "")))


def without(spec: MachineSpec, number: int) -> MachineSpec:
    """The spec without a card; the others keep their numbers; pure."""
    return replace(spec, nics=tuple(replace(nic, number=at) for at, nic in numbered(spec.nics) if at != number))


async def preview_attach(context: Context, name: str, make: Wanted) -> Nic:
    """What :func:`attach` would do now; locks and changes nothing."""
    async with looking(context, name) as session:
        spec = _with(session, make)
        return await _answer(session, _attaching(await inputs(session, session.basis), spec))


async def attach(context: Context, name: str, make: Wanted) -> Nic:
    """Give a machine one more network card; returns it once the record has it.

    Raises:
        StateError: the machine is adopted, or runs and cannot take the card.
        QmpError: QEMU refuses, as where the interface is not there; nothing is changed.
    """
    async with working(context, name, "nic attach", alone=False) as session:
        spec = _with(session, make)
        operation = await begin(session, session.basis, lambda at: _attaching(at, spec))
        async with recovery.attempting(session, operation):
            if session.qemu:
                await _plug(session, session.qemu, operation)
            await context.astore.settle(operation.id, name, operation.plan.change)
        return await _answer(session, operation.plan)


async def _plug(session: MachineSession, qemu: Monitor, operation: Operation[AttachNicPlan]) -> None:
    store = session.context.astore
    (connect, backend), (add, device) = _plug_commands(session.machine, operation.plan)
    await store.mark(operation.id, "running", step=steps.PLUGGING)
    try:
        await qemu.execute(connect, backend)
    except QmpError:
        await store.mark(operation.id, "running", step=steps.PLANNED)  # what has that name already is somebody else's
        raise
    await qemu.execute(add, device)


async def preview_detach(context: Context, name: str, which: str | int) -> Nic:
    """What :func:`detach` would do now; locks and changes nothing."""
    async with looking(context, name) as session:
        number, spec = await _without(session, which)
        return await _answer(session, _detaching(await inputs(session, session.basis), number, spec))


async def detach(context: Context, name: str, which: str | int, *, timeout: float = TIMEOUT) -> Nic:  # noqa: ASYNC109
    """Take a network card from a machine: by its number or its MAC address.

    Raises:
        NotFoundError: the machine has no such card.
        StateError: the machine is adopted, or runs and cannot give up that card.
        QmpError: the guest refuses.
        DeadlinePassed: the guest has not answered within ``timeout`` seconds.
    """
    requests.require_time(timeout, "a timeout")
    async with working(context, name, "nic detach", alone=False) as session:
        number, spec = await _without(session, which)
        operation = await begin(session, session.basis, lambda at: _detaching(at, number, spec))
        async with recovery.attempting(session, operation):
            if session.qemu:
                await _unplug(session, session.qemu, operation, timeout)
            await context.astore.settle(operation.id, name, operation.plan.change)
        return await _answer(session, operation.plan)


def _with(session: MachineSession, make: Wanted) -> MachineSpec:
    machine = session.machine
    require_spec(machine, "attach a network card")
    spec = make(machine)
    *others, (number, new) = numbered(spec.nics)
    address = argv.mac(new, machine.uuid, number)
    twins = [at for at, nic in others if argv.mac(nic, machine.uuid, at) == address]
    if twins:
        raise SpecError(f"network card {twins[0]} of machine {machine.name} has the MAC address {address} already")
    if session.qemu and new.kind == "bridge" and not any(nic.kind == "bridge" for nic in machine.spec.nics):
        _refuse(machine, "its QEMU may not run the helper for bridges", "attach")
    if session.qemu and not new.address:
        _refuse(machine, "it has no free PCIe root port", "attach")
    return spec


async def _without(session: MachineSession, which: str | int) -> tuple[int, MachineSpec]:
    machine = session.machine
    require_spec(machine, "detach a network card")
    cards = numbered(machine.spec.nics)
    found = next(((at, nic) for at, nic in cards if str(which).lower() in _known_by(machine, nic, at)), None)
    if found is None:
        known = [_known_by(machine, nic, number) for number, nic in cards]
        raise NotFoundError(
            f"machine {machine.name} has no network card {str(which)[:40]!r}",
            hint="its cards: " + ", ".join(f"{number} ({address})" for number, address in known) if known else "",
            machine=machine.name,
        )
    number, nic = found
    if (
        session.qemu
        and not (nic.address or "").startswith(PORT)
        and card(number) in await devices.plugged(session.qemu)
    ):
        _refuse(machine, f"card {number} is on no PCIe root port", "detach")
    return number, without(machine.spec, number)


def _known_by(machine: Machine, nic: NicSpec, number: int) -> tuple[str, str]:
    return str(number), argv.mac(nic, machine.uuid, number)


def _refuse(machine: Machine, why: str, doing: str) -> None:
    raise StateError(
        f"machine {machine.name} runs and {why}, so that the card can only be {doing}ed while it is stopped",
        hint="stop it first: " + call("stop", machine.name),
        machine=machine.name,
    )


def _attaching(at: PlanInputs, spec: MachineSpec) -> AttachNicPlan:
    number, nic = numbered(spec.nics)[-1]
    live = at.mode != "stopped"
    return AttachNicPlan(machine=at.machine.name, number=number, nic=nic, live=live, change=Change(spec=spec))


def _detaching(at: PlanInputs, number: int, spec: MachineSpec) -> DetachNicPlan:
    nic = dict(numbered(at.machine.spec.nics))[number]
    live = at.mode != "stopped"
    return DetachNicPlan(machine=at.machine.name, number=number, nic=nic, live=live, change=Change(spec=spec))


def _plug_commands(machine: Machine, planned: AttachNicPlan) -> list[Command]:
    backend, device = nic_device(machine.spec, planned.nic, planned.number, machine.uuid)
    return [("netdev_add", backend), devices.add(device)]


def _unplug_commands(planned: DetachNicPlan) -> list[Command]:
    return [devices.remove(card(planned.number)), devices.remove_netdev(argv.cable(planned.number))]


async def _unplug(session: MachineSession, qemu: Monitor, operation: Operation[DetachNicPlan], seconds: float) -> None:
    planned = operation.plan
    await session.context.astore.mark(operation.id, "running", step=steps.UNPLUGGING)
    await unplug(qemu, card(planned.number), machine=planned.machine, seconds=seconds)
    await devices.drop_netdev(qemu, argv.cable(planned.number))


async def _answer(session: MachineSession, planned: AttachNicPlan | DetachNicPlan) -> Nic:
    context, machine, snapshots = session.context, session.machine, session.basis.snapshots
    commands: list[Command] = []
    if planned.live and isinstance(planned, AttachNicPlan):
        commands = _plug_commands(machine, planned)
    elif planned.live and isinstance(planned, DetachNicPlan):
        commands = _unplug_commands(planned)
    after = replace(machine, spec=planned.change.spec or machine.spec)
    return Nic(
        plan=planned,
        number=planned.number,
        mac=argv.mac(planned.nic, machine.uuid, planned.number),
        commands=tuple(commands),
        unloadable=tuple([each async for each in change.unloadable(context, machine, after, snapshots)]),
    )


async def end_attach(broken: Broken[AttachNicPlan], qemu: Monitor | None) -> Direction:
    """End an attachment by whether QEMU has the card; the machine has it where it runs no more."""
    planned = broken.operation.plan
    if broken.operation.step == steps.PLUGGING:
        if qemu is None or card(planned.number) in await devices.plugged(qemu):
            await broken.context.astore.settle(broken.operation.id, planned.machine, planned.change)
            return "forward"
        await devices.drop_netdev(qemu, argv.cable(planned.number))
    await broken.mark_failed()
    return "back"


async def end_detach(broken: Broken[DetachNicPlan], qemu: Monitor | None) -> Direction:
    """End a detachment by whether QEMU has the card; where it runs no more, the card stays."""
    planned = broken.operation.plan
    unplugging = broken.operation.step == steps.UNPLUGGING
    if qemu and unplugging and card(planned.number) not in await devices.plugged(qemu):
        await devices.drop_netdev(qemu, argv.cable(planned.number))
        await broken.context.astore.settle(broken.operation.id, planned.machine, planned.change)
        return "forward"
    await broken.mark_failed()
    return "back"
