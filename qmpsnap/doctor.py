"""``doctor``: what this host, its QEMU and its folders can do."""

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Literal

import psutil
from msgspec import Struct

from qmpsnap.block.image import qemu_img
from qmpsnap.block.image.create import ImageTool
from qmpsnap.errors import HostCannot, QmpsnapError, UsageError
from qmpsnap.hint import call
from qmpsnap.host import files
from qmpsnap.host.threads import to_read
from qmpsnap.machine.config.firmware import find_firmware
from qmpsnap.machine.starting import accel, logs, privileges, probe, scope
from qmpsnap.machine.starting.privileges import RunAs
from qmpsnap.model.home import Home
from qmpsnap.ops.base import admission, free_space
from qmpsnap.ops.base.context import Programs
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.volumes.driver import Volume
from qmpsnap.volumes.lvm import Lvm
from qmpsnap.volumes.rbd import Rbd
from qmpsnap.volumes.reflink import Reflink


class Ability(Struct, frozen=True):
    """One thing a host can do, can do in part, or cannot; ``remedy`` is empty when there is nothing to do.

    ``lost``: it is the home that is not there, or that has lost machines.
    """

    name: str
    ok: Literal["yes", "limited", "no"]
    detail: str
    remedy: str = ""
    lost: bool = False


async def run(home: Home) -> list[Ability]:
    """Look at everything; never raises for what is missing, or a store that cannot be opened."""
    programs = Programs.from_environment(os.environ)
    cache = home.cache
    with contextlib.ExitStack() as stack:
        if home.beneath and not home.data.exists():  # looking makes no home
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return await _look(programs, home, cache)


async def _look(programs: Programs, home: Home, cache: Path) -> list[Ability]:
    return [
        await to_read(_user),
        *await _qemu(programs.qemu, cache),
        await _accelerator(programs.qemu, cache),
        await _image_tool(programs.image),
        _firmware(),
        _tpm(),
        _guest(home),
        await to_read(_store, home),
        await to_read(_births, home),
        await _volumes(home),
        *await _other_volumes(),
        _scope(os.geteuid()),
        await to_read(_logs, home),
        *(_folder(name, path) for name, path in (("data", home.data), ("run", home.run))),
        await to_read(_memory),
    ]


def _user() -> Ability:
    """Who QEMU runs as, and what that costs."""
    try:
        user = RunAs.from_environment(os.environ)
    except UsageError as error:
        return Ability("qemu-user", "no", error.message, error.hint)
    if user is None and os.geteuid() != 0:
        return Ability("qemu-user", "yes", f"QEMU runs as this user, {privileges.name_of(os.geteuid())}")
    if user is None:
        remedy = f"set {privileges.VARIABLE}=USER to run it as another user"
        return Ability("qemu-user", "limited", "QEMU runs as root, with few capabilities", remedy)
    lacks = admission.lost(user)
    detail = f"QEMU runs as {user.name}, without root's privileges; it lacks {'; '.join(lacks) or 'nothing'}"
    return Ability("qemu-user", "limited" if lacks else "yes", detail)


def _run_as() -> RunAs | None:
    try:
        return RunAs.from_environment(os.environ)
    except UsageError:  # told already
        return None


async def _qemu(qemu: str, cache: Path) -> list[Ability]:
    try:
        abilities = await probe.ask(qemu, cache, user=_run_as())
    except QmpsnapError as error:
        return [Ability("qemu", "no", error.message, error.hint)]
    where = shutil.which(qemu) or qemu
    found = [Ability("qemu", "yes", f"{abilities.version} ({where})")]
    if abilities.background_snapshot:
        remedy = "sysctl vm.unprivileged_userfaultfd=1, or give this user access to /dev/userfaultfd"
        found.append(Ability("background-snapshot", "limited", abilities.background_snapshot, remedy))
    else:
        found.append(Ability("background-snapshot", "yes", "QEMU accepts the capability"))
    return found


async def _accelerator(qemu: str, cache: Path) -> Ability:
    try:
        choice = await accel.choose("auto", qemu=qemu, cache=cache, user=_run_as())
    except HostCannot as error:
        return Ability("accelerator", "no", error.message, error.hint)
    if choice.accel == "kvm":
        return Ability("accelerator", "yes", f"kvm: {choice.reason}")
    remedy = "enable virtualisation (nested, in a virtual machine) and give this user access to /dev/kvm"
    return Ability("accelerator", "limited", f"tcg (slow, works everywhere): {choice.reason}", remedy)


async def _image_tool(image: ImageTool) -> Ability:
    remedy = "apt-get install qemu-utils, or set QMPSNAP_QEMU_IMG to the binary"
    try:
        done = await qemu_img.run(
            [image.binary, "--version"], deadline=10, late=f"{image.binary}: no answer within 10 s"
        )
    except QmpsnapError as error:
        return Ability("qemu-img", "no", error.message, remedy)
    first = done.stdout.decode(errors="replace").partition("\n")[0]
    return Ability("qemu-img", "no" if done.returncode else "yes", first, remedy if done.returncode else "")


def _firmware() -> Ability:
    try:
        return Ability("uefi", "yes", find_firmware().code)
    except HostCannot as error:
        return Ability("uefi", "limited", "no firmware images: specs with 'firmware: uefi' are refused", error.hint)


def _tpm() -> Ability:
    if program := shutil.which("swtpm"):
        return Ability("tpm", "yes", program)
    return Ability("tpm", "limited", "no swtpm: machines with a TPM do not start", "apt-get install swtpm")


def _guest(home: Home) -> Ability:
    """The agent's counterpart lies in the guest; the small guest has one, so its presence is what can be told here."""
    if (home.guest / "initrd").is_file():
        return Ability("agent", "yes", "every machine has a channel; the small guest runs qemu-guest-agent")
    return Ability(
        "agent",
        "limited",
        "every machine has a channel; the small guest is not built",
        call("demo") + " builds it",
    )


