"""Jobs: what a commit, stream, delete or mirror has at work, to look at, wait for, slow down or cancel."""

import argparse
from typing import Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, bandwidth, on_machine
from qmpsnap.cli.progress import add_progress, reporting
from qmpsnap.errors import QmpError


def register(parsers: Parsers) -> None:
    """Add the commands."""
    noun = parsers.add_parser("job", help="jobs in QEMU: list, wait, cancel, set-speed", description="Jobs in QEMU.")
    verbs = noun.add_subparsers(title="verbs", metavar="VERB", required=True)
    command = add_for_vm(verbs, "list", _list, help="list the jobs of a machine, their progress and who waits for them")
    add_format(command)
    command = add_for_vm(verbs, "wait", _wait, help="wait for the jobs of an operation, also of one at work")
    add_progress(command)
    add_for_vm(verbs, "cancel", _cancel, help="cancel the jobs of an operation, also of one at work; the chain stays")
    command = add_for_vm(verbs, "set-speed", _set_speed, help="limit what the jobs of an operation copy per second")
    command.add_argument("bandwidth", type=bandwidth, metavar="BYTES", help="bytes per second, as in 50M; 0: no limit")


def _list(arguments: argparse.Namespace) -> None:
    jobs: list[dict[str, Any]] = [
        {
            "job": job.id,
            "type": job.type,
            "state": job.status,
            "bytes": job.current_progress,
            "total": job.total_progress,
            "error": job.error,
            "place": job.place,
            "operation": None if job.operation is None else str(job.operation),
            "verb": job.verb or None,
            "waiting": job.waiting,
            "limit": job.limit,
            "rate": None if job.rate is None else round(job.rate),
            "left": None if job.left is None else round(job.left, 1),
        }
        for job in on_machine(arguments.machine, lambda vm: vm.jobs())
    ]
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "jobs": jobs},
        names=[str(job["job"]) for job in jobs],
        table=lambda: output.table(
            ("JOB", "TYPE", "STATE", "DONE", "TOTAL", "RATE", "LEFT", "LIMIT", "WAITING"), [_row(job) for job in jobs]
        ),
    )


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    return (
        job["job"],
        job["type"],
        job["state"],
        output.size(job["bytes"]),
        output.size(job["total"]),
        "-" if job["rate"] is None else f"{output.size(job['rate'])}/s",
        "-" if job["left"] is None else f"{job['left']:.0f} s",
        f"{output.size(job['limit'])}/s" if job["limit"] else "-",
        job["waiting"] or "-",
    )


def _wait(arguments: argparse.Namespace) -> None:
    with reporting(arguments) as report:
        operations = on_machine(arguments.machine, lambda vm: vm.wait(report=report))
    failed = [operation for operation in operations if operation.state == "failed"]
    _tell(arguments.machine, [operation for operation in operations if operation not in failed], "is complete")
    if failed:  # another command was at it
        raise QmpError(
            f"operation {failed[0].id} ({failed[0].verb}) has failed: {failed[0].error or 'it was undone'}",
            machine=arguments.machine,
        )


def _cancel(arguments: argparse.Namespace) -> None:
    operations = on_machine(arguments.machine, lambda vm: vm.cancel())
    settled = [operation for operation in operations if operation.state == "settled"]
    if settled:
        _tell(arguments.machine, settled, "was complete before its job could be cancelled")
    if len(settled) < len(operations) or not operations:
        rest = [operation for operation in operations if operation not in settled]
        _tell(arguments.machine, rest, "is cancelled; its chain is unchanged")


def _set_speed(arguments: argparse.Namespace) -> None:
    limit = arguments.bandwidth
    for job in on_machine(arguments.machine, lambda vm: vm.set_speed(limit)):
        output.note(
            f"{arguments.machine}: job {job} copies "
            + (f"at most {output.size(limit)}/s" if limit else "without limit")
        )


def _tell(machine: str, operations: Any, what: str) -> None:
    for operation in operations:
        output.note(f"{machine}: operation {operation.id} ({operation.verb}) {what}")
    if not operations:
        output.note(f"{machine}: no operation was open")
