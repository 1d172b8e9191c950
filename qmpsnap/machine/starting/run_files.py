"""What QEMU makes in a machine's run folder, by name."""

QMP_SOCKET = "qmp.sock"
"""Our monitor. A QMP socket serves one client, so users have their own."""
USER_SOCKET = "user.sock"
"""The user's monitor."""
CONSOLE_SOCKET = "console.sock"
CONSOLE_LOG = "console.log"
AGENT_SOCKET = "agent.sock"
VNC_SOCKET = "vnc.sock"
PID_FILE = "qemu.pid"
RUN_FILES = (QMP_SOCKET, USER_SOCKET, CONSOLE_SOCKET, CONSOLE_LOG, AGENT_SOCKET, VNC_SOCKET, PID_FILE)
"""All of it; the console's log only where no folder of logs is given."""