def _store(home: Home) -> Ability:
    try:
        with SqliteStore(home.store, machines=home.machines, make=False) as store:
            machines, barred, lost = store.machines(), store.barred, store.records.lost(wait=False)
            is_there = store.is_there
    except QmpsnapError as error:
        return Ability("store", "no", error.message, error.hint)
    if barred:
        return Ability("store", "no", f"{barred.message}; it can be read, {len(machines)} machine(s)", barred.hint)
    if lost:
        detail = f"{home.store} lacks {', '.join(lost)}, defined before"
        remedy = "put the store back, or rebuild it: " + call("rebuild")
        return Ability("store", "no", detail, remedy, lost=True)
    if not is_there and home.beneath:
        detail = f"there is no home at {home.data}"
        return Ability(
            "store",
            "no",
            detail,
            "if that is the right folder, create it: " + call("define", "", "SPEC.yaml"),
            lost=True,
        )
    if not is_there:
        return Ability("store", "yes", f"{home.store}, created on first use")
    return Ability("store", "yes", f"{home.store}, {len(machines)} machine(s)")


def _births(home: Home) -> Ability:
    """Whether a file that replaces a layer can be told by more than its inode's number."""
    folder = next(place for place in (home.machines, *home.machines.parents) if place.is_dir())
    with files.opened_folder(folder) as descriptor:
        if files.born(descriptor):
            return Ability("identity", "yes", "files are identified by device, inode and birth time")
    detail = f"the file system of {folder} keeps no birth time: a file that replaced a layer and got its inode number"
    detail += " is taken for that layer"
    return Ability("identity", "limited", detail, "keep images on ext4, XFS or btrfs")


async def _volumes(home: Home) -> Ability:
    """Which storages can make snapshots: of image files, where new machines get theirs."""
    folder = next(place for place in (home.machines, *home.machines.parents) if place.is_dir())
    found = await Reflink().probe(Volume(path=str(folder / "image"), format="qcow2"))
    if found.able:
        return Ability("volumes", "yes", f"reflink: the file system of {folder} can clone images")
    detail = f"reflink: {found.why}: snapshots of kind volume are refused there"
    return Ability("volumes", "limited", detail, found.remedy)


async def _other_volumes() -> list[Ability]:
    """Whether logical volumes and RBD images can be snapshotted, for machines that have such disks."""
    lvm, rbd = await Lvm().probe(None), await Rbd().probe(None)
    found = []
    for name, ability, can in (
        ("volumes-lvm", lvm, "LVM's programs can take snapshots of logical volumes"),
        ("volumes-rbd", rbd, "Ceph's programs can take snapshots of RBD images"),
    ):
        no = f"{ability.why}: snapshots of kind volume are refused on such disks"
        found.append(Ability(name, "yes" if ability.able else "limited", can if ability.able else no, ability.remedy))
    return found


def _scope(uid: int) -> Ability:
    """Whether a QEMU outlives the session, cron job or unit that starts it."""
    asked = scope.manager(uid)
    kept = "a QEMU stays in the control group that starts it and ends with it"
    if not scope.SYSTEMD.is_dir():
        return Ability("scope", "limited", f"systemd is not running: {kept}")
    if shutil.which(scope.PROGRAM) is None:
        return Ability("scope", "limited", f"there is no {scope.PROGRAM}: {kept}", "apt-get install systemd")
    if asked is None:
        return Ability("scope", "limited", f"this user has no systemd instance: {kept}", "loginctl enable-linger")
    found = f"every QEMU gets its own scope from the {asked}'s systemd"
    if asked == "user" and not scope.lingers(uid):
        return Ability("scope", "limited", f"{found}, which ends with the last session", "loginctl enable-linger")
    return Ability("scope", "yes", found)


def _logs(home: Home) -> Ability:
    """Logs are cut by commands alone: which of them have grown since the last one."""
    limit = f"a command on a machine cuts its logs above {logs.LIMIT >> 20} MiB to {logs.KEPT >> 10} KiB"
    large = []
    with contextlib.suppress(QmpsnapError), SqliteStore(home.store, machines=home.machines, make=False) as store:
        for machine in store.machines():
            found = logs.sizes(home, machine.name).items()
            large += [f"{path} ({size >> 20} MiB)" for path, size in found if size > logs.LIMIT]
    if not large:
        return Ability("logs", "yes", f"{home.data / 'logs'}, {limit}; they are unbounded between commands")
    remedy = call("state", "VM") + " cuts them; run it from cron if a guest writes much to its console"
    return Ability("logs", "limited", f"{', '.join(large)}: {limit}", remedy)


def _folder(name: str, path: Path) -> Ability:
    if not path.is_dir():
        return Ability(f"{name} folder", "yes", f"{path}, created on first use")
    status = path.stat()
    if status.st_uid != os.geteuid():
        return Ability(
            f"{name} folder",
            "no",
            f"{path} belongs to user {status.st_uid}",
            "set QMPSNAP_HOME to a folder of your own",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Ability(f"{name} folder", "no", f"{path} is writable by other users", f"chmod go-w {path}")
    free = free_space.room(path).free
    if name == "data" and free < free_space.LOW:  # the run folder holds little, and often lies in memory
        remedy = "free some space there; QEMU pauses a guest when its disk is full"
        return Ability(f"{name} folder", "limited", f"{path}, only {free >> 20} MiB free", remedy)
    return Ability(f"{name} folder", "yes", f"{path}, {free >> 20} MiB free")


def _memory() -> Ability:
    free = psutil.virtual_memory().available
    return Ability("memory", "yes", f"{free >> 20} MiB available to guests")
