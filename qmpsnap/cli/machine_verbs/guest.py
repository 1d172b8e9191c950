"""What runs in the guest: console, exec, fstrim."""

import argparse
import sys

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, amount, home, on_machine, reading
from qmpsnap.errors import HostCannot, QemuGone
from qmpsnap.machine.starting.run_files import CONSOLE_SOCKET


def register(parsers: Parsers) -> None:
    """Add the commands."""
    add_for_vm(parsers, "console", _console, help="attach the terminal to the serial console (Ctrl-] detaches)")

    command = add_for_vm(parsers, "exec", _exec, help="run a command in the guest through the guest agent")
    command.add_argument("--timeout", type=amount, default=60, metavar="S", help="seconds to wait for it (60)")
    command.add_argument(
        "--allow-truncated",
        action="store_true",
        help="accept output truncated to the agent's 16 MiB of stdout and of stderr",
    )
    command.add_argument(
        "--stream", action="store_true", help="print the output as it comes, all of it; needs a shell in the guest"
    )
    command.add_argument("-i", "--stdin", action="store_true", help="pass standard input on to the command")
    command.add_argument(
        "--env", action="append", type=_variable, default=[], metavar="NAME=VALUE", help="set a variable of the command"
    )
    command.add_argument("--cwd", metavar="DIR", help="folder in the guest to run the command in")
    command.add_argument(
        "--wait",
        type=amount,
        metavar="S",
        help="seconds to wait for an agent that does not run (1; while the guest boots, --timeout)",
    )
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="program and arguments")

    command = add_for_vm(parsers, "fstrim", _fstrim, help="let the guest discard the unused blocks of its file systems")
    command.add_argument("--minimum", type=int, default=0, metavar="BYTES", help="skip free ranges smaller than this")
    command.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds to wait for it (60)")
    add_format(command)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not NAME=VALUE")
    return name, value


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
        hint = "use the console that it was launched with" if machine.adopted else f"qmpsnap start {machine.name}"
        raise QemuGone(f"machine {machine.name} has no console", hint=hint, machine=machine.name) from error
    logs.bound(home(), machine.name)
    with endpoint:
        console.attach(endpoint, terminal_in=sys.stdin.fileno(), terminal_out=sys.stdout.fileno())


def _exec(arguments: argparse.Namespace) -> int:
    from qmpsnap.errors import UsageError

    if arguments.command and arguments.command[0].startswith("-") and arguments.command[0] != "--":
        # All that stands behind VM is the command's: an option there would be run in the guest.
        raise UsageError(
            f"option {arguments.command[0]} follows VM, where the command begins",
            hint="write options first: qmpsnap exec --timeout 5 VM -- CMD",
        )
    words = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not words:
        raise UsageError("there is no command to run", hint=f"as in qmpsnap exec {arguments.machine} -- uname -r")

    stdin = _stdin() if arguments.stdin else b""
    done = on_machine(
        arguments.machine,
        lambda vm: vm.run(
            words,
            timeout=arguments.timeout,
            encoding=None,
            check=False,
            allow_truncated=True,
            stdin=stdin,
            env=dict(arguments.env),
            cwd=arguments.cwd,
            wait=arguments.wait,
            output=_pass_on if arguments.stream else None,
        ),
    )
    try:
        output.pass_on(done.stdout, done.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostCannot(
            f"the command ended with exit status {done.exit_status} in the guest of {arguments.machine}, but its output"
            f" cannot be written: {error.strerror}",
            hint="free some space for the output, or redirect it",
            effect="applied",
            machine=arguments.machine,
        ) from error
    if not arguments.allow_truncated:
        done.require_whole(arguments.machine)
    return int(done.exit_status)


def _pass_on(stream: str, part: bytes) -> None:
    """Print what a command says that runs on."""
    try:
        output.pass_on(*((part, b"") if stream == "stdout" else (b"", part)))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostCannot(
            f"the command runs in the guest, but its output cannot be written: {error.strerror}",
            hint="free some space for the output, or redirect it",
            effect="unknown",
        ) from error


def _stdin() -> bytes:
    """All of standard input, but no more than can be refused for its length."""
    from qmpsnap.machine.agent import STDIN_LIMIT

    if sys.stdin is None:  # closed as we were started
        return b""
    try:
        return sys.stdin.buffer.read(STDIN_LIMIT + 1)
    except OSError as error:
        raise HostCannot(f"standard input cannot be read: {error.strerror}", hint="redirect it") from error


def _fstrim(arguments: argparse.Namespace) -> None:
    found = on_machine(arguments.machine, lambda vm: vm.fstrim(minimum=arguments.minimum, timeout=arguments.timeout))
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
