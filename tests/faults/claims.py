"""What an error and the log say has come of a verb, compared with what has: never asked of whoever said it.

Files, layers and snapshots are looked at before the verb; when it ends with an error, before anything recovers; and
once more after the recovery, for the log.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

import qmpsnap
from qmpsnap.errors import QmpsnapError
from qmpsnap.model.home import ACTIVE, RECORD
from qmpsnap.model.operations.operation import OPEN_STATES, Operation
from tests.live.machine import context_of

_heard: list[qmpsnap.QmpsnapError] = []
_told: list[Callable[[], None]] = []


class Before(Struct, frozen=True):
    """What there was, and the number of the machine's last operation."""

    seen: dict[str, Any]
    files: dict[str, int]
    last: int


def tell(compared: Callable[[], None]) -> None:
    """For this test: what is called whenever a claim is compared."""
    _told[:] = [compared]


def heard(error: qmpsnap.QmpsnapError) -> None:
    """The verb has ended with this error."""
    _heard.append(error)


@contextmanager
def hearing() -> Iterator[None]:
    """Hear the error that the block ends with; it goes no further."""
    try:
        yield
    except qmpsnap.QmpsnapError as error:
        heard(error)


def look(vm: qmpsnap.MachineHandle) -> Before:
    """Before the verb."""
    _heard.clear()
    operations = context_of(vm).store.operations(vm.name)
    return Before(_seen(vm), _files(vm), operations[-1].id if operations else 0)


def hold_error(vm: qmpsnap.MachineHandle, before: Before) -> None:
    """Right after the verb: what its error claims is so."""
    for error in _heard:
        operations = _since(vm, before)
        # What settles after one that has failed cleans up behind it: then only what is otherwise now counts.
        settled = bool(operations) and operations[0].state == "settled"
        changed = settled or _seen(vm) != before.seen
        is_open = any(found.state in OPEN_STATES for found in operations)
        is_so = "unknown" if is_open else "applied" if changed else "none"
        assert error.effect == is_so, f"claim: {error.message!r} says {error.effect}, and it is {is_so}"
        says_none = "nothing was" in error.message
        assert not says_none or is_so == "none", f"claim: {error.message!r} says so, and it is {is_so}"
        assert error.exit_code, f"claim: {error.message!r} ends with exit 0"
        if is_so == "none":
            assert _files(vm) == before.files, f"claim: {error.message!r}, and files are others"
        _compared()
    _heard.clear()


def hold_log(vm: qmpsnap.MachineHandle, before: Before) -> None:
    """After the recovery: what the log says of each operation is so."""
    operations = _since(vm, before)
    now = _seen(vm)
    for found in operations:
        if found.state == "settled":
            assert found.effect == "applied", f"claim: the log says {found.effect} of what has settled"
        elif len(operations) == 1:
            is_so = "applied" if now != before.seen else "none"
            assert found.effect == is_so, f"claim: the log says {found.effect}, and it is {is_so}"
            assert bool(found.outcome) == (is_so == "applied"), f"claim: the log says {found.outcome}"
        _compared()


async def standing(vm: qmpsnap.MachineHandle, place: Path, *, but: Path | None = None) -> dict[str, Any]:
    """All that an error's ``effect`` is about: what the store says, which files there are, how the guest is."""
    context = context_of(vm)
    store = context.store
    found: dict[str, Any] = {}
    for machine in store.machines():
        name = machine.name
        open_ = store.operations(name, only_open=True)
        found[name] = (machine.current, store.chains(name), store.snapshots(name), open_)
    files = [path for folder in (context.home.machines, place) for path in folder.rglob("*") if _is_told_of(path)]
    found["files"] = {str(path): path.stat().st_ino for path in sorted(files) if path != but}
    found[_WRITTEN] = {str(path): path.stat().st_mtime_ns for path in sorted(files) if path != but}
    found["state"] = await vm.state() if vm.name in found else "gone"
    return found


_WRITTEN = "written"
"""When each file was written to: a guest does so, too, and a verb that is undone; so it only tells that one was."""


def _is_told_of(path: Path) -> bool:
    """The machine's record says what the store says."""
    return path.is_file() and not path.name.startswith((RECORD, *ACTIVE))


def differs(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is otherwise in the second."""
    keys = [key for key in one | other if key != _WRITTEN and one.get(key) != other.get(key)]
    return [f"{key}: {one.get(key)} -> {other.get(key)}" for key in keys]


def hold_effect(error: QmpsnapError, before: dict[str, Any], now: dict[str, Any]) -> None:
    """What an error claims is so, of all that there is; one that does not know claims nothing."""
    changed = differs(before, now)
    assert error.exit_code, f"{error.message!r} ends with exit 0"
    assert "nothing was" not in error.message, f"{error.message!r} speaks of the effect, which is {error.effect}"
    match error.effect:
        case "none":
            assert not changed, f"it says that nothing was changed ({error}): {changed}"
        case "applied":
            # A guest that was taken back to a snapshot inside its images has written to them, and changed nothing else.
            assert changed or before[_WRITTEN] != now[_WRITTEN], f"it says that something was changed: {error.message}"


def _compared() -> None:
    for compared in _told:
        compared()


def _since(vm: qmpsnap.MachineHandle, before: Before) -> list[Operation]:
    return [found for found in context_of(vm).store.operations(vm.name) if found.id > before.last]


def _seen(vm: qmpsnap.MachineHandle) -> dict[str, Any]:
    store = context_of(vm).store
    return {
        "current": store.machine(vm.name).current,
        "snapshots": {found.name: found.state for found in store.snapshots(vm.name)},
        "layers": {found.disk: [(at.id, at.virtual_size) for at in found.layers] for found in store.chains(vm.name)},
    }


def _files(vm: qmpsnap.MachineHandle) -> dict[str, int]:
    folder: Path = context_of(vm).home.machine_dir(vm.name)
    found = {}
    for file in filter(_is_told_of, folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            found[file.name] = file.stat().st_ino
    return found
