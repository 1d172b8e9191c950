"""The bare scripts: the QMP commands that a job needs, without journal, checks or locks.

Each is a coroutine; ``bare.py commit SOCKET ...`` runs one as a process, and then loads nothing but this and qemu.qmp.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from qemu.qmp import QMPClient

QEMU_IMG = os.environ.get("QMPSNAP_QEMU_IMG", "qemu-img")
OVERLAY = "bare"
"""The node that :func:`create` adds."""


@asynccontextmanager
async def monitor(socket: str) -> AsyncIterator[QMPClient]:
    """A client of a monitor, for the block."""
    qemu = QMPClient("bare")
    await qemu.connect(socket)
    try:
        yield qemu
    finally:
        await qemu.disconnect()


async def create(socket: str, node: str, image: str, size: str, overlay: str) -> None:
    """Put an overlay on a disk; its size is said, so that nobody opens the chain below to find it."""
    argv = (QEMU_IMG, "create", "-q", "-f", "qcow2", "-u", "-b", image, "-F", "qcow2", overlay, size)
    made = await asyncio.create_subprocess_exec(*argv)
    assert await made.wait() == 0
    async with monitor(socket) as qemu:
        file = {"driver": "file", "filename": overlay}
        await qemu.execute("blockdev-add", {"driver": "qcow2", "node-name": OVERLAY, "backing": None, "file": file})
        snapshot = {"type": "blockdev-snapshot", "data": {"node": node, "overlay": OVERLAY}}
        await qemu.execute("transaction", {"actions": [snapshot]})


async def commit(socket: str, base: str, top: str, overlay: str) -> None:
    """Merge the active layer into the one below, and remove its file."""
    async with monitor(socket) as qemu:
        with qemu.listener("JOB_STATUS_CHANGE") as events:
            comes = _waits(events)
            arguments = {"device": top, "top-node": top, "base-node": base, "on-error": "stop"}
            await qemu.execute("block-commit", {**_JOB, **arguments})
            await comes("ready")
            await qemu.execute("job-complete", {"id": "bare"})
            await comes("pending")
            await qemu.execute("job-finalize", {"id": "bare"})
            await comes("concluded")
        await _dismiss(qemu)
        await qemu.execute("blockdev-del", {"node-name": top})
    os.unlink(overlay)  # noqa: PTH108


async def stream(socket: str, base: str, top: str, image: str) -> None:
    """Merge the layer below into the active one, and remove its file."""
    async with monitor(socket) as qemu:
        with qemu.listener("JOB_STATUS_CHANGE") as events:
            comes = _waits(events)
            await qemu.execute("block-stream", {**_JOB, "device": top, "on-error": "stop"})
            await comes("pending")
            await qemu.execute("job-finalize", {"id": "bare"})
            await comes("concluded")
        await _dismiss(qemu)
        await qemu.execute("blockdev-del", {"node-name": base})
    os.unlink(image)  # noqa: PTH108


async def save(socket: str, node: str, tag: str) -> None:
    """Take an internal snapshot with memory."""
    await _internal(socket, "snapshot-save", {"tag": tag, "vmstate": node, "devices": [node]})


async def load(socket: str, node: str, tag: str) -> None:
    """Load it; a guest that ran runs on."""
    await _internal(socket, "snapshot-load", {"tag": tag, "vmstate": node, "devices": [node]})


async def delete(socket: str, node: str, tag: str) -> None:
    """Delete it."""
    await _internal(socket, "snapshot-delete", {"tag": tag, "devices": [node]})


async def _internal(socket: str, command: str, arguments: Mapping[str, Any]) -> None:
    async with monitor(socket) as qemu:
        with qemu.listener("JOB_STATUS_CHANGE") as events:
            comes = _waits(events)
            await qemu.execute(command, {"job-id": "bare", **arguments})
            await comes("concluded")
        await _dismiss(qemu)


_JOB = {"job-id": "bare", "auto-finalize": False, "auto-dismiss": False}


def _waits(events: Any) -> Callable[[str], Awaitable[None]]:
    async def comes(status: str) -> None:
        async for event in events:
            if event["data"] == {"id": "bare", "status": status}:
                return

    return comes


async def _dismiss(qemu: QMPClient) -> None:
    found: Any = await qemu.execute("query-jobs")
    assert not found[0].get("error"), found
    await qemu.execute("job-dismiss", {"id": "bare"})


if __name__ == "__main__":
    _SCRIPTS: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
        "commit": commit,
        "create": create,
        "stream": stream,
    }
    asyncio.run(_SCRIPTS[sys.argv[1]](*sys.argv[2:]))
