"""Running qemu-img: bounded, without a shell, its end always known."""

import subprocess
from collections.abc import Sequence

import anyio

from qmpsnap.errors import DeadlinePassed, Effect, HostCannot
from qmpsnap.programs import finished


async def run(
    argv: list[str], *, deadline: float, late: str, effect: Effect = "none", inherited: Sequence[int] = ()
) -> "subprocess.CompletedProcess[bytes]":
    """Run a program to its end; what it returned is the caller's to judge.

    Args:
        argv: the program and its arguments.
        deadline: seconds after which it is ended.
        late: the message should it not be done by then.
        effect: whether such a program may have changed something.
        inherited: open descriptors that its arguments speak of; it gets them under the same numbers.

    Raises:
        DeadlinePassed: it was not done in time.
        HostCannot: it cannot be started.
    """
    try:
        with anyio.fail_after(deadline):
            done = await finished(argv, stdin=subprocess.DEVNULL, pass_fds=inherited)
            return subprocess.CompletedProcess(argv, *done)
    except OSError as error:
        raise HostCannot(f"{argv[0]} cannot be run: {error}", hint="see qmpsnap doctor") from error
    except TimeoutError as error:
        raise DeadlinePassed(late, effect=effect) from error
