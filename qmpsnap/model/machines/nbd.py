"""Exports of NBD servers, as users name them by URI and as QEMU opens them."""

from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

from msgspec import Struct

from qmpsnap.errors import UsageError
from qmpsnap.model.names import NodeName

DEFAULT_PORT = 10809
SCHEMES = ("nbd://", "nbd+unix://")


class NbdExport(Struct, frozen=True, kw_only=True):
    """One export of an NBD server, reached over TCP (``host``) or a socket; the server's default has no name."""

    uri: str
    host: str | None = None
    port: int = DEFAULT_PORT
    socket: str | None = None
    name: str = ""

    def options(self, node: NodeName) -> dict[str, Any]:
        """Options of its node (QAPI ``BlockdevOptionsNbd``), JSON-ready."""
        server: dict[str, str | None]
        if self.socket:
            server = {"type": "unix", "path": self.socket}
        else:
            server = {"type": "inet", "host": self.host, "port": str(self.port)}
        return {"node-name": node, "driver": "nbd", "server": server, "export": self.name, "read-only": False}


def is_uri(text: str) -> bool:
    """Whether a target is an NBD export's URI rather than a path."""
    return text.startswith(SCHEMES)


def parse(uri: str) -> NbdExport:
    """The export that ``nbd://host[:port]/name`` or ``nbd+unix:///name?socket=PATH`` names."""
    try:
        parts = urlsplit(uri)
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
        port = parts.port or DEFAULT_PORT
    except ValueError:
        _refuse(uri)
    name = unquote(parts.path.removeprefix("/"))
    if parts.username or parts.password or parts.fragment:
        _refuse(uri)
    if parts.scheme == "nbd":
        if not parts.hostname or query:
            _refuse(uri)
        return NbdExport(uri=uri, host=parts.hostname, port=port, name=name)
    sockets = query.pop("socket", [])
    if len(sockets) != 1 or not sockets[0].startswith("/") or query or parts.netloc:
        _refuse(uri)
    return NbdExport(uri=uri, socket=sockets[0], name=name)


def _refuse(uri: str) -> NoReturn:
    raise UsageError(
        f"{uri!r} is not the URI of an NBD export",
        hint="write nbd://host:port/export, or nbd+unix:///export?socket=/absolute/path",
    )
