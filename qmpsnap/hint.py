"""What to do next, as a value: each front end writes the verbs and options in it as its users type them.

The text of a :class:`Hint` is for Python programs, as in ``await vm.stop(force=True)``. Its parts let another front end
write it anew; ``qmpsnap.cli.hints`` makes ``qmpsnap stop web --force`` of the same value. So nothing outside of
``qmpsnap/cli`` names a command or an option of the command line.
"""

from typing import Final, NamedTuple, Self

_OF_CONTROLLER: Final = frozenset({"adopt", "define", "prune_templates", "recover", "templates"})
_ELSEWHERE: Final = frozenset(
    {"demo", "doctor", "import_argv", "import_libvirt", "import_proxmox", "log", "rebuild", "relocate"}
)
"""Verbs that the Python API does not have."""


def _written(value: object) -> str:
    return value if isinstance(value, str) and value.isupper() else repr(value)  # PATH is to be replaced, 'web' is not


class Option(NamedTuple):
    """An argument of the verb at hand, as a keyword of the Python API."""

    name: str
    value: object = True

    def __str__(self) -> str:
        return f"{self.name}={_written(self.value)}"


class Call(NamedTuple):
    """One verb with its arguments: positional ones and keyword ``options``, as the Python API names them."""

    verb: str
    machine: str
    arguments: tuple[str, ...]
    options: tuple[Option, ...]

    def __str__(self) -> str:
        if self.verb in _ELSEWHERE:
            return f"{self.verb} (at the command line)"
        holder = "q" if self.verb in _OF_CONTROLLER else "vm"
        first = (self.machine,) if holder == "q" and self.machine else ()
        given = [*map(_written, (*first, *self.arguments)), *map(str, self.options)]
        return f"await {holder}.{self.verb}({', '.join(given)})"


class Hint(str):
    """Text with calls and options in it; plain text may be put before and behind it with ``+``."""

    __slots__ = ("parts",)
    parts: tuple[str | Call | Option, ...]

    def __new__(cls, *parts: str | Call | Option) -> Self:
        """A hint made of these, in this order."""
        hint = super().__new__(cls, "".join(map(str, parts)))
        hint.parts = parts
        return hint

    def __add__(self, other: str) -> "Hint":
        return Hint(*self.parts, *parts_of(other))

    def __radd__(self, other: str) -> "Hint":
        return Hint(*parts_of(other), *self.parts)


def parts_of(text: str) -> tuple[str | Call | Option, ...]:
    """What a hint was put together from; of plain text, itself."""
    return text.parts if isinstance(text, Hint) else (text,)


def call(verb: str, machine: str = "", *arguments: str, **options: object) -> Hint:
    """A verb to run, by its name in the Python API."""
    return Hint(Call(verb, machine, arguments, tuple(Option(*option) for option in options.items())))


def option(name: str, value: object = True) -> Hint:  # noqa: FBT002 - a value as any other
    """An argument to add to the call that failed, or to leave out."""
    return Hint(Option(name, value))
