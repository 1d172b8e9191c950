"""QEMU's migration to and from a file: how RAM and device state are saved and loaded.

The file is handed over as an open descriptor, so that it is the very file we made or checked: by ``getfd`` where the
transport ``fd`` takes plain files, by ``add-fd`` where QEMU has the transport ``file`` (8.2 and later).
"""

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from qmpsnap.errors import QmpError
from qmpsnap.model.layers.vmstate import version_of
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Monitor

NAME = "qs-state"
"""QEMU's name for the descriptor while it has it."""
FILE_SINCE = (8, 2)
"""The first QEMU with the transport ``file``."""
UNLIMITED = 1 << 40
"""Bytes per second: the default throttles a file as if it were a network."""

ENDED = frozenset({"completed", "failed", "cancelled"})
IDLE = ENDED | {"none"}
"""Nothing is on its way, whether there ever was."""


class Ram(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``MigrationStats`` we use; bytes, but ``normal`` and ``duplicate`` are pages."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    normal: int = 0
    duplicate: int = 0


class Migration(Struct, frozen=True, rename="kebab"):
    """The part of QAPI ``MigrationInfo`` we use; ``status`` is a ``MigrationStatus`` name (none, setup, active ...).

    ``blocked_reasons``: what about this machine makes any migration impossible.
    """

    status: str = "none"
    ram: Ram = Ram()
    error_desc: str = ""
    blocked_reasons: tuple[str, ...] = ()

    @property
    def tracks_writes(self) -> bool:
        """Whether a background save has RAM fixed: from here on the guest may write again."""
        return self.ram.normal + self.ram.duplicate > 0 or self.status == "completed"


async def query(monitor: Monitor) -> Migration:
    """How the last migration stands (``query-migrate``)."""
    return await commands.ask(monitor, "query-migrate", Migration)


async def capabilities(monitor: Monitor) -> frozenset[str]:
    """Names of the migration capabilities this QEMU knows (``query-migrate-capabilities``)."""
    known = await commands.ask(monitor, "query-migrate-capabilities", tuple[_Capability, ...])
    return frozenset(found.capability for found in known)


class _Capability(Struct, frozen=True):
    capability: str


async def set_capabilities(monitor: Monitor, wanted: Mapping[str, bool]) -> None:
    """Switch migration capabilities (``migrate-set-capabilities``); ``QmpError`` where QEMU or the kernel lacks one."""
    states = [{"capability": name, "state": state} for name, state in wanted.items()]
    await monitor.execute("migrate-set-capabilities", {"capabilities": states})


async def set_parameters(monitor: Monitor, **wanted: int | bool) -> None:
    """Set migration parameters (``migrate-set-parameters``); underscores stand for hyphens."""
    await monitor.execute("migrate-set-parameters", {name.replace("_", "-"): value for name, value in wanted.items()})


async def set_up(monitor: Monitor, *, background: bool, mapped: bool, direct: bool = False) -> None:
    """Ready QEMU to save or load, as fast as it can (``migrate-set-capabilities``, ``migrate-set-parameters``).

    ``background``: behind the running guest. ``mapped``: every page at a place of its own, by several threads.
    """
    known = await capabilities(monitor)
    wanted = {"background-snapshot": background, "mapped-ram": mapped, "multifd": mapped, "events": True}
    await set_capabilities(monitor, {name: on for name, on in wanted.items() if name in known})
    await set_parameters(monitor, max_bandwidth=UNLIMITED)
    if mapped:
        await set_parameters(monitor, direct_io=direct)


async def leave_out_shared(monitor: Monitor) -> None:
    """Neither save nor load memory that lies in a file; until :func:`put_back` (``x-ignore-shared``)."""
    await set_capabilities(monitor, {"x-ignore-shared": True})


async def put_back(monitor: Monitor) -> None:
    """Let QEMU forget what :func:`set_up`, :func:`leave_out_shared` and :func:`hand_over` did."""
    await let_go(monitor)
    known = await capabilities(monitor)
    wanted = ("background-snapshot", "mapped-ram", "multifd", "x-ignore-shared", "events")
    await set_capabilities(monitor, {name: False for name in wanted if name in known})


async def hand_over(monitor: Monitor, descriptor: int, *more: int) -> dict[str, Any]:
    """Give QEMU open descriptors of one plain file, as it will use it, until :func:`let_go` (``getfd`` or ``add-fd``).

    ``more`` are of the same file opened otherwise (O_DIRECT), among which a QEMU with the transport ``file`` chooses.
    Returns the arguments with which ``migrate`` or ``migrate-incoming`` finds the file.
    """
    if await _has_file_transport(monitor):
        await monitor.send_descriptor(descriptor)
        number = (await commands.ask(monitor, "add-fd", _FdSet, {"opaque": NAME})).fdset_id
        for other in more:
            await monitor.send_descriptor(other)
            await monitor.execute("add-fd", {"fdset-id": number, "opaque": NAME})
        return address(number)
    await monitor.send_descriptor(descriptor)
    await monitor.execute("getfd", {"fdname": NAME})
    return address(None)


def address(fdset: int | None) -> dict[str, Any]:
    """The arguments with which ``migrate`` finds a file that was handed over: as a set of descriptors, or by name."""
    if fdset is None:
        return {"uri": f"fd:{NAME}"}
    file = {"transport": "file", "filename": f"/dev/fdset/{fdset}", "offset": 0}
    return {"channels": [{"channel-type": "main", "addr": file}]}


def handing_over(version: tuple[int, ...]) -> list[tuple[str, dict[str, object]]]:
    """How a QEMU of this version, which has no descriptors yet, is given a file and told to save into it."""
    if version >= FILE_SINCE:
        return [("add-fd", {"opaque": NAME}), ("migrate", address(0))]
    return [("getfd", {"fdname": NAME}), ("migrate", address(None))]


class _FdSet(Struct, frozen=True, rename="kebab"):
    fdset_id: int


class _Fd(Struct, frozen=True):
    opaque: str = ""


class _FdSetInfo(Struct, frozen=True, rename="kebab"):
    fdset_id: int
    fds: tuple[_Fd, ...] = ()


async def let_go(monitor: Monitor) -> None:
    """Make QEMU close every descriptor that a qmpsnap process has passed to it (``closefd``, ``remove-fd``)."""
    if await _has_file_transport(monitor):
        for found in await commands.ask(monitor, "query-fdsets", tuple[_FdSetInfo, ...]):
            if any(file.opaque == NAME for file in found.fds):
                await monitor.execute("remove-fd", {"fdset-id": found.fdset_id})
        return
    try:
        await monitor.execute("closefd", {"fdname": NAME})
    except QmpError:
        return  # used up by the migration


async def start(monitor: Monitor, direction: Literal["migrate", "migrate-incoming"], channel: dict[str, Any]) -> None:
    """Begin to save (``migrate``) or to load (``migrate-incoming``); :func:`query` reports its progress."""
    await monitor.execute(direction, channel)


async def cancel(monitor: Monitor) -> None:
    """Give a save up (``migrate_cancel``); it has ended once :func:`query` says so."""
    await monitor.execute("migrate_cancel")


async def _has_file_transport(monitor: Monitor) -> bool:
    return version_of(await commands.query_version(monitor)) >= FILE_SINCE
