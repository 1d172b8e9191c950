"""XML as a tree of plain elements, by the standard library's expat: no DTD, no entity, bounded in size and depth."""

from collections.abc import Iterator
from typing import Final, NoReturn
from xml.parsers import expat

from qmpsnap.errors import UsageError
from qmpsnap.imports.found import require_small

MAX_DEPTH: Final = 64


class Element:
    """One element: its name (a foreign namespace before ``}``), attributes, text and children."""

    __slots__ = ("attributes", "children", "tag", "text")

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag = tag
        self.attributes = attributes
        self.children: list[Element] = []
        self.text = ""

    def get(self, name: str) -> str:
        """An attribute; empty where it has none of that name."""
        return self.attributes.get(name, "")

    def all(self, tag: str) -> Iterator["Element"]:
        """The children of that name."""
        return (child for child in self.children if child.tag == tag)

    def first(self, *path: str) -> "Element":
        """The first child of that name, of that child the next one, and so on; an empty element where there is none."""
        at = self
        for tag in path:
            at = next(at.all(tag), _NONE)
        return at

    def __bool__(self) -> bool:
        """Whether it was there."""
        return bool(self.tag)


_NONE: Final = Element("", {})


def parse(data: bytes, source: str) -> Element:
    """The root element of a document, which errors call ``source``."""
    require_small(data, source)
    parser = expat.ParserCreate(namespace_separator="}")
    open_now: list[Element] = []
    root: list[Element] = []

    def refuse(what: str) -> NoReturn:
        raise UsageError(f"{source}:{parser.CurrentLineNumber}: {what} in XML are refused", hint="remove them")

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, attributes)
        if len(open_now) == MAX_DEPTH:
            refuse(f"elements more than {MAX_DEPTH} deep")
        (open_now[-1].children if open_now else root).append(element)
        open_now.append(element)

    def end(_: str) -> None:
        element = open_now.pop()
        element.text = element.text.strip()

    def text(said: str) -> None:
        open_now[-1].text += said

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = lambda *_: refuse("document types and entities")
    parser.EntityDeclHandler = lambda *_: refuse("document types and entities")
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        said = expat.errors.messages.get(error.code, str(error))
        raise UsageError(f"{source}:{error.lineno}:{error.offset + 1}: not well-formed XML: {said}") from error
    except (ValueError, LookupError) as error:  # an encoding that Python does not know, or that does not fit
        raise UsageError(f"{source}: not well-formed XML: {error}") from error
    return root[0]
