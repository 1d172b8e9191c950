"""``start`` and ``stop``: QEMU comes up on exactly the chains the store has, and goes down without losing a write."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, HostCannot, QemuGone, StateError, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host.threads import completed, to_end, to_read
from qmpsnap.machine.config.firmware import code_of
from qmpsnap.machine.open_files import require_opened
from qmpsnap.machine.qemu import end, launch, monitor, still_runs, wait_end
from qmpsnap.machine.starting import accel, alive, argv, host_fit, logs, probe, scope, seed, surroundings, tpm
from qmpsnap.machine.starting.privileges import Privileges
from qmpsnap.model.layers.blockdev import node_name
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.machines.spec import numbered
from qmpsnap.model.names import JobId, LayerId
from qmpsnap.model.planning.layer_graph import Writer
from qmpsnap.ops.base import admission, consent, luks, requests, vmgenid
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, locked, require_own, require_spec
from qmpsnap.ops.internal import tags
from qmpsnap.ops.lifecycle import boot_files, pausing
from qmpsnap.ops.memory.load import Loading, load
from qmpsnap.ops.outside import compare, unseen_qemu
from qmpsnap.ops.session.session import working
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.session import Monitor


class LoadingInside(Struct, frozen=True):
    """Memory inside the new active layers, under a tag that goes once it is loaded."""

    job: JobId
    tag: str
    layers: Mapping[str, Layer]
    vmstate: LayerId


async def start(context: Context, name: str, *, paused: bool = False, allow_extra: bool = False) -> Process:
    """Start the machine and return once its monitor answers."""
    async with working(context, name, "start") as work:
        if work.qemu:
            raise StateError(f"machine {name} runs already", hint=call("state", name) + " shows it", machine=name)
        require_spec(work.machine, "start it")
        await context.astore.require_writable()
        machine = await consent.give(context, work.machine) if allow_extra else work.machine
        return await bring_up(context, machine, paused=paused)


async def misfits(context: Context, machine: Machine) -> tuple[str, ...]:
    """What this host lacks for a start of the machine, a sentence each; nothing of one that somebody else starts."""
    if machine.adopted:
        return ()
    abilities = await _abilities(context, machine)
    accelerator = None if machine.spec.accel == "auto" else machine.spec.accel
    found = await to_read(lambda: tuple(host_fit.look(machine.spec, abilities, runs=accelerator, user=context.run_as)))
    return tuple(map(str, found))


async def _abilities(context: Context, machine: Machine) -> probe.Abilities | None:
    return await probe.ask(context.qemu, context.home.cache, user=context.run_as) if machine.spec.cpu else None


async def bring_up(
    context: Context, machine: Machine, *, paused: bool, loading: Loading | LoadingInside | None = None
) -> Process:
    """Start the QEMU of a machine that is ours and stopped, on the store's chains, and record it."""
    consent.require(machine)
    chains = await context.astore.chains(machine.name)
    await vmgenid.wake(context, machine)
    surroundings.require_room(chains, machine=machine.name)
    await to_read(lambda: boot_files.require(machine.spec, context.home))
    await to_end(require_files, machine, chains)
    await blocking(_require_alone, context, machine, chains)
    choice = await accel.choose(machine.spec.accel, qemu=context.qemu, cache=context.home.cache, user=context.run_as)
    abilities = await _abilities(context, machine)
    await to_read(lambda: host_fit.require(machine.spec, abilities, runs=choice.accel, user=context.run_as))
    firmware = None
    if machine.spec.firmware == "uefi":
        variables = str(context.home.variables(machine.name))
        firmware = argv.Firmware(code=code_of(machine.spec), vars=variables)
    await blocking(logs.prepare, context.home.log_dir(machine.name))
    await admission.all_files(context, machine, chains, firmware)
    folder = context.home.tpm(machine.name) if machine.spec.tpm else None
    async with tpm.emulated(folder, machine=machine.name, rights=Privileges.bare(context.run_as)) as emulator:
        process = await _launched(
            context,
            machine,
            chains,
            runs=choice.accel,
            paused=paused,
            loading=loading,
            firmware=firmware,
            emulator=emulator,
        )
    try:
        layers = [layer for chain in chains for layer in chain.layers]
        await to_read(lambda: require_opened(process, layers, machine=machine.name))
        await context.astore.set_process(machine.name, process)
    except BaseException:
        # Nobody has heard of it yet: what fails here must not leave a QEMU that nobody counts on.
        await completed(end(process, None))
        raise
    await scope.enter(machine.name, process, *([emulator.pid] if emulator else []))
    if loading:
        await _load(context, machine, process, loading, paused=paused)
    return process


async def _launched(
    context: Context,
    machine: Machine,
    chains: Sequence[Chain],
    *,
    runs: Literal["kvm", "tcg"],
    paused: bool,
    loading: Loading | LoadingInside | None,
    firmware: argv.Firmware | None,
    emulator: tpm.Emulator | None,
) -> Process:
    """The machine's new QEMU."""
    ram = loading.ram if isinstance(loading, Loading) else None
    image = await to_read(lambda: seed.content(machine.spec, machine.uuid))
    channel = emulator.connection if emulator else None
    async with luks.for_qemu(context, machine, machine.spec.disks) as secrets:
        with seed.inherited(image) as seeded:
            arguments = argv.build(
                context.qemu,
                machine.spec,
                chains,
                uuid=machine.uuid,
                accel=runs,
                paused=paused or loading is not None,
                incoming=isinstance(loading, Loading),
                firmware=firmware,
                tsc_khz=accel.tsc_khz(),
                secrets=secrets,
                logs=str(context.home.log_dir(machine.name)),
                exact=loading is not None,
                ram=ram,
                vmgenid=machine.guid,
                seed=seeded,
                tpm=channel,
            )
            inherited = [*secrets.values(), ram.descriptor if ram else None, seeded, channel]
            return await launch(
                arguments,
                machine,
                context.home.run_dir(machine.name),
                accel=runs,
                inherited=[descriptor for descriptor in inherited if descriptor is not None],
                rights=Privileges.of(machine.spec, context.run_as),
                logs=context.home.log_dir(machine.name),
            )


