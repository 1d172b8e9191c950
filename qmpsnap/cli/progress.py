"""Progress of jobs on stderr: a bar on a terminal, lines elsewhere, objects when asked; or none, in the background."""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, TextIO, cast

from qmpsnap.cli import output, supervised
from qmpsnap.hint import call

if TYPE_CHECKING:
    from qmpsnap.qmp.commands import JobInfo
    from qmpsnap.qmp.jobs import Report

Mode = Literal["auto", "tty", "plain", "json", "none"]

PLAIN_SECONDS = 5.0
"""Seconds between two lines of plain progress; changes of state are told at once."""

_AT_WORK: Final = frozenset({"running", "ready", "pending"})
"""States (QAPI ``JobStatus``) of a job that QEMU has begun."""


def add_progress(parser: argparse.ArgumentParser) -> None:
    """``--progress``, for every command that runs jobs."""
    parser.add_argument(
        "--progress",
        choices=("auto", "tty", "plain", "json", "none"),
        default="auto",
        help="progress format on stderr",
    )


def add_detach(parser: argparse.ArgumentParser) -> None:
    """``--detach``, for the commands of one machine whose block jobs may take hours."""
    parser.add_argument(
        "--detach", action="store_true", help="return as soon as the job runs, and see it to its end in the background"
    )


@contextmanager
def reporting(arguments: argparse.Namespace) -> Iterator["Report"]:
    """Something to tell about jobs, for the length of the block."""
    mode: Mode = arguments.progress
    if getattr(arguments, "detach", False):
        yield _Detaching(arguments.machine, arguments.output)
        return
    if mode == "auto":
        mode = "tty" if sys.stderr.isatty() else "plain"
    if mode == "none":
        yield lambda _: None
    elif mode == "json":
        yield _report_json
    elif mode == "plain":
        yield _Plain()
    else:
        with _bar() as report:
            yield report


def _report_json(job: "JobInfo") -> None:
    told = {"job": job.id, "type": job.type, "state": job.status}
    figures = {"bytes": job.current_progress, "total": job.total_progress}
    output.aside(json.dumps({"schema": output.SCHEMA, **told, **figures}) + "\n")


class _Detaching:
    """Leaves the job to this process alone once it runs, and lets the command end."""

    def __init__(self, machine: str, form: "output.Format") -> None:
        self._machine, self._form = machine, form
        self._left = False

    def __call__(self, job: "JobInfo") -> None:
        if self._left or job.status not in _AT_WORK:
            return
        self._left = True
        text = f"job {job.id} ({job.type}) of machine {self._machine} goes on in process {os.getpid()}"
        output.emit(
            self._form,
            document={"machine": self._machine, "job": job.id, "type": job.type, "process": os.getpid()},
            names=[job.id],
            table=lambda: text,
            done=text,
        )
        output.hint(call("wait", self._machine))
        supervised.leave()


class _Plain:
    def __init__(self) -> None:
        self._state = ""
        self._told = 0.0
        self._begun = time.monotonic()

    def __call__(self, job: "JobInfo") -> None:
        now = time.monotonic()
        if job.status == self._state and now - self._told < PLAIN_SECONDS:
            return
        self._state, self._told = job.status, now
        rate = job.current_progress / max(now - self._begun, 0.001)
        amount = f"{output.size(job.current_progress)} of {output.size(job.total_progress)}"
        left = (job.total_progress - job.current_progress) / rate if rate else 0
        eta = f", {left:.0f} s left" if job.status == "running" and left >= 1 else ""
        output.note(f"{job.id} {job.type}: {job.status}, {amount}, {output.size(int(rate))}/s{eta}")


class _Terminal(io.TextIOBase):
    """Stderr for rich, which draws in a thread of its own and would have it all end there once the terminal is gone."""

    encoding = property(lambda _: getattr(sys.stderr, "encoding", "utf-8"))

    def write(self, text: str) -> int:
        output.aside(text)
        return len(text)

    def isatty(self) -> bool:
        return sys.stderr.isatty()


@contextmanager
def _bar() -> Iterator["Report"]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(file=cast(TextIO, _Terminal()))) as progress:

        def report(job: "JobInfo") -> None:
            if job.id not in tasks:
                tasks[job.id] = progress.add_task(job.id)
            progress.update(
                tasks[job.id],
                description=f"{job.id} {job.type} {job.status}",
                completed=job.current_progress,
                total=max(job.total_progress, 1),
            )

        yield report
