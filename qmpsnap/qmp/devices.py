"""Devices that are plugged into a running QEMU, and unplugged again once its guest has let go of them."""

import contextlib
import re
from typing import Any, Final

import anyio
from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, QmpError
from qmpsnap.qmp.commands import ask
from qmpsnap.qmp.session import Monitor

_PERIPHERAL: Final = "/machine/peripheral"
"""Where QEMU's object model has the devices that were given an id."""
_CHILD: Final = re.compile("child<(.*)>")
_REFUSED: Final = "DEVICE_UNPLUG_GUEST_ERROR"
_PENDING: Final = "in the process of unplug"
"""What QEMU says where the guest was asked before and has not answered."""
_LOOK: Final = 1.0
"""Seconds after which QEMU is asked without an event."""


class _Property(Struct, frozen=True):
    name: str
    type: str


def add(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The command that plugs a device in."""
    return "device_add", options


def remove(device: str) -> tuple[str, dict[str, Any]]:
    """The command that asks the guest to let go of a device."""
    return "device_del", {"id": device}


def remove_netdev(backend: str) -> tuple[str, dict[str, Any]]:
    """The command that removes what a network card was connected to."""
    return "netdev_del", {"id": backend}


async def drop_netdev(monitor: Monitor, backend: str) -> None:
    """Remove what a network card was connected to (``netdev_del``); fine where that is gone."""
    with contextlib.suppress(QmpError):
        await monitor.execute(*remove_netdev(backend))


async def plugged(monitor: Monitor) -> frozenset[str]:
    """The ids of the devices that QEMU has (``qom-list``)."""
    return frozenset(await drivers(monitor))


async def drivers(monitor: Monitor) -> dict[str, str]:
    """By id: the driver of each device that QEMU has under one (``qom-list``)."""
    found = await ask(monitor, "qom-list", tuple[_Property, ...], {"path": _PERIPHERAL})
    return {each.name: match[1] for each in found if (match := _CHILD.fullmatch(each.type))}


async def unplug(monitor: Monitor, device: str, *, timeout: float) -> None:  # noqa: ASYNC109 - the guest's
    """Have a device unplugged; returns once QEMU has it no more (``device_del``, ``DEVICE_DELETED``).

    Raises:
        QmpError: the guest refuses (``DEVICE_UNPLUG_GUEST_ERROR``), or the device cannot be unplugged.
        DeadlinePassed: the guest has not answered within ``timeout`` seconds; it may still do so.
    """
    async with monitor.listen("DEVICE_DELETED", _REFUSED) as bell:
        try:
            await monitor.execute(*remove(device))
        except QmpError as error:
            if _PENDING not in error.message:
                raise
        end = anyio.current_time() + timeout
        while device in await plugged(monitor):
            if any(event == _REFUSED for event, _ in bell.times):
                raise QmpError(f"the guest refuses to let go of device {device} ({_REFUSED})")
            if (left := end - anyio.current_time()) <= 0:
                raise DeadlinePassed(f"the guest has not let go of device {device} within {timeout:g} s")
            await bell.wait(min(left, _LOOK))
