"""Jobs: what an interrupted commit, stream, delete or mirror still has at work, to wait for or to cancel."""

import argparse
from typing import Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, on_machine
from qmpsnap.cli.progress import add_progress, reporting


def register(parsers: Parsers) -> None:
    """Add the commands."""
    noun = parsers.add_parser("job", help="jobs in QEMU: list, wait, cancel", description="Jobs in QEMU.")
    verbs = noun.add_subparsers(title="verbs", metavar="VERB", required=True)
    command = add_for_vm(verbs, "list", _list, help="list the jobs of a machine with state and progress")
    add_format(command)
    command = add_for_vm(verbs, "wait", _wait, help="wait for the jobs of an interrupted operation")
    add_progress(command)
    add_for_vm(verbs, "cancel", _cancel, help="cancel the jobs of an interrupted operation; the chain is unchanged")


def _list(arguments: argparse.Namespace) -> None:
    jobs: list[dict[str, Any]] = [
        {
            "job": job.id,
            "type": job.type,
            "state": job.status,
            "bytes": job.current_progress,
            "total": job.total_progress,
            "error": job.error,
        }
        for job in on_machine(arguments.machine, lambda vm: vm.jobs())
    ]
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "jobs": jobs},
        names=[str(job["job"]) for job in jobs],
        table=lambda: output.table(
            ("JOB", "TYPE", "STATE", "DONE", "TOTAL"),
            [(j["job"], j["type"], j["state"], output.size(j["bytes"]), output.size(j["total"])) for j in jobs],
        ),
    )


def _wait(arguments: argparse.Namespace) -> None:
    with reporting(arguments.progress) as report:
        operations = on_machine(arguments.machine, lambda vm: vm.wait(report=report))
    _tell(arguments.machine, operations, "is complete")


def _cancel(arguments: argparse.Namespace) -> None:
    operations = on_machine(arguments.machine, lambda vm: vm.cancel())
    _tell(arguments.machine, operations, "is cancelled; its chain is unchanged")


def _tell(machine: str, operations: Any, what: str) -> None:
    for operation in operations:
        output.note(f"{machine}: operation {operation.id} ({operation.verb}) {what}")
    if not operations:
        output.note(f"{machine}: no operation was open")
