"""Mistakes that the product does not make: with any of them the faults must find violations."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qmpsnap.block.image import create as image
from qmpsnap.model.operations import steps
from qmpsnap.model.planning import merging as rules
from qmpsnap.ops.jobs import cutover
from qmpsnap.ops.jobs.blockjob import BlockJob
from qmpsnap.ops.merge import job, preflight
from qmpsnap.ops.snapshot import create
from qmpsnap.ops.snapshot.create import _Attempt
from qmpsnap.qmp import commands, jobs

VARIABLE = "QMPSNAP_MUTANT"

Patch = pytest.MonkeyPatch


def _an_overlay_is_not_written_out(patch: Patch) -> None:
    patch.setattr(image._Claim, "_settle", lambda _, made: made)


def _a_result_is_not_flushed_before_it_counts(patch: Patch) -> None:
    async def control(qemu: Any, command: Any) -> None:
        if command != "stop":
            await commands.control(qemu, command)

    patch.setattr(cutover, "commands", SimpleNamespace(query_status=commands.query_status, control=control))


def _qemu_hears_of_a_snapshot_before_the_journal(patch: Patch) -> None:
    transact = _Attempt.transact

    async def marked(self: _Attempt, layers: Any) -> None:
        """Too early."""

    async def transacted(self: _Attempt, qemu: Any) -> None:
        await transact(self, qemu)
        await self.mark(steps.TRANSACTION)

    patch.setattr(create._Attempt, "mark_opened", marked)
    patch.setattr(create._Attempt, "transact", transacted)


def _qemu_hears_of_a_merge_before_the_journal(patch: Patch) -> None:
    mark, record = BlockJob.mark, BlockJob.record

    async def marked(self: BlockJob, phase: str, *, running: bool = False) -> None:
        if phase != steps.FINALIZING:
            await mark(self, phase, running=running)

    async def recorded(self: BlockJob, change: Any, *, running: bool) -> None:
        await mark(self, steps.FINALIZING)
        await record(self, change, running=running)

    patch.setattr(BlockJob, "mark", marked)
    patch.setattr(BlockJob, "record", recorded)


def _qemu_dismisses_jobs_by_itself(patch: Patch) -> None:
    patch.setitem(jobs._COMMON, "auto-dismiss", True)


def _nobody_looks_who_reads_a_layer(patch: Patch) -> None:
    patch.setattr(rules, "_refuse_readers", lambda *_: None)


def _a_file_is_removed_whatever_it_is(patch: Patch) -> None:
    patch.setattr(image, "same_file", lambda *_, **__: True)


def _nobody_looks_where_a_name_leads(patch: Patch) -> None:
    for module in (job, preflight):
        patch.setattr(module, "require_recorded", lambda *_, **__: None)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "a removed fsync": _an_overlay_is_not_written_out,
    "a removed flush": _a_result_is_not_flushed_before_it_counts,
    "swapped steps of a snapshot": _qemu_hears_of_a_snapshot_before_the_journal,
    "swapped steps of a merge": _qemu_hears_of_a_merge_before_the_journal,
    "auto-dismiss on": _qemu_dismisses_jobs_by_itself,
    "the reference check off": _nobody_looks_who_reads_a_layer,
    "removal without a look": _a_file_is_removed_whatever_it_is,
    "names not looked at": _nobody_looks_where_a_name_leads,
}


def apply() -> None:
    """Make the mistake that the environment names, in this process and for as long as it lives."""
    if name := os.environ.get(VARIABLE):
        MUTANTS[name](Patch())
