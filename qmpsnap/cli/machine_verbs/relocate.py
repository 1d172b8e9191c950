"""``relocate``: a home that was moved, copied or put back from a backup goes on where it is."""

import argparse
from typing import TYPE_CHECKING

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_format, operating
from qmpsnap.errors import StoreMismatch

if TYPE_CHECKING:
    from qmpsnap.ops.base.relocate import Relocated

_FINE = ("recorded", "copy", "proven")


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add(parsers, "relocate", _relocate, help="let a moved, copied or restored home go on where it is")
    command.add_argument(
        "--accept-copies",
        action="store_true",
        help="take over files that are not the recorded ones and whose headers fit: whole copies of them",
    )
    command.add_argument("--dry-run", action="store_true", help="only compare every file with its record")
    add_format(command)


def _relocate(arguments: argparse.Namespace) -> int:
    from qmpsnap.ops.base import relocate

    done = operating(
        lambda context: relocate.run(context, accept_copies=arguments.accept_copies, dry_run=arguments.dry_run)
    )
    document = {
        "from": done.old,
        "to": done.new,
        "original": done.original,
        "files": [
            {"path": one.path, "what": one.what, "verdict": one.verdict, "compared": one.text} for one in done.compared
        ],
        "rewritten": list(done.rewritten),
        "done": done.done,
    }
    output.emit(
        arguments.output,
        document=document,
        names=[one.path for one in done.compared],
        table=lambda: output.table(
            ("FILE", "IS", "COMPARED"), [(one.path, one.verdict, one.text) for one in done.compared]
        ),
    )
    _tell(done)
    return 0 if all(one.verdict in _FINE for one in done.compared) else StoreMismatch.exit_code


def _tell(done: "Relocated") -> None:
    if done.original:
        output.note(f"this home is a copy of {done.original}, which stays as it is")
    if done.done:
        output.note(f"{len(done.rewritten)} header(s) rewritten; the home is {done.new} from now on")
    elif done.old != done.new or done.rewritten or any(one.verdict in ("copy", "proven") for one in done.compared):
        output.note("nothing was changed; qmpsnap relocate does it, with --accept-copies where files are copies")
    else:
        output.note(f"the home is {done.new}, as it is recorded: nothing to do")
