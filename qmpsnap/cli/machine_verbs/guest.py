"""What runs in the guest: console, exec, fstrim."""

import argparse
import sys

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_format, add_machine, amount, home, on_machine, reading
from qmpsnap.errors import HostCannot, QemuGone
from qmpsnap.machine.starting.argv import CONSOLE_SOCKET


def register(parsers: Parsers) -> None:
    """Add the commands."""
    add_machine(add(parsers, "console", _console, help="attach the terminal to the serial console (Ctrl-] leaves)"))

    command = add(parsers, "exec", _exec, help="run a command in the guest through its agent")
    add_machine(command)
    command.add_argument("--timeout", type=amount, default=60, metavar="S", help="seconds to wait for its end (60)")
    command.add_argument(
        "--allow-truncated", action="store_true", help="take what the agent keeps, 16 MiB of stdout and of stderr"
    )
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="program and arguments")

    command = add(parsers, "fstrim", _fstrim, help="let the guest give its disks back what its file systems do not use")
    add_machine(command)
    command.add_argument("--minimum", type=int, default=0, metavar="BYTES", help="leave free ranges smaller than this")
    command.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds to wait for its end (60)")
    add_format(command)


def _console(arguments: argparse.Namespace) -> None:
    import anyio

    from qmpsnap.machine import console
    from qmpsnap.machine.starting import logs
    from qmpsnap.qmp.dial import dial

    with reading() as store:
        machine = store.machine(arguments.machine)
    try:
        endpoint = anyio.run(dial, home().run_dir(machine.name) / CONSOLE_SOCKET)
    except OSError as error:
        hint = "its console is its launcher's" if machine.adopted else f"qmpsnap start {machine.name}"
        raise QemuGone(f"machine {machine.name} has no console now", hint=hint, machine=machine.name) from error
    logs.bound(home(), machine.name)
    with endpoint:
        console.attach(endpoint, terminal_in=sys.stdin.fileno(), terminal_out=sys.stdout.fileno())


def _exec(arguments: argparse.Namespace) -> int:
    from qmpsnap.errors import UsageError

    if arguments.command and arguments.command[0].startswith("-") and arguments.command[0] != "--":
        # All that stands behind VM is the command's: an option there would be run in the guest.
        raise UsageError(
            f"option {arguments.command[0]} stands behind VM, where the command begins",
            hint="options first, as in: qmpsnap exec --timeout 5 VM -- CMD",
        )
    words = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not words:
        raise UsageError("there is no command to run", hint=f"qmpsnap exec {arguments.machine} -- uname -r")

    done = on_machine(
        arguments.machine,
        lambda vm: vm.run(words, deadline=arguments.timeout, check=False, allow_truncated=True),
    )
    try:
        output.pass_on(done.stdout, done.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostCannot(
            f"the command has ended with status {done.status} in the guest of {arguments.machine}, and what it said"
            f" cannot be written: {error.strerror}",
            hint="make room where the output goes, or send it elsewhere",
            effect="applied",
            machine=arguments.machine,
        ) from error
    if not arguments.allow_truncated:
        done.require_whole(arguments.machine)
    return int(done.status)


def _fstrim(arguments: argparse.Namespace) -> None:
    found = on_machine(arguments.machine, lambda vm: vm.fstrim(minimum=arguments.minimum, deadline=arguments.timeout))
    systems = [{"path": one.path, "trimmed": one.trimmed, "error": one.error} for one in found]
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "file_systems": systems},
        names=[one.path for one in found],
        table=lambda: output.table(
            ("FILE SYSTEM", "TRIMMED"),
            [(one.path, one.error or output.size(one.trimmed or 0)) for one in found],
        ),
        done=f"the guest of {arguments.machine} has trimmed {', '.join(one.path for one in found) or 'nothing'}",
    )
