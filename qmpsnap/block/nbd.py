"""Asking whether an NBD server is there, before QEMU connects: QEMU's own attempt would block the guest."""

import anyio
from anyio.abc import ByteStream

from qmpsnap.errors import HostCannot
from qmpsnap.model.machines.nbd import NbdExport

_MAGIC = b"NBDMAGIC"


async def require_server(export: NbdExport, *, deadline: float = 5.0) -> None:
    """Make sure that an NBD server answers there."""
    try:
        with anyio.fail_after(deadline):
            stream: ByteStream
            if export.socket:
                stream = await anyio.connect_unix(export.socket)
            else:
                stream = await anyio.connect_tcp(export.host or "", export.port)
            async with stream:
                said = b""
                while len(said) < len(_MAGIC):
                    said += await stream.receive(len(_MAGIC) - len(said))
    except (OSError, TimeoutError, anyio.EndOfStream, anyio.BrokenResourceError) as error:
        why = f"no greeting within {deadline:g} s" if isinstance(error, TimeoutError) else str(error) or "it hung up"
        raise _refused(export, why) from error
    if said != _MAGIC:
        raise _refused(export, "the peer is not an NBD server")


def _refused(export: NbdExport, why: str) -> HostCannot:
    return HostCannot(
        f"no NBD server answers for {export.uri}: {why}",
        hint="start the server: qemu-nbd --socket PATH --format raw --export-name NAME IMAGE",
    )
