"""Running qemu-img: bounded, without a shell, its end always known; one that storage does not let end is left."""

import subprocess
from collections.abc import Mapping, Sequence

import anyio
from anyio.abc import ByteReceiveStream, Process

from qmpsnap.effect import Effect
from qmpsnap.errors import DeadlinePassed, HostCannot
from qmpsnap.hint import call
from qmpsnap.host import storage_wait
from qmpsnap.host.outstanding import LOOK, storage_hangs
from qmpsnap.host.programs import running
from qmpsnap.host.threads import first_of


async def run(
    argv: list[str],
    *,
    deadline: float,
    late: str,
    effect: Effect = "none",
    inherited: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> "subprocess.CompletedProcess[bytes]":
    """Run a program to its end, ``deadline`` seconds at most; what it returned is the caller's to judge.

    The error says ``late`` should it not be done by then, and ``effect`` whether it may have changed something. It gets
    the open descriptors ``inherited`` under the same numbers; of each of its streams ``limit`` bytes are kept, or all.
    """
    said = {"out": b"", "err": b""}

    async def read(stream: ByteReceiveStream | None, name: str) -> None:
        assert stream is not None  # a pipe by open_process's default
        async for chunk in stream:
            said[name] = (said[name] + chunk)[:limit]

    try:
        with anyio.fail_after(deadline):
            async with (
                running(
                    argv,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=inherited,
                    start_new_session=True,  # a Ctrl-C is ours to answer, not its own
                ) as process,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(_watch, process, argv[0], effect)
                async with anyio.create_task_group() as reading:
                    reading.start_soon(read, process.stdout, "out")
                    reading.start_soon(read, process.stderr, "err")
                code = await process.wait()
                tasks.cancel_scope.cancel()
    except TimeoutError as error:
        raise DeadlinePassed(late, effect=effect) from error
    except OSError as error:
        raise HostCannot(
            f"{argv[0]} cannot be run: {error.strerror}", hint=call("doctor") + " shows what is missing"
        ) from error
    except BaseExceptionGroup as group:
        raise first_of(group) from group.__cause__
    return subprocess.CompletedProcess(argv, code, said["out"], said["err"])


async def _watch(process: Process, program: str, effect: Effect) -> None:
    watch, seconds = storage_wait.ProcessWatch(process.pid), storage_wait.deadline()
    while True:
        await anyio.sleep(LOOK)
        if wait := watch.hangs(seconds):
            raise storage_hangs(wait, seconds, effect=effect, who=f"{program} (process {process.pid})")
