"""Commands of the human monitor, through QMP's ``human-monitor-command``: it answers with text for people."""

from typing import Any

from qmpsnap.errors import QmpError
from qmpsnap.qmp.session import COMMAND_DEADLINE, Monitor


def command(line: str) -> tuple[str, dict[str, Any]]:
    """The QMP command that sends a line."""
    return "human-monitor-command", {"command-line": line}


async def execute(monitor: Monitor, line: str, *, deadline: float = COMMAND_DEADLINE) -> None:
    """Run a command that says nothing unless it fails.

    Raises:
        QmpError: what it said.
    """
    if said := str(await monitor.execute(*command(line), deadline=deadline)).strip():
        name, _, _ = line.partition(" ")
        raise QmpError(f"QEMU's {name} failed: {said}")
