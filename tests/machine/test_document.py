"""YAML scalars and places: what PyYAML alone would read by the rules of YAML 1.1."""

import pytest

from qmpsnap.machine.config import document


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
def test_scalars_are_those_of_yaml_1_2(text: str, value: document.Scalar) -> None:
    (found,) = document.compose(f"[{text}]", "x").value
    assert (type(found), found) == (type(value), value)


def test_every_value_and_key_has_its_place() -> None:
    found = document.compose("\n  a:\n    - é: x\n", "x")
    assert found.value == {"a": [{"é": "x"}]}
    paths = ("$", "$.a:", "$.a", "$.a[0]", "$.a[0].é:", "$.a[0].é", "$.a[0].é.of", "$.missing")
    places = [found.at(path).where for path in paths]
    assert places == ["x:2:3", "x:2:3", "x:3:5", "x:3:7", "x:3:7", "x:3:10", "x:3:10", "x:2:3"]


def test_what_a_mapping_leaves_out_is_taken_from_another() -> None:
    mine, other = document.compose("a: {b: 1}", "mine"), document.compose("a: {c: 2}\nab: [3]", "other")
    both = mine.over(other)
    assert both.value == {"a": {"b": 1}, "ab": [3]}
    assert [both.at(path).where for path in ("$", "$.a.b", "$.ab:", "$.ab[0]")] == [
        *("mine:1:1", "mine:1:8", "other:2:1", "other:2:6")
    ]
    assert "$.a.c" not in both.places
