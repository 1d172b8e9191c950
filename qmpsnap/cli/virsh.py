"""Words of others, virsh's above all: those that change nothing are accepted, the others answered with ours."""

import argparse
import re
from collections.abc import Iterable
from typing import Final

HARMLESS: Final = {
    "blockcommit": ("--wait", "--verbose", "--active", "--pivot"),
    "blockpull": ("--wait", "--verbose"),
    "blockcopy": ("--wait", "--verbose", "--transient-job"),
    "blockresize": ("--bytes",),
}
"""Options of virsh that ask for what always is so here, by the commands that have virsh's name."""

VERBS: Final = {
    "snapshot-create": "snapshot create VM NAME",
    "snapshot-create-as": "snapshot create VM NAME",
    "snapshot-list": "snapshot list VM, or tree VM",
    "snapshot-info": "snapshot show VM NAME",
    "snapshot-dumpxml": "snapshot show VM NAME -o json",
    "snapshot-current": "snapshot list VM",
    "snapshot-parent": "tree VM",
    "snapshot-edit": "snapshot describe VM NAME, or snapshot rename VM NAME NEW",
    "snapshot-revert": "snapshot revert VM NAME",
    "snapshot-delete": "snapshot delete VM NAME",
    "blockjob": "job list VM, job cancel VM, or job set-speed VM BYTES",
    "domjobinfo": "job list VM",
    "domjobabort": "job cancel VM",
    "domblklist": "chain VM",
    "domblkinfo": "chain VM",
    "domblkstat": "job list VM",
    "dominfo": "show VM",
    "domstate": "show VM",
    "dumpxml": "show VM -o json, or edit VM",
    "domrename": "rename VM NEW",
    "domfstrim": "fstrim VM",
    "domfsfreeze": "snapshot create VM --quiesce require",
    "domfsthaw": "snapshot create VM --quiesce require",
    "create": "define SPEC, then start VM",
    "shutdown": "stop VM",
    "destroy": "stop VM --force",
    "suspend": "pause VM",
    "dompmwakeup": "wakeup VM",
    "managedsave": "save VM",
    "setmem": "set VM memory=4G",
    "setmaxmem": "set VM memory=4G",
    "setvcpus": "set VM cpus=2",
    "qemu-agent-command": "exec VM -- PROGRAM",
    "attach-disk": "disk attach VM FILE",
    "detach-disk": "disk detach VM DISK",
}
"""virsh's commands that have another name here."""

SHORT: Final = {
    "revert": "snapshot revert VM NAME",
    "delete": "snapshot delete VM NAME",
    "attach": "disk attach VM FILE",
    "detach": "disk detach VM DISK",
    "export": "machine export VM --to FILE",
}
"""Verbs that are typed without the noun before them."""

OPTIONS: Final = {
    "--active": "leave it out: a commit goes from the active layer down unless --top names a lower one",
    "--async": "--detach",
    "--atomic": "leave it out: a snapshot of several disks always is of one instant, or of none",
    "--buf-size": "leave it out",
    "--bytes": "leave it out: a number without a unit is bytes",
    "--capacity": "name the size, as 20G",
    "--delete": "leave it out: images that nothing needs any more are removed, if they are qmpsnap's",
    "--description": "-m TEXT",
    "--dest": "name the path of the copy behind the disk",
    "--diskspec": "--disks for some of the disks, --file DISK=PATH for the place of an overlay",
    "--disk-only": "leave it out: a snapshot is of the disks alone unless --kind says otherwise",
    "--domain": "name the machine without an option",
    "--granularity": "leave it out",
    "--halt": "save VM keeps the memory and ends QEMU",
    "--keep-overlay": "take a snapshot after the commit",
    "--keep-relative": "leave it out: headers name backing files by absolute paths",
    "--live": "leave it out: --kind full keeps the guest running where QEMU can",
    "--memspec": "--kind full",
    "--no-metadata": "--no-snapshot",
    "--persistent": "leave it out",
    "--pivot": "leave it out: the guest always goes over to the layer that is merged into",
    "--raw": "--format raw",
    "--reuse-external": "--reuse",
    "--shallow": "--base names the layer to stop at",
    "--snapshotname": "name the snapshot behind the machine, without an option",
    "--snapshots-metadata": "leave it out: undefine removes the records of snapshots",
    "--remove-all-storage": "--remove-disks",
    "--synchronous-writes": "--blocking",
    "--timeout": "timeout 60 qmpsnap ... cancels the command after that many seconds",
    "--verbose": "--progress plain",
    "--wait": "leave it out: every command waits for its job",
}
"""virsh's options that commands here do not have."""

_UNKNOWN: Final = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)


def add_harmless(command: argparse.ArgumentParser, name: str) -> None:
    """Accept what virsh's command of that name has, and what always is so here; nothing for a name of ours."""
    if options := HARMLESS.get(name):
        command.add_argument(*options, action="store_true", dest="virsh", help="as for virsh; this is always so")


def answer(word: str, known: Iterable[str]) -> str:
    """What a command of virsh, or one without its noun, is called here; empty if it is none that is chosen from."""
    if (ours := VERBS.get(word)) and ours.split()[0] in known:
        return f"virsh's {word} is qmpsnap {ours}"
    if (ours := SHORT.get(word)) and ours.split()[0] in known:
        return f"it is qmpsnap {ours}"
    return ""


def answers(message: str) -> str:
    """What virsh's options are called here that argparse complains about; empty if there are none."""
    found = _UNKNOWN.search(message)
    options = [word.partition("=")[0] for word in found[1].split()] if found else []
    return "; ".join(f"for virsh's {option}: {OPTIONS[option]}" for option in options if option in OPTIONS)
