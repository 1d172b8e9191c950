"""The same acts by the Python API: what a program would call instead of typing the command line."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import qmpsnap

Call = Callable[[qmpsnap.MachineHandle], Awaitable[object]]


def call(words: Sequence[str]) -> tuple[str, Call] | None:  # noqa: C901, PLR0911, PLR0912 - a line for each verb
    """The machine and the call that a command line stands for, if it is one of these."""
    match list(words):
        case ["snapshot", "create", machine, "--no-snapshot"]:
            return machine, lambda vm: vm.add_layers()
        case ["snapshot", "create", machine, name]:
            return machine, lambda vm: vm.snapshot(name)
        case ["snapshot", "create", machine, name, "--disks", disk]:
            return machine, lambda vm: vm.snapshot(name, disks=[disk])
        case ["snapshot", "create", machine, name, "--kind", "full"]:
            return machine, lambda vm: vm.snapshot(name, kind="full")
        case ["snapshot", "create", machine, name, "--kind", "internal", *no_memory]:
            return machine, lambda vm: vm.snapshot(name, kind="internal", memory=not no_memory)
        case ["snapshot", "push", machine, name]:
            return machine, lambda vm: vm.push(name)
        case ["snapshot", "pop", machine, *discard]:
            return machine, lambda vm: vm.pop(discard=bool(discard))
        case ["snapshot", "revert", machine, name, *options]:
            return machine, lambda vm: vm.revert(name, **_reverting(options))
        case ["snapshot", "rename", machine, old, new]:
            return machine, lambda vm: vm.rename_snapshot(old, new)
        case ["snapshot", "delete", machine, *names] if "--metadata" not in names:
            return machine, lambda vm: vm.delete_snapshots(*names)
        case ["stream", machine, disk]:
            return machine, lambda vm: vm.stream(disk)
        case ["stream", machine, disk, "--base", base]:
            return machine, lambda vm: vm.stream(disk, base=base)
        case ["commit", machine, disk, *options]:
            return machine, lambda vm: vm.commit(disk, **_committing(options))
        case ["mirror", machine, disk, target, "--pivot", *shallow]:
            return machine, lambda vm: vm.mirror(disk, target, mode="pivot", shallow=bool(shallow))
        case ["recover", machine]:
            return machine, lambda vm: vm.recover()
        case _:
            return None


def _reverting(options: Sequence[str]) -> dict[str, Any]:
    states = [word.removeprefix("--") for word in options if word != "--discard"]
    return {"discard": "--discard" in options, "state": states[0] if states else None}


def _committing(options: Sequence[str]) -> dict[str, Any]:
    rest = iter(options)
    found: dict[str, Any] = {}
    for word in rest:
        found[word.removeprefix("--")] = True if word == "--consume" else next(rest)
    return found


def run(words: Sequence[str]) -> int:
    """Make the call; returns what the command line's exit code would be, the error on stderr."""
    found = call(words)
    assert found
    machine, made = found

    async def act() -> None:
        async with qmpsnap.open() as q:
            await made(await q.machine(machine))

    try:
        asyncio.run(act())
    except qmpsnap.QmpsnapError as error:
        sys.stderr.write(f"{json.dumps(error.as_dict())}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0
