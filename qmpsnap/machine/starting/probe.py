"""What a QEMU can do, by asking it: started once without a machine, its answers kept until it or our rights change."""

import contextlib
import os
from pathlib import Path

import msgspec
from msgspec import Struct

from qmpsnap.errors import HostCannot, QemuGone, QmpError, SpecError
from qmpsnap.hint import call
from qmpsnap.host import files
from qmpsnap.machine.qemu import LAUNCH_DEADLINE, end_launch, start
from qmpsnap.machine.starting.privileges import Privileges, RunAs, obstacle
from qmpsnap.machine.starting.run_files import QMP_SOCKET
from qmpsnap.model.machines.cpu import STATIC, static_model
from qmpsnap.qmp import commands, migration, session

USERFAULTFD = "/dev/userfaultfd"


class Abilities(Struct, frozen=True, kw_only=True):
    """What one QEMU binary said of itself.

    ``background_snapshot`` is empty when RAM can be saved behind a running guest, else QEMU's own words why not.
    ``machine_types``: every one, with its alias or None. ``tcg_cpu``: what CPU ``max`` is under TCG, in words that
    later QEMUs understand; empty where that cannot be told. ``vmgenid``: whether it has that device. ``cpu_models``:
    the names of all.
    """

    version: str
    background_snapshot: str
    machine_types: dict[str, str | None]
    tcg_cpu: str
    vmgenid: bool
    cpu_models: tuple[str, ...]

    def versioned(self, machine_type: str) -> str:
        """The versioned name behind an alias such as ``q35``; a full name is itself."""
        for name, alias in self.machine_types.items():
            if machine_type in (alias, name):
                return name
        raise SpecError(
            f"machine: QEMU {self.version} has no machine type {machine_type!r}",
            hint="qemu-system-x86_64 -machine help lists them",
        )


async def ask(qemu: str, cache: Path | None, *, user: RunAs | None = None) -> Abilities:
    """The binary's abilities, from the cache where it is the same file as then; without a cache nothing is kept."""
    import shutil

    binary = shutil.which(qemu)
    if binary is None:
        raise HostCannot(
            f"there is no {qemu} on this host",
            hint="apt-get install qemu-system-x86, or set QMPSNAP_QEMU to the binary",
        )
    status = os.stat(binary)  # noqa: PTH116 - of the very name that will be run
    who = user.uid if user else os.geteuid()
    identity = f"{binary}-{status.st_ino}-{status.st_mtime_ns}-{who}{_userfaultfd(user)}".replace("/", "_")
    if cache is None:
        return await interrogate(qemu, user=user)
    kept = cache / "qemu-abilities" / f"{identity[-200:]}.json"
    try:
        return msgspec.json.decode(kept.read_bytes(), type=Abilities)
    except (OSError, msgspec.MsgspecError):
        abilities = await interrogate(qemu, user=user)
    with contextlib.suppress(OSError):  # what cannot be kept is asked again
        files.make_folder(kept.parent)
        files.replace_durably(kept, msgspec.json.encode(abilities), ending=f"{os.getpid()}.part")
    return abilities


def _userfaultfd(user: RunAs | None) -> str:
    """What decides whether this user's QEMU can track writes: with another answer QEMU is asked again."""
    return f"-u{_everyones()}{'-dev' if _device_opens(user) else ''}"


def userfaultfd_is_roots(user: RunAs) -> bool:
    """Whether a QEMU of that user cannot track writes, where root's can."""
    return _everyones() == "0" and not _device_opens(user)


def _everyones() -> str:
    try:
        return Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    except OSError:
        return ""


def _device_opens(user: RunAs | None) -> bool:
    if not os.access(USERFAULTFD, os.R_OK | os.W_OK):
        return False
    return user is None or not obstacle(user, USERFAULTFD, write=True)


async def interrogate(qemu: str, *, user: RunAs | None = None) -> Abilities:
    """Start the binary without a machine, ask, and end it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="qmpsnap-") as folder:
        run_dir = Path(folder)
        argv = [
            qemu, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-S",
            "-chardev", f"socket,id=qmp,path={QMP_SOCKET},server=on,wait=on", "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip

        async def question() -> Abilities:
            async with session.connect(run_dir / QMP_SOCKET, machine="(probe)", deadline=LAUNCH_DEADLINE) as monitor:
                return await _interview(monitor)

        try:
            rights = Privileges.bare(user)
            first, abilities = await start(argv, run_dir, machine="(probe)", ask=question, rights=rights)
        except QemuGone as error:
            raise HostCannot(
                f"{qemu} does not start: {error.message}", hint=call("doctor") + " shows what is missing"
            ) from error
        await end_launch(first, argv, run_dir)
        return abilities


async def _interview(monitor: session.Monitor) -> Abilities:
    version = await commands.query_version(monitor)
    types = {found.name: found.alias for found in await commands.query_machines(monitor)}
    try:
        await migration.set_capabilities(monitor, {"background-snapshot": True})
        background = ""
    except QmpError as error:
        background = error.message
    return Abilities(
        version=version,
        background_snapshot=background,
        machine_types=types,
        tcg_cpu=await _tcg_cpu(monitor),
        vmgenid=await commands.has_device(monitor, "vmgenid"),
        cpu_models=await commands.query_cpu_models(monitor),
    )


async def _tcg_cpu(monitor: session.Monitor) -> str:
    try:
        nothing, wanted = await commands.expand_cpu(monitor, STATIC), await commands.expand_cpu(monitor, "max")
    except QmpError:  # of another architecture
        return ""
    # A QEMU without TCG tells what it is under KVM.
    return static_model(nothing, wanted) if "TCG" in str(wanted.get("model-id")) else ""
