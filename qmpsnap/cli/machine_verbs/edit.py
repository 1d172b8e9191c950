"""``edit``: a machine's spec in the user's editor, then as ``define --update``."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, home, on_machine, reading
from qmpsnap.cli.machine_verbs.change import lines_of, print_change, tell_misfits
from qmpsnap.errors import HostCannot, QmpsnapError

if TYPE_CHECKING:
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.model.machines.spec import MachineSpec
    from qmpsnap.ops.lifecycle.change import Changed

HEAD = """\
# The spec of machine {name}. Save it and leave the editor: the changes are shown before they are made.
# Keys that are not here have their defaults. If you leave the text as it is, nothing is changed.
"""


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add_for_vm(parsers, "edit", _edit, help="edit the spec of a stopped machine in $VISUAL or $EDITOR")
    command.add_argument("--allow-extra", action="store_true", help="accept the spec's 'extra' QEMU arguments")
    command.add_argument("--yes", action="store_true", help="do not ask on a terminal before the change is made")
    command.add_argument("--dry-run", action="store_true", help="only print what would change")
    add_format(command)


def _edit(arguments: argparse.Namespace) -> None:
    from qmpsnap.imports import spec_text
    from qmpsnap.ops.base.context import require_spec

    name = arguments.machine
    with reading() as store:
        machine = store.machine(name)
    require_spec(machine, "edit that")
    before = HEAD.format(name=name) + spec_text.of(machine.spec)
    path = _file(name, before)
    try:
        after = _edited(path)
        if after == before:
            output.note(f"the spec of machine {name} was left as it is; nothing was changed")
        else:
            _apply(arguments, _parsed(after, path))
    except QmpsnapError:
        if _was_edited(path, before):
            output.note(f"the edited text is kept in {path}")
        else:
            _remove(path)
        raise
    _remove(path)


def _was_edited(path: Path, before: str) -> bool:
    try:
        return path.read_bytes() != before.encode()
    except OSError:  # by its editor
        return True


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.rmdir()


def _file(name: str, text: str) -> Path:
    import tempfile

    try:
        path = Path(tempfile.mkdtemp(prefix="qmpsnap-edit-")) / f"{name}.yaml"  # a folder of this user alone
        path.write_text(text)
    except OSError as error:
        raise HostCannot(f"there is no place for the text to edit: {error.strerror}", hint="set TMPDIR") from error
    return path


def _edited(path: Path) -> str:
    """The text as the editor leaves it. A Ctrl-C in there is the editor's."""
    import subprocess

    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    before = signal.signal(signal.SIGINT, lambda *_: None)  # unlike an ignored signal, it is the child's to heed
    try:
        done = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise HostCannot(f"the editor {editor!r} cannot be started: {why}", hint="set EDITOR") from error
    finally:
        signal.signal(signal.SIGINT, before)
    if done:
        raise HostCannot(f"the editor {editor!r} failed: exit code {done}", hint="set EDITOR to another")
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HostCannot(f"the edited text {path} cannot be read: {error}") from error


def _parsed(text: str, path: Path) -> "MachineSpec":
    from qmpsnap.machine.config import specfile
    from qmpsnap.machine.config.launch_dir import launch_dir

    folder = Path.cwd()  # where relative paths begin, as nobody chose the file's own
    return specfile.parse(text, str(path), folder=folder, guest_dir=home().guest, profile_dir=launch_dir() / "profiles")


def _apply(arguments: argparse.Namespace, spec: "MachineSpec") -> None:
    async def act(vm: "MachineHandle") -> "tuple[Changed, tuple[str, ...] | None]":
        plan = await vm.plan_set(spec, allow_extra=arguments.allow_extra)
        if arguments.dry_run or not plan.details.changes:
            return plan.details, None
        output.note("\n".join([f"this would change machine {arguments.machine}:", *lines_of(plan.details)]))
        if not arguments.yes and sys.stdin.isatty() and not _agreed():
            return plan.details, None
        return await vm.apply(plan), await vm.misfits()

    found, misfits = on_machine(arguments.machine, act)
    print_change(arguments, found, dry=misfits is None)
    tell_misfits(misfits or ())


def _agreed() -> bool:
    output.aside("change it? [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
