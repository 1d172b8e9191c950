"""``qmpsnap.progress``, the former way to hear of a job, until it goes with the next release."""

import anyio
import pytest

import qmpsnap
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import Report

REPORTED = [JobInfo(id="j", type="commit", status=status) for status in ("running", "concluded")]


async def act(report: Report) -> str:
    """A verb that reports twice."""
    for info in REPORTED:
        report(info)
        await anyio.lowlevel.checkpoint()
    return "done"


async def test_reports_are_iterated_over_and_the_result_is_there_behind_the_block() -> None:
    with pytest.warns(DeprecationWarning, match="qmpsnap.progress"):
        async with qmpsnap.progress(act) as following:
            assert [info async for info in following] == REPORTED
    assert following.result == "done"


async def test_a_block_that_raises_cancels_the_verb_and_its_error_comes_out() -> None:
    cancelled: list[bool] = []

    async def waiting(_: Report) -> None:
        try:
            await anyio.sleep_forever()
        except BaseException:
            cancelled.append(True)
            raise

    async def block() -> None:
        async with qmpsnap.progress(waiting):
            await anyio.lowlevel.checkpoint()
            raise KeyError

    with pytest.raises(KeyError), pytest.warns(DeprecationWarning, match="qmpsnap.progress"):
        await block()
    assert cancelled
