"""A QEMU command line as options with their parameters; pure."""

import json
import posixpath
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from qmpsnap.errors import UsageError
from qmpsnap.hint import call

Parameters = dict[str, str]

_ALONE: Final = frozenset(
    {"S", "alt-grab", "ctrl-grab", "daemonize", "enable-kvm", "full-screen", "h", "help", "no-acpi", "no-fd-bootchk"}
    | {"no-hpet", "no-quit", "no-reboot", "no-shutdown", "no-user-config", "nodefaults", "nographic", "only-migratable"}
    | {"portrait", "preconfig", "sdl", "semihosting", "singlestep", "snapshot", "usb", "version", "win2k-hack"}
)
"""Options without a value, of QEMU 4 to 11."""
_PROGRAMS: Final = ("qemu-system-x86_64", "qemu-system-i386", "qemu-kvm", "kvm")
_FIRST: Final = {
    "device": "driver",
    "netdev": "type",
    "nic": "model",
    "net": "type",
    "machine": "type",
    "M": "type",
    "accel": "accel",
    "smp": "cpus",
    "m": "size",
    "name": "guest",
    "chardev": "backend",
    "object": "qom-type",
    "display": "type",
}
"""What a first word without ``=`` is the value of."""


_DEEPEST: Final = 200
"""Characters that the keys above a value in JSON have at most."""


class Places(Struct, frozen=True):
    """What the paths of a command line are relative to.

    ``opened``: what a process has open, if it was asked: with ``-daemonize`` it has left the folder that its relative
    paths started in.
    """

    folder: str
    opened: tuple[str, ...] = ()

    def absolute(self, path: str) -> str:
        """A path as QEMU took it when it was started."""
        whole = posixpath.normpath(posixpath.join(self.folder, path))
        if path.startswith("/") or whole in self.opened:
            return whole
        named = [name for name in self.opened if name.endswith("/" + posixpath.normpath(path).lstrip("./"))]
        if len(named) > 1:
            raise UsageError(
                f"the process has several files open that its relative path {path} may mean: {', '.join(named)}",
                hint="pass its command line instead, in the folder where it was started",
            )
        return named[0] if named else whole


class Given(Struct, frozen=True):
    """One option: its name without dashes, its value as it was given; an image that stands alone is ``hda``."""

    option: str
    value: str = ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """``key=value,...``, in which a doubled comma is a comma, or JSON.

        Nested keys have dots, as QEMU flattens them.
        """
        if self.value.startswith("{"):
            return list(_flat(_json(self.value, self.option)))
        words = [word.replace("\0", ",") for word in self.value.replace(",,", "\0").split(",")]
        found: list[tuple[str, str]] = []
        for number, word in enumerate(words):
            key, equals, value = word.partition("=")
            if not equals and number == 0 and self.option in _FIRST:
                found.append((_FIRST[self.option], key))
            elif equals:
                found.append((key, value))
            elif key:
                found.append((key.removeprefix("no"), "off") if key.startswith("no") else (key, "on"))
        return found

    @property
    def parameters(self) -> Parameters:
        """The same by key; of one that is there several times the last counts, as for QEMU."""
        return dict(self.pairs)

    @property
    def shown(self) -> str:
        """What it is, without values: they may be secrets."""
        told = self.parameters if "=" in self.value or "," in self.value or self.option in _FIRST else {}
        kind = next((told[key] for key in (_FIRST.get(self.option), "driver", "if") if key and key in told), "")
        name = f" {told['id']}" if "id" in told else ""
        return f"-{self.option}{' ' + kind if kind and self.option in _FIRST else ''}{name}"


def split(words: Sequence[str]) -> list[Given]:
    """The options of a QEMU in order, the program and whatever starts it first.

    Raises:
        UsageError: this is no command line of a QEMU of x86.
    """
    if not words:
        raise UsageError("a command line is missing", hint=call("import_argv") + " -- qemu-system-x86_64 ...")
    # What starts it stands before: sudo, taskset, the loader of its libraries.
    programs = [word.rpartition("/")[2].startswith(_PROGRAMS) for word in words]
    if True not in programs:
        raise UsageError(
            f"{shlex.quote(words[0][:80])} is no QEMU of x86", hint=call("import_argv") + " -- qemu-system-x86_64 ..."
        )
    found: list[Given] = []
    at = programs.index(True) + 1
    while programs[at : at + 1] == [True]:  # a loader is told the program's name beside its path
        at += 1
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("-") or word == "-":
            found.append(Given("hda", word))
            continue
        option = word.removeprefix("-").removeprefix("-")
        if option in _ALONE:
            found.append(Given(option))
        elif at == len(words):
            raise UsageError(f"option -{option} has no value")
        else:
            found.append(Given(option, words[at]))
            at += 1
    return found


def _json(text: str, option: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the JSON of -{option} cannot be read: {str(error)[:80]}") from error
    if not isinstance(found, dict):
        raise UsageError(f"the JSON of -{option} is no object")
    return found


def _flat(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    if len(above) > _DEEPEST:
        raise UsageError("an option's JSON is nested too deeply")
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        elif isinstance(value, list):
            yield from _flat({str(number): inner for number, inner in enumerate(value)}, f"{above}{key}.")
        elif isinstance(value, bool):
            yield f"{above}{key}", "on" if value else "off"
        else:
            yield f"{above}{key}", "" if value is None else str(value)
