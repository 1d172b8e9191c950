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
from qmpsnap.host import identity
from qmpsnap.host.threads import to_read
from qmpsnap.machine.config.firmware import find_firmware
from qmpsnap.machine.starting import accel, logs, privileges, probe, scope
from qmpsnap.machine.starting.privileges import RunAs
from qmpsnap.model.home import Home
from qmpsnap.ops.base import admission, free_space
from qmpsnap.ops.base.context import Programs
from qmpsnap.store.sqlite.backend import SqliteStore


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
        _guest(home),
        await to_read(_store, home),
        await to_read(_births, home),
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
        remedy = f"{privileges.VARIABLE}=USER runs it as a user of its own"
        return Ability("qemu-user", "limited", "QEMU runs as root, with few of root's capabilities", remedy)
    lacks = admission.lost(user)
    detail = f"QEMU runs as {user.name}, without root's rights; it lacks {'; '.join(lacks) or 'nothing'}"
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


def _guest(home: Home) -> Ability:
    """The agent's counterpart lies in the guest; the small guest has one, so its presence is what can be told here."""
    if (home.guest / "initrd").is_file():
        return Ability("agent", "yes", "a channel for every machine; the small guest runs qemu-guest-agent")
    return Ability(
        "agent",
        "limited",
        "a channel for every machine; the small guest is not built",
        "qmpsnap demo builds it",
    )


def _store(home: Home) -> Ability:
    try:
        with SqliteStore(home.store, machines=home.machines, make=False) as store:
            machines, barred, lost = store.machines(), store.barred, store.lost()
            is_there = store.is_there
    except QmpsnapError as error:
        return Ability("store", "no", error.message, error.hint)
    if barred:
        return Ability("store", "no", f"{barred.message}; it can be read, {len(machines)} machine(s)", barred.hint)
    if lost:
        detail = f"{home.store} knows nothing of {', '.join(lost)}, defined before"
        remedy = "put the store back, or qmpsnap check --rebuild makes one from the images"
        return Ability("store", "no", detail, remedy, lost=True)
    if not is_there and home.beneath:
        detail = f"there is no home at {home.data}"
        return Ability("store", "no", detail, "qmpsnap define makes it, if that is the place", lost=True)
    if not is_there:
        return Ability("store", "yes", f"{home.store}, made when first needed")
    return Ability("store", "yes", f"{home.store}, {len(machines)} machine(s)")


def _births(home: Home) -> Ability:
    """Whether a file that replaces a layer can be told by more than its inode's number."""
    folder = next(place for place in (home.machines, *home.machines.parents) if place.is_dir())
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if identity.born(descriptor):
            return Ability("identity", "yes", "files are told by device, inode and time of birth")
    finally:
        os.close(descriptor)
    detail = f"the file system of {folder} keeps no time of birth: a file that was put in a layer's place and got its"
    detail += " inode's number is not told from it"
    return Ability("identity", "limited", detail, "keep images on ext4, XFS or btrfs")


def _scope(uid: int) -> Ability:
    """Whether a QEMU outlives the session, cron job or unit that starts it."""
    asked = scope.manager(uid)
    kept = "a QEMU stays in the control group of whoever starts it, and ends with that"
    if not scope.SYSTEMD.is_dir():
        return Ability("scope", "limited", f"no systemd runs here: {kept}, where somebody ends it")
    if shutil.which(scope.PROGRAM) is None:
        return Ability("scope", "limited", f"there is no {scope.PROGRAM}: {kept}", "apt-get install systemd")
    if asked is None:
        return Ability("scope", "limited", f"no systemd of this user's runs: {kept}", "loginctl enable-linger")
    found = f"a QEMU gets a scope of its own from the {asked}'s systemd"
    if asked == "user" and not scope.lingers(uid):
        return Ability("scope", "limited", f"{found}, which ends with the last session", "loginctl enable-linger")
    return Ability("scope", "yes", found)


def _logs(home: Home) -> Ability:
    """Logs are cut by commands alone: which of them have grown since the last one."""
    limit = f"cut to {logs.KEPT >> 10} KiB by the next command on the machine where larger than {logs.LIMIT >> 20} MiB"
    large = []
    with contextlib.suppress(QmpsnapError), SqliteStore(home.store, machines=home.machines, make=False) as store:
        for machine in store.machines():
            found = logs.sizes(home, machine.name).items()
            large += [f"{path} ({size >> 20} MiB)" for path, size in found if size > logs.LIMIT]
    if not large:
        return Ability("logs", "yes", f"{home.data / 'logs'}, {limit}; nothing bounds them between commands")
    remedy = "qmpsnap show VM cuts them; let cron do so where a guest writes much to its console"
    return Ability("logs", "limited", f"{', '.join(large)}: {limit}", remedy)


def _folder(name: str, path: Path) -> Ability:
    if not path.is_dir():
        return Ability(f"{name} folder", "yes", f"{path}, made when first needed")
    status = path.stat()
    if status.st_uid != os.geteuid():
        return Ability(
            f"{name} folder", "no", f"{path} belongs to user {status.st_uid}", "set QMPSNAP_HOME to your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Ability(f"{name} folder", "no", f"{path} can be written to by others", f"chmod go-w {path}")
    free = free_space.room(path).free
    if name == "data" and free < free_space.LOW:  # the run folder holds little, and often lies in memory
        remedy = "free some space there: QEMU pauses a guest whose disk finds none"
        return Ability(f"{name} folder", "limited", f"{path}, only {free >> 20} MiB free", remedy)
    return Ability(f"{name} folder", "yes", f"{path}, {free >> 20} MiB free")


def _memory() -> Ability:
    free = psutil.virtual_memory().available
    return Ability("memory", "yes", f"{free >> 20} MiB available to guests")
