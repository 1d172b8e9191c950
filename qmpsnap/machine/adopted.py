"""A QEMU that somebody else launched: what the kernel tells of it, and its monitor, speaking of layers by our ids."""

import contextlib
import itertools
import os
import socket as socketlib
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from qmpsnap.errors import HostCannot, QemuGone, StateError
from qmpsnap.host.files import Inode, inode_of, key_of
from qmpsnap.machine.starting import process as processes
from qmpsnap.model.machines.adoption import Adoption, Names
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.qmp import commands, session, unixsocket
from qmpsnap.qmp.session import COMMAND_DEADLINE, Bell, Monitor


class Seen(Struct, frozen=True, kw_only=True):
    """What ``/proc`` tells of the process.

    ``user`` is whose files it can open, ``folder`` what its relative paths are relative to. ``names``: device and inode
    of everything it has open, and the name the kernel has for it now: a relative path that QEMU was given says nothing
    once it has changed its folder. ``apart``: it has a root folder or mounts of its own, so that a path may be another
    one there.
    """

    process: Process
    user: int
    folder: str
    names: dict[tuple[int, int], str]
    apart: bool
    arguments: tuple[str, ...]

    @property
    def files(self) -> frozenset[tuple[int, int]]:
        """Device and inode of everything it has open."""
        return frozenset(self.names)


def look(pid: int) -> Seen:
    """What the kernel tells of a process."""
    proc = Path(f"/proc/{pid}")
    process = processes.existing(pid)
    if process is None:
        raise _ended(pid)
    try:
        return Seen(
            process=process,
            user=proc.stat().st_uid,
            folder=str((proc / "cwd").readlink()),
            names=_open_files(proc / "fd"),
            apart=str((proc / "root").readlink()) != "/" or not (proc / "ns/mnt").samefile("/proc/self/ns/mnt"),
            arguments=tuple((proc / "cmdline").read_bytes().decode(errors="replace").split("\0")),
        )
    except PermissionError as error:
        raise _another_users(pid) from error
    except FileNotFoundError as error:
        raise _ended(pid) from error


def libvirt_domain(arguments: Sequence[str]) -> str | None:
    """The libvirt domain that was launched by these arguments, empty where they do not name it; None: another QEMU.

    libvirt calls its own monitor so in every version; other programs have no reason to.
    """
    words = " ".join(arguments)
    if "id=charmonitor" not in words and '"charmonitor"' not in words:
        return None
    name = next((after for word, after in itertools.pairwise(arguments) if word == "-name"), "")
    return name.removeprefix("guest=").partition(",")[0]


def is_libvirts(socket: Path) -> bool:
    """Whether libvirt has made a socket: its daemon listens there, in QEMU's stead, or it lies in its folders."""
    if "libvirt" in socket.parts:
        return True
    try:
        with socketlib.socket(fileno=unixsocket.connect(socket).detach()) as found:
            pid = struct.unpack("3i", found.getsockopt(socketlib.SOL_SOCKET, socketlib.SO_PEERCRED, 12))[0]
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("libvirtd", "virtqemud")
    except (OSError, ValueError):
        return False


def open_files(pid: int) -> Iterator[Inode]:
    """Device and inode of a process's open files, and its devices' numbers, mostly what it opened last first."""
    folder = f"/proc/{pid}/fd"
    try:
        for descriptor in sorted(os.listdir(folder), key=int, reverse=True):  # noqa: PTH208 - there may be hundreds
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                yield key_of(os.stat(f"{folder}/{descriptor}"))  # noqa: PTH116
    except PermissionError as error:
        raise _another_users(pid) from error
    except FileNotFoundError as error:
        raise _ended(pid) from error


def _another_users(pid: int) -> HostCannot:
    return HostCannot(
        f"process {pid} belongs to another user: its open files cannot be listed",
        hint="try again as that user or as root",
    )


def _ended(pid: int) -> QemuGone:
    return QemuGone(f"process {pid}, which listened on the socket, has ended")


def _open_files(folder: Path) -> dict[Inode, str]:
    found = {}
    for descriptor in folder.iterdir():
        try:
            status, name = descriptor.stat(), descriptor.readlink()
        except FileNotFoundError:  # closed meanwhile
            continue
        found[inode_of(status)] = found[key_of(status)] = str(name)
    return found


@asynccontextmanager
async def monitor(machine: Machine, adopted: Adoption, process: Process) -> AsyncIterator[Monitor]:
    """A session with the monitor that the machine was adopted by, after QEMU has been recognised."""
    async with session.connect(Path(adopted.socket), machine=machine.name) as qemu:
        uuid = await commands.query_uuid(qemu)
        if qemu.peer != process.pid or uuid != adopted.uuid:
            raise StateError(
                f"the monitor {adopted.socket} of machine {machine.name} belongs to process {qemu.peer} with UUID"
                f" {uuid}; adopted was process {process.pid} with UUID {adopted.uuid}",
                hint="end the program that replaced the socket",
                machine=machine.name,
            )
        yield renaming(qemu, machine)


@asynccontextmanager
async def own_monitor(session: AbstractAsyncContextManager[Monitor], machine: Machine) -> AsyncIterator[Monitor]:
    """A session with a QEMU of our own, which may have named some nodes itself."""
    async with session as qemu:
        yield renaming(qemu, machine)


def renaming(monitor: Monitor, machine: Machine) -> Monitor:
    """A machine's monitor with the names exchanged on the way, where QEMU has others than we."""
    return _Renaming(monitor, names) if (names := machine.names) else monitor


class _Renaming:
    """A monitor with the names exchanged on the way."""

    def __init__(self, monitor: Monitor, names: Names) -> None:
        self._monitor = monitor
        self._names = names

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float = COMMAND_DEADLINE
    ) -> Any:
        sent = self._names.sent(dict(arguments)) if arguments else arguments
        return self._names.told(command, await self._monitor.execute(command, sent, deadline=deadline))

    async def send_descriptor(self, descriptor: int) -> None:
        await self._monitor.send_descriptor(descriptor)

    def listen(self, *events: str) -> AbstractAsyncContextManager[Bell]:
        return self._monitor.listen(*events)
