"""Every name that a test replaces by `setattr(module, "name", …)` is there: mypy does not read that string.

A test that runs in a part of the runs only would otherwise fail long after the name it replaces got another.
"""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_what_a_test_replaces_is_there() -> None:
    replaced = {path: list(_replaced(ast.parse(path.read_text()))) for path in sorted(TESTS.rglob("*.py"))}
    assert sum(map(len, replaced.values())) > 200
    gone = [
        f"{path.relative_to(TESTS.parent)}:{line}: {dotted}"
        for path, names in replaced.items()
        for line, dotted in names
        if not _is_there(dotted)
    ]
    assert not gone


def test_a_name_that_is_gone_is_found() -> None:
    source = "from qmpsnap.ops.revert import revert\npatch.setattr(revert, '_gone', None)\npatch.setattr('os.gone', 1)"
    assert [dotted for _, dotted in _replaced(ast.parse(source)) if not _is_there(dotted)] == [
        "qmpsnap.ops.revert.revert._gone",
        "os.gone",
    ]


def _replaced(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and dotted names that its `setattr` calls replace in what it imports: (206, "qmpsnap.block.qcow2.open")."""
    imported = _imported(module)
    for node in ast.walk(module):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr"):
            continue
        if any(word.arg == "raising" for word in node.keywords):
            continue
        match node.args:
            case [ast.Constant(value=str(dotted)), _]:
                yield node.lineno, dotted
            case [owner, ast.Constant(value=str(name)), _]:
                first, *others = ast.unparse(owner).split(".")
                if first in imported:
                    yield node.lineno, ".".join((imported[first], *others, name))


def _imported(module: ast.Module) -> dict[str, str]:
    """Its names of what it imports: {"revert": "qmpsnap.ops.revert.revert"}."""
    names: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for name in node.names:
                first = name.name.partition(".")[0]
                names[name.asname or first] = name.name if name.asname else first
        elif isinstance(node, ast.ImportFrom):
            names |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return names


def _is_there(dotted: str) -> bool:
    """Whether the longest part of it that is a module has the rest."""
    parts = dotted.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: object = import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False
