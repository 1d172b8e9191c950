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
    command = add(parsers, "relocate", _relocate, help="accept the new place of a moved, copied or restored home")
    command.add_argument(
        "--accept-copies",
        action="store_true",
        help="accept complete copies of recorded files, judged by their headers",
    )
    command.add_argument("--dry-run", action="store_true", help="only compare the files with their records")
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
        output.note(f"this home is a copy of {done.original}, which is not changed")
    if done.done:
        output.note(f"{len(done.rewritten)} header(s) rewritten; the home is {done.new} from now on")
    elif done.old != done.new or done.rewritten or any(one.verdict in ("copy", "proven") for one in done.compared):
        output.note("nothing was changed; run qmpsnap relocate, with --accept-copies if files are copies")
    else:
        output.note(f"the home {done.new} is where it was recorded: nothing to do")
