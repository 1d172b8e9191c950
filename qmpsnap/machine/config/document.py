"""YAML as plain values, and where each of them stands: the one border to PyYAML.

PyYAML scans and composes but never constructs, so that no tag can make an object. Scalars mean what YAML 1.2's core
schema says: ``52:54:00:12:34:56`` is a string, ``010`` is ten, ``on`` is a string. Aliases, anchors, tags, duplicate
keys, more than one document and large or deep input are refused: a machine's spec has no need for them.
"""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from msgspec import Struct
from yaml.composer import Composer
from yaml.events import AliasEvent
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from qmpsnap.errors import SpecError

MAX_BYTES = 256 * 1024
"""A larger file is refused unread."""
MAX_DEPTH = 10
"""Deeper nesting is refused; PyYAML composes by recursion and would hit Python's limit."""
MAX_DIGITS = 40
"""Longer integers are refused; Python itself refuses thousands of digits with an error of its own."""
MAX_SHOWN = 40

Scalar = str | int | float | bool | None

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
}
_REMEDIES = {
    r"'\t'": "put spaces in place of the tab: YAML is indented with nothing else",
    "cannot start any token": "put a value that begins with @, % or ` in quotes",
    "mapping values are not allowed": "put a value with ': ' in it in quotes; a key on the line above needs its ':'",
    "could not find expected ':'": "write 'key: value', with a space behind the colon",
    "expected ',' or": "close the bracket that was opened before",
    "unexpected end of stream": "close the quote that was opened before",
    "expected <block end>": "let the keys of one mapping begin in one column; a quote inside a quoted value is doubled",
}
"""What to do about what PyYAML says."""


class Place(Struct, frozen=True):
    """Where a value stands (``file:line:column``, both counted from one), what it is and how it is written."""

    where: str
    value: Any
    text: str = ""

    def __str__(self) -> str:
        number = f"the number {shorten(self.text)}"
        said = {bool: f"the word {self.text}", int: number, float: number, str: f"the string {shorten(self.text)!r}"}
        return {dict: "a mapping", type(None): "nothing"}.get(type(self.value)) or said.get(type(self.value), "a list")


class Document(Struct):
    """Plain values, and the place of each by its path: ``$.disks[0].size``, and ``$.disks[0].size:`` of its key."""

    value: Any
    places: dict[str, Place]

    def at(self, path: str) -> Place:
        """The place of a value or key, or of what it was written in."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def refuse(self, path: str, message: str, hint: str = "") -> NoReturn:
        """Raise the SpecError that points to a value or key."""
        raise SpecError(f"{self.at(path).where}: {message}", hint=hint)

    def over(self, other: "Document") -> "Document":
        """Two mappings as one: what this one leaves out is taken from the other, key by key."""
        places = {path: at for path, at in other.places.items() if re.split(r"[.:[]", path[2:])[0] not in self.value}
        return Document(other.value | self.value, places | self.places)


def load(path: Path) -> str:
    """The file's text, of which never more is read than a document may have."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise SpecError(f"{str(path)!r}: cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise _too_large(str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        lines = data[: error.start].decode("utf-8", errors="replace").split("\n")
        where = f"{path}:{len(lines)}:{len(lines[-1]) + 1}"
        raise SpecError(f"{where}: this is not UTF-8 text", hint="save the file as UTF-8") from error


def compose(text: str, source: str) -> Document:
    """The one document in ``text``, or ``SpecError``; the module says what is refused."""
    if len(text) > MAX_BYTES:
        raise _too_large(source)
    try:
        loader = _Loader(text)
    except ReaderError as error:
        lines = text[: error.position].split("\n")
        where = f"{source}:{len(lines)}:{len(lines[-1]) + 1}"
        code = ord(text[error.position])
        raise SpecError(f"{where}: character U+{code:04X} is not allowed in YAML", hint="remove it") from error
    try:
        loader.name = source
        root: yaml.Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        where = _where(error.problem_mark or error.context_mark or loader.get_mark())
        problem = error.problem or error.context or "syntax error"
        hint = next((remedy for sign, remedy in _REMEDIES.items() if sign in problem), "")
        raise SpecError(f"{where}: not valid YAML: {problem}", hint=hint) from error
    except (ValueError, OverflowError) as error:  # PyYAML on "\UFFFFFFFF" and on an endless version number
        raise SpecError(f"{_where(loader.get_mark())}: not valid YAML: {error}") from error
    if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
        raise SpecError(f"{source}:1:1: the document is empty")
    document = Document(None, {})
    document.value = _plain(root, "$", document)
    return document


def of_program(value: Any, source: str) -> Document:
    """The document that a program has made, which errors call ``source``.

    An underscore in a key stands for a hyphen, as Python's names have none.
    """
    document = Document(None, {})

    def note(value: Any, path: str) -> Any:
        where = f"{source}: {path[2:]}" if path[2:] else source
        document.places[path] = Place(where, value, str(value))
        if isinstance(value, dict):
            named = {str(key).replace("_", "-"): found for key, found in value.items()}
            return {key: note(found, f"{path}.{key}") for key, found in named.items()}
        if isinstance(value, list | tuple):
            return [note(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return value

    document.value = note(value, "$")
    return document


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML down to its nodes, without what makes a small file large or deep."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        where, hint = _where(event.start_mark), "write the value out, or quote a string that begins with '{}'"
        if isinstance(event, AliasEvent):
            raise SpecError(f"{where}: aliases (*name) are refused", hint=hint.format("*"))
        if event.anchor is not None:
            raise SpecError(f"{where}: anchors (&name) are refused", hint=hint.format("&"))
        if event.tag is not None:
            raise SpecError(f"{where}: tags (!name) are refused", hint=hint.format("!"))
        if self._depth == MAX_DEPTH:
            raise SpecError(f"{where}: nested more than {MAX_DEPTH} deep")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _plain(node: yaml.Node, path: str, document: Document) -> Any:
    """A node's value; notes its place, and those of all in it."""
    where = _where(node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        document.places[path] = Place(where, ())
        return [_plain(item, f"{path}[{index}]", document) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        document.places[path] = Place(where, {})
        found: dict[str, Any] = {}
        for name, value in node.value:
            key = Place(_where(name.start_mark), "")
            if not isinstance(name, yaml.ScalarNode):
                raise SpecError(f"{key.where}: expected a word as the key")
            inner = f"{path}.{name.value}"
            if name.value in found:
                first = f"the first is at {document.at(inner + ':').where}"
                raise SpecError(f"{key.where}: key {shorten(name.value)!r} occurs twice", hint=first)
            document.places[f"{inner}:"] = key
            found[name.value] = _plain(value, inner, document)
        return found
    text: str = node.value
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and _INT.fullmatch(text) and len(text) > MAX_DIGITS:
        raise SpecError(f"{where}: the number is too long")
    value = _core(text) if plain else text
    document.places[path] = Place(where, value, text)
    return value


def _core(text: str) -> Scalar:
    """A plain scalar's value by the core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text[2:], 8 if text[1] == "o" else 16) if text[1:2] in ("o", "x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _where(mark: Any) -> str:
    return f"{mark.name}:{mark.line + 1}:{mark.column + 1}"


def _too_large(source: str) -> SpecError:
    return SpecError(f"{source}: larger than {MAX_BYTES // 1024} KiB: this is no machine's spec")


def shorten(text: str) -> str:
    """What fits into a sentence, of text that may be anything."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
