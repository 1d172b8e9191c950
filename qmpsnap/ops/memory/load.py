"""Loading memory into a new QEMU, once it is certain that it fits: QEMU itself does not look."""

from pathlib import Path

from msgspec import Struct

from qmpsnap.errors import QmpError, StateError
from qmpsnap.hint import option
from qmpsnap.host.threads import to_read
from qmpsnap.machine.starting import accel, probe
from qmpsnap.machine.starting.argv import Ram
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Hardware, Vmstate, differences, hardware_of
from qmpsnap.model.machines.record import Machine
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp import commands, migration
from qmpsnap.qmp.session import Monitor


class Loading(Struct, frozen=True):
    """A state whose file was compared with its record; ``descriptor`` is open on QEMU's stream.

    ``ram``: memory that lies in a file already, so that the stream has none.
    """

    state: Vmstate
    descriptor: int
    ram: Ram | None = None


async def hardware_to_start(context: Context, machine: Machine) -> Hardware:
    """The hardware the machine would have, were it started now."""
    choice = await accel.choose(machine.spec.accel, qemu=context.qemu, cache=context.home.cache, user=context.run_as)
    version = (await probe.ask(context.qemu, context.home.cache, user=context.run_as)).version
    return await _hardware(machine, accel=choice.accel, qemu_version=version)


async def hardware_now(context: Context, machine: Machine, qemu: Monitor | None = None) -> Hardware:
    """The hardware of the machine that runs; its monitor is asked where it is given.

    The record of one that was found again by its pid file knows neither its version nor for certain its accelerator.
    """
    process = context.process(machine)
    assert process
    accel, version = process.accel, process.qemu_version
    if qemu:
        accel = "kvm" if await commands.query_kvm(qemu) else "tcg"
        version = await commands.query_version(qemu)
    return await _hardware(machine, accel=accel, qemu_version=version)


async def _hardware(machine: Machine, *, accel: str, qemu_version: str) -> Hardware:
    cpu = await to_read(host_cpu)
    return hardware_of(
        machine.spec,
        uuid=machine.uuid,
        accel=accel,
        qemu_version=qemu_version,
        host_cpu=cpu,
        vmgenid=machine.guid,
    )


async def require_same_hardware(context: Context, machine: Machine, snapshot: Snapshot) -> None:
    """Make sure that a snapshot's memory fits the machine as it would be started now: QEMU itself does not look."""
    if snapshot.hardware:
        require_fits(snapshot, await hardware_to_start(context, machine), machine=machine.name)


def require_fits(snapshot: Snapshot, hardware: Hardware, *, machine: str) -> None:
    """Make sure that a snapshot's memory fits this hardware of its machine."""
    if snapshot.hardware and (found := differences(snapshot.hardware, hardware)):
        raise StateError(
            f"snapshot {snapshot.name} was taken with different virtual hardware of machine {machine}:"
            f" {'; '.join(found)}",
            hint="load it with the hardware of that time, if only the spec was changed: "
            + option("hardware", "snapshot")
            + "; the guest would crash otherwise",
            machine=machine,
        )


async def load(qemu: Monitor, loading: Loading) -> None:
    """Load a state into a QEMU that was started to wait for one; its vCPUs stay stopped."""
    mapped = loading.ram is None and loading.state.layout == "mapped-ram"
    await migration.set_up(qemu, background=False, mapped=mapped)
    if loading.ram:
        await migration.leave_out_shared(qemu)
    async with qemu.listen("MIGRATION") as bell:
        await migration.start(qemu, "migrate-incoming", await migration.hand_over(qemu, loading.descriptor))
        while (found := await migration.query(qemu)).status not in migration.ENDED:
            await bell.wait(0.05)
    if found.status != "completed":
        raise QmpError(f"QEMU could not load {loading.state.path}: {found.error_desc or found.status}")
    await migration.put_back(qemu)


def host_cpu() -> str:
    """The model name of this host's CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
