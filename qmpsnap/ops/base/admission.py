"""The files that a QEMU of another user has to open: qmpsnap's own get an access control list for that user.

Only files that qmpsnap created are changed. Other files, such as a base image, must be accessible to that user already.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from qmpsnap.host import acl
from qmpsnap.host.files import make_folder
from qmpsnap.host.threads import to_end
from qmpsnap.machine.config import firmware_files
from qmpsnap.machine.starting import accel, privileges, probe
from qmpsnap.machine.starting.argv import Firmware
from qmpsnap.machine.starting.privileges import RunAs
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.base.context import Context

READ_WRITE = acl.READ | acl.WRITE


def user_of(context: Context, machine: Machine) -> int | None:
    """The user as whom a QEMU works for a machine now, or will when it is started; None for this one."""
    process = context.process(machine)
    if process is None:
        return context.run_as.uid if context.run_as else None
    user = privileges.user_of(process.pid)
    return None if user in (None, os.geteuid()) else user


def shown(machine: Machine, process: Process | None) -> tuple[str | None, tuple[str, ...]]:
    """Who a machine's QEMU runs as, or would, and what it lacks for that; None where it is stopped, or another's."""
    if machine.adopted:
        return None, ()
    user = RunAs.from_environment(os.environ)
    if process is not None:
        number = privileges.user_of(process.pid)
        if number is None:
            return None, ()
        if os.geteuid() != 0 or number == 0:
            return privileges.name_of(number), ()
        user = RunAs.named(str(number))
    return (user.name, lost(user, machine.spec)) if user else (None, ())


async def new_files(context: Context, machine: Machine, paths: Sequence[str]) -> None:
    """Let the machine's QEMU open files that we have just made for it."""
    if os.geteuid() == 0 and (user := user_of(context, machine)) is not None:
        for path in paths:
            await to_end(privileges.admit, path, user, READ_WRITE)


async def all_files(context: Context, machine: Machine, chains: Sequence[Chain], firmware: Firmware | None) -> None:
    """Let a QEMU that is about to be started open all that it will, and make sure that it can."""
    if context.run_as:
        await to_end(_admit_all, context, machine, chains, firmware)


def _admit_all(context: Context, machine: Machine, chains: Sequence[Chain], firmware: Firmware | None) -> None:
    user, home = context.run_as, context.home
    assert user
    active = {chain.active.id for chain in chains if not machine.require_layers_of(chain.disk).read_only}
    layers = {layer.id: layer for chain in chains for layer in chain.layers}
    own = [layer for layer in layers.values() if layer.owned and layer.storage == "file"]
    shared = {layer.id for layer in own if _is_anothers(home.machines, machine.name, layer)}
    for layer in own:
        privileges.admit(layer.path, user.uid, acl.READ if layer.id in shared else READ_WRITE)
    files = [layer.path for layer in layers.values() if layer.storage != "rbd"]
    if firmware:
        privileges.admit(firmware.vars, user.uid, READ_WRITE)
        files += [firmware.vars, firmware.code]
        if machine.spec.tpm:
            _admit_tpm(home.tpm(machine.name), user.uid)
    files += [path for path in (machine.spec.kernel, machine.spec.initrd, machine.spec.cdrom) if path]
    folders = [str(home.run_dir(machine.name)), str(home.log_dir(machine.name))]  # QEMU asks for their whole path
    for folder in _folders([*files, *folders], (home.data, home.cache, home.run)):
        privileges.admit(folder, user.uid, acl.ENTER)
    writable = {layers[layer].path for layer in active} | ({firmware.vars} if firmware else set())
    for path in files:
        privileges.require_access(user, path, machine=machine.name, write=path in writable)


def _admit_tpm(folder: Path, user: int) -> None:
    """The emulator of a TPM runs as the same user, makes files in its folder, and takes no state but its own."""
    make_folder(folder)
    privileges.admit(folder, user, READ_WRITE | acl.ENTER)
    if (state := folder / firmware_files.STATE).exists():
        os.chown(state, user, -1)


def _is_anothers(machines: Path, machine: str, layer: Layer) -> bool:
    path = Path(layer.path)
    return path.is_relative_to(machines) and not path.is_relative_to(machines / machine)


def _folders(files: Iterable[str], ours: Sequence[Path]) -> list[Path]:
    """Our own folders that lead to files, which nobody else may enter."""
    found: dict[Path, None] = {}
    for file in files:
        for parent in reversed(Path(file).parents):
            if any(parent.is_relative_to(place) for place in ours):
                found[Path(os.path.realpath(parent))] = None
    return list(found)


def users(context: Context, machine: Machine) -> frozenset[int]:
    """Whom the machine's files may be open to besides their owner: its QEMU, and the one that would be started."""
    found = {user_of(context, machine), context.run_as.uid if context.run_as else None}
    return frozenset(user for user in found if user is not None)


def others(path: str, status: os.stat_result, trusted: frozenset[int]) -> int:
    """What users who are not trusted may do to what has that name, which is theirs neither; as ``rwx`` bits."""
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & 0o077:
        return 0
    try:
        return acl.rights(path, status.st_mode).beyond(trusted)
    except OSError:
        return stat.S_IMODE(status.st_mode) & 0o077


def lost(user: RunAs, spec: MachineSpec | None = None) -> tuple[str, ...]:
    """What a QEMU of that user lacks which root's has, of a machine or of any; a sentence each."""
    found = []
    if probe.userfaultfd_is_roots(user):
        remedy = f"setfacl -m u:{user.name}:rw {probe.USERFAULTFD}, or sysctl vm.unprivileged_userfaultfd=1"
        found.append(f"background snapshots, as userfaultfd needs root: {remedy}")
    if accel.KVM.exists() and (remedy := privileges.obstacle(user, str(accel.KVM), write=True)):
        found.append(f"KVM: {remedy}")
    kinds = {nic.kind for nic in spec.nics} if spec else {"tap", "bridge"}
    if "tap" in kinds:
        found.append(f"tap interfaces that are not its own: ip tuntap add NAME mode tap user {user.name}")
    if "bridge" in kinds:
        found.append("bridges, unless qemu-bridge-helper is set-uid root and allows them")
    return tuple(found)
