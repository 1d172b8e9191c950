"""A guest's TPM: swtpm, started for each QEMU and connected to it by a pair of sockets, with whose end it ends."""

import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from msgspec import Struct

from qmpsnap.errors import HostCannot
from qmpsnap.host import files
from qmpsnap.host.threads import to_end
from qmpsnap.machine.config import firmware_files
from qmpsnap.machine.starting import surroundings
from qmpsnap.machine.starting.privileges import Privileges

PROGRAM: Final = "swtpm"
DEADLINE: Final = 20.0
"""Seconds until it works in the background; it takes some hundredths."""
_QUOTED: Final = 300


class Emulator(Struct, frozen=True):
    """A running one: the descriptor that QEMU inherits, and its process."""

    connection: int
    pid: int


@asynccontextmanager
async def emulated(folder: Path | None, *, machine: str, rights: Privileges) -> AsyncIterator[Emulator | None]:
    """A TPM for a QEMU that inherits its connection, whose state is in the folder; None: no TPM.

    Raises:
        HostCannot: there is no swtpm, or it does not start, as on a damaged state.
        StateError: that of the machine's last QEMU has not ended.
    """
    if folder is None:
        yield None
        return
    program = shutil.which(PROGRAM)
    if program is None:
        raise HostCannot(
            f"machine {machine} has a TPM, and there is no {PROGRAM} on this host to emulate it",
            hint="apt-get install swtpm",
            machine=machine,
        )
    ours, its = socket.socketpair()
    with ours:
        with its:
            pid = await to_end(_begin, program, folder, its.fileno(), machine, rights)
        yield Emulator(connection=ours.fileno(), pid=pid)


def _begin(program: str, folder: Path, connection: int, machine: str, rights: Privileges) -> int:
    """Return its process once it works; it holds the folder's lock until it ends."""
    try:
        files.make_folder(folder)
        with firmware_files.tpm_held(folder) as lock:
            firmware_files.clear_leftovers(folder)
            inherited = f"/proc/self/fd/{lock}"  # whatever commas its path has
            argv = [program, "socket", "--tpm2", "--daemon", "--terminate", "--seccomp", "action=kill"]
            argv += ["--ctrl", f"type=unixio,clientfd={connection}", "--tpmstate", f"dir={inherited},mode=0600"]
            argv += ["--pid", f"file={inherited}/{firmware_files.PID}"]

            def call() -> "subprocess.CompletedProcess[bytes]":
                with surroundings.unblocked():
                    return subprocess.run(
                        argv,
                        check=False,
                        stdin=subprocess.DEVNULL,
                        capture_output=True,
                        timeout=DEADLINE,
                        env=surroundings.environment(os.environ),
                        start_new_session=True,
                        umask=0o077,
                        pass_fds=[connection, lock],
                        **rights.popen,
                    )

            done = rights.start(call, program)
        pid = 0 if done.returncode else int(files.read(folder / firmware_files.PID))
    except (OSError, ValueError) as error:
        raise HostCannot(f"the TPM of machine {machine} cannot be started: {error}", machine=machine) from error
    except subprocess.TimeoutExpired:
        raise HostCannot(f"{program} did not start within {DEADLINE:g} s", machine=machine) from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-_QUOTED:]
        raise HostCannot(
            f"the TPM of machine {machine} did not start: {said or f'{program} ended with {done.returncode}'}",
            hint=f"its state is in {folder}",
            machine=machine,
        )
    return pid