async def _load(
    context: Context, machine: Machine, process: Process, loading: Loading | LoadingInside, *, paused: bool
) -> None:
    try:
        async with monitor(machine, context.home.run_dir(machine.name)) as qemu:
            await _isolate(qemu, machine)
            if isinstance(loading, Loading):
                await load(qemu, loading)
            else:
                await _load_inside(qemu, loading)
            await _isolate(qemu, machine)  # loading has given the cards the links that they had
            if not paused:
                await commands.control(qemu, "cont")
    except BaseException:
        await completed(_end_unloaded(context, machine, process))
        raise


async def _isolate(qemu: Monitor, machine: Machine) -> None:
    """Keep a guest with another one's addresses off every network that it shares with others."""
    if machine.origin and machine.origin.identity == "twin":
        for number, nic in numbered(machine.spec.nics):
            if nic.kind != "user":
                await commands.set_link(qemu, argv.cable(number), up=False)


async def _end_unloaded(context: Context, machine: Machine, process: Process) -> None:
    await end(process, None)
    await context.astore.set_process(machine.name, None)


async def _load_inside(qemu: Monitor, loading: LoadingInside) -> None:
    await tags.load_into(qemu, loading.job, tag=loading.tag, layers=loading.layers, vmstate=loading.vmstate)
    await jobs.dismiss(qemu, loading.job)
    for layer in loading.layers.values():
        await commands.delete_tag(qemu, node_name(layer), loading.tag)


async def stop(context: Context, name: str, *, force: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109
    """Press the power button and wait, 60 seconds by default; with ``force`` end QEMU when that has not helped.

    Without a ``timeout`` force ends it at once; QEMU still writes its caches out.

    Raises:
        StateError: it does not run; or its vCPUs are stopped, so that it cannot hear the button.
        DeadlinePassed: the guest did not switch itself off.
    """
    requests.require_time(timeout, "the time for the guest")
    machine = await context.astore.machine(name)
    require_own(context, machine)
    async with locked(context, name, "stop", anywhere=True):
        process = context.process(machine)
        if process is None:
            # With ``force`` no image is asked: its storage may hang.
            look = unseen_qemu.answers if force else lambda home, at: unseen_qemu.may_run(home, context.store, at)
            hidden = await blocking(look, context.home, machine)
            raise unseen_qemu.not_running(name, hidden=hidden, hint="" if machine.adopted else call("start", name))
        wait = timeout if timeout is not None else (0.0 if force else 60.0)
        if wait and await _ask(context, machine, process, wait, force=force):
            pass
        elif force:
            await _quit(context, machine, process)
        else:
            raise DeadlinePassed(
                f"the guest of machine {name} did not power off within {wait:g} s and is still running",
                hint=call("stop", name, force=True) + " ends QEMU and loses what the guest has not flushed",
                effect="none",
                machine=name,
            )
        with contextlib.suppress(HostCannot):  # that it has ended is seen without the record, as after a boot
            await context.astore.set_process(name, None)
            if machine.adopted:
                from qmpsnap.ops.session import taken  # of few machines

                await blocking(lambda: taken.settle(context, context.store.machine(name)))


async def _ask(context: Context, machine: Machine, process: Process, wait: float, *, force: bool) -> bool:
    try:
        async with context.monitor(machine) as qemu:
            if qemu:
                state = await commands.run_state(qemu)
                if state in pausing.ASLEEP:
                    if force:
                        return False
                    raise pausing.asleep(machine.name, state)
                await commands.control(qemu, "system_powerdown")
    except QemuGone:
        return not alive.is_alive(process)
    return await wait_end(process, deadline=wait)


async def _quit(context: Context, machine: Machine, process: Process) -> None:
    try:
        async with context.monitor(machine) as qemu:
            ended = await end(process, qemu)
    except (QemuGone, DeadlinePassed):
        ended = await end(process, None)
    if not ended:
        raise still_runs(process, machine=machine.name, effect="unknown")


def _require_alone(context: Context, machine: Machine, chains: Sequence[Chain]) -> None:
    """Refuse to let a guest write to what somebody else reads (I4)."""
    forest = context.store.forest_around(machine.name)
    consumed = {found.name for found in context.store.snapshots(machine.name) if found.state == "consumed"}
    for chain in chains:
        active = chain.active
        others = forest.sharers(Writer(machine.name, chain.disk, active.id), consumed=consumed)
        if others and not machine.require_disk(chain.disk).read_only:
            raise StateError(
                f"disk {chain.disk} of machine {machine.name} would write to {active.path}, which is read by"
                f" {', '.join(others)}",
                hint="put an overlay of its own on it: " + call("snapshot", machine.name),
                machine=machine.name,
            )


def require_files(machine: Machine, chains: Sequence[Chain]) -> None:
    """Make sure that every layer's file is the recorded one and that its header names the recorded backing."""
    for chain in chains:
        headers = compare.headers(chain)
        found = compare.view(chain, headers, (), None)
        for layer in found.layers:
            if layer.problems:
                raise StoreMismatch(
                    f"disk {chain.disk} of machine {machine.name}: {layer.problems[0]}",
                    hint=compare.remedy(machine.name, layer, headers[layer.layer.id]),
                    machine=machine.name,
                )
