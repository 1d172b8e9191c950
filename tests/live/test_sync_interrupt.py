"""Ctrl-C in a program without asyncio: the call at hand is cancelled, waited for, and leaves the chain as it was."""

import signal
import threading

import anyio
import pytest

import qmpsnap
import qmpsnap.sync
from qmpsnap import JobInfo
from tests.live.machine import grown, hold_invariants


async def _make() -> None:
    async with qmpsnap.open() as q:
        await grown(q, "s1", "s2")


async def _holds() -> None:
    async with qmpsnap.open() as q:
        await hold_invariants(await q.machine("still"))


def test_ctrl_c_cancels_the_call_and_waits_for_its_end(home: object, slow_jobs: None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored
    anyio.run(_make)
    threads: set[int] = set()
    main = threading.get_ident()

    def interrupt(info: JobInfo) -> None:
        if info.status == "running" and not threads:
            threads.add(threading.get_ident())
            signal.pthread_kill(main, signal.SIGINT)  # which wakes it from its wait

    with qmpsnap.sync.open() as q:
        vm = q.machine("still")
        chain = vm.chains()[0].ids
        with pytest.raises(KeyboardInterrupt):
            vm.stream("vda", report=interrupt)
        assert threads
        assert threads != {main}
        assert vm.jobs() == ()
        assert vm.chains()[0].ids == chain
        assert [found.name for found in vm.snapshots()] == ["s1", "s2"]
    anyio.run(_holds)


def test_threads_share_a_controller(home: object) -> None:
    anyio.run(_make)
    with qmpsnap.sync.open() as q:
        vm = q.machine("still")
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.append(vm.state())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["prelaunch"] * 4
        assert q.machine("still") == vm
        vm.stop(force=True)
