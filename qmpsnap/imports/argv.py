"""A QEMU's command line as a machine."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from qmpsnap.errors import UsageError
from qmpsnap.imports import argv_cards, argv_disks
from qmpsnap.imports.argv_words import Given, Parameters, Places, split
from qmpsnap.imports.found import MIB, Imported, machine_name, whole_mib
from qmpsnap.imports.libvirt_devices import AGENT
from qmpsnap.model.machines.spec import MachineSpec

_REFUSED: Final = {
    "readconfig": "which adds options from a file",
    "add-fd": "whose images were passed as descriptors: their names are not in it",
    "set": "which changes other options",
}
_OURS: Final = frozenset(
    {"S", "D", "chardev", "daemonize", "mon", "monitor", "msg", "no-user-config", "nodefaults", "pidfile", "qmp"}
    | {"sandbox", "enable-kvm", "snapshot"}
)
"""What is qmpsnap's to decide for each QEMU, or was looked at."""
_READ: Final = frozenset({"M", "accel", "append", "cpu", "initrd", "kernel", "m", "machine", "name", "smp", "uuid"})
_SIZE: Final = re.compile(r"([0-9]{1,12})([bBkKmMgGtT]?)")
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UNITS: Final = {"b": 1, "k": 1 << 10, "": MIB, "m": MIB, "g": 1 << 30, "t": 1 << 40}
_NUMBER: Final = re.compile("[0-9]{1,4}")


def read(words: Sequence[str], *, places: Places, name: str | None = None, runs: str = "") -> Imported:
    """The machine that a QEMU with these arguments runs.

    Args:
        words: the program first.
        places: where relative paths in them lie.
        name: of the machine; None for the one that ``-name`` has.
        runs: how it is known that this QEMU runs; empty if it is not.

    Raises:
        UsageError: it is no QEMU of x86, or some of its options are in no argument.
    """
    given = split(words)
    for option in given:
        if option.option in _REFUSED:
            raise UsageError(
                f"the command line has -{option.option}, {_REFUSED[option.option]}",
                hint="write the spec by hand, or pass the whole command line",
            )
    changed: list[str] = []
    board, original = _board(given), _last(given, "name").get("guest", "")
    kind = board.get("type", "pc")
    uuid = _value(given, "uuid").lower()
    if not _UUID.fullmatch(uuid):
        uuid = ""
        changed.append("the UUID is a new one: the command line has none")
    spec = MachineSpec(
        name=machine_name(original, name),
        uuid=uuid,
        machine=kind,
        accel="kvm" if "kvm" in _accelerators(given, board) else "tcg",
        cpu=_value(given, "cpu") or "qemu64",
        cpus=_cpus(_last(given, "smp")),
        memory=_memory(_last(given, "m")),
        kernel=_path(_value(given, "kernel"), places),
        initrd=_path(_value(given, "initrd"), places),
        append=_value(given, "append"),
        agent=any(one.parameters.get("name") == AGENT for one in given if one.option == "device"),
    )
    disks, rest = argv_disks.read(given, board, spec.machine, places)
    cards, cards_changed = argv_cards.read(given, spec.machine)
    spec = replace(
        spec,
        firmware="uefi" if disks.code else "bios",
        uefi_code=disks.code,
        uefi_variables=disks.variables,
        disks=disks.disks,
        cdrom=disks.cdrom,
        nics=cards,
    )
    return Imported(
        origin=f"the QEMU {original or 'of a command line'}",
        spec=spec,
        changed=(*changed, *disks.changed, *cards_changed, *_display(given)),
        left_out=(*rest, *_rest(given, board)),
        runs=runs,
    )


def _value(given: Sequence[Given], option: str) -> str:
    """The value of an option; of several the last counts."""
    return next((one.value for one in reversed(given) if one.option == option), "")


def _last(given: Sequence[Given], *options: str) -> Parameters:
    found: Parameters = {}
    for one in given:
        if one.option in options:
            found |= one.parameters
    return found


def _board(given: Sequence[Given]) -> Parameters:
    return _last(given, "machine", "M")


def _accelerators(given: Sequence[Given], board: Parameters) -> list[str]:
    named = [one.parameters.get("accel", "") for one in given if one.option == "accel"]
    named += board.get("accel", "").split(":")
    return [*named, *("kvm" for one in given if one.option == "enable-kvm")]


def _cpus(smp: Parameters) -> int:
    def number(key: str) -> int:
        value = smp.get(key, "1")
        if not _NUMBER.fullmatch(value):
            raise UsageError(f"-smp has {key}={value[:40]!r}, not a number")
        return max(1, int(value))

    if "cpus" in smp:
        return number("cpus")
    return number("sockets") * number("dies") * number("cores") * number("threads")


def _memory(given: Parameters) -> int:
    value = given.get("size", "128")
    found = _SIZE.fullmatch(value)
    if found is None:
        raise UsageError(f"-m has {value[:40]!r}, not a size")
    return whole_mib(int(found[1]) * _UNITS[found[2].lower()])


def _path(value: str, places: Places) -> str | None:
    return places.absolute(value) if value else None


def _display(given: Sequence[Given]) -> Iterator[str]:
    options = {one.option for one in given}
    if "nodefaults" not in options and _value(given, "vga") != "none":
        yield "the guest has no display; 'display: vnc' gives it one"
    if "snapshot" in options:
        yield "the guest's writes are kept; with -snapshot they were temporary"


def _rest(given: Sequence[Given], board: Parameters) -> Iterator[str]:
    """Options that nobody has looked at; their values may be secrets and are not told."""
    known = {"type", "accel", "pflash0", "pflash1", "dump-guest-core"}
    yield from (f"-machine {key}" for key in board if key not in known)
    smp = _last(given, "smp")
    if smp.keys() & {"sockets", "cores", "threads", "dies", "clusters"}:
        yield "-smp: the topology; each vCPU is a socket"
    if _last(given, "m").keys() - {"size"}:
        yield "-m: room for more memory"
    for one in given:
        told = one.parameters if one.option == "device" else {}
        is_read = one.option in _READ or one.option in argv_disks.OPTIONS or one.option in argv_cards.OPTIONS
        is_read = is_read or bool(told.keys() & {"drive", "netdev"}) or told.get("name") == AGENT
        is_read = is_read or told.get("driver") == "vmgenid"  # a machine that is defined has one of its own
        if is_read or one.option in _OURS or (one.option, one.value) == ("rtc", "base=utc"):
            continue
        yield one.shown
