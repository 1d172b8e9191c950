"""YAML scalars and places: what PyYAML alone would read by the rules of YAML 1.1."""

import pytest

from qmpsnap.machine.config import yamltree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+7", 7),
        ("-7", -7),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.INF", float("-inf")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("52:54:00:12:34:56", "52:54:00:12:34:56"),
        ("2222:22", "2222:22"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("2026-01-01", "2026-01-01"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("''", ""),
        ("=", "="),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: yamltree.Scalar) -> None:
    tree = yamltree.compose(f"[{text}]", "x").value
    assert isinstance(tree, tuple)
    found = tree[0].value
    assert (type(found), found) == (type(value), value)


def test_a_tree_knows_where_it_stands() -> None:
    tree = yamltree.compose("\n  a:\n    - é: x\n", "x")
    assert isinstance(tree.value, dict)
    inner = tree.value["a"].value
    assert isinstance(inner.value, tuple)
    assert (tree.where, inner.where, inner.value[0].where) == ("x:2:3", "x:3:5", "x:3:7")
