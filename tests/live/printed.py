"""What commands print on a real machine, made the same from run to run; and golden files that hold it."""

import os
import re
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

_CHANGING = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "TIME"),
    (re.compile(r"(?<=pid )\d+"), "PID"),
    (re.compile(r"(?<=pc-q35-)\d+\.\d+"), "VERSION"),
    (re.compile(r"(?<=QEMU )\d+\.\d+\.\d+(, \w+)?"), "VERSION"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "SHA256"),
    (re.compile(r"[+-]?\d+\.\d ms"), "MS"),
    (re.compile(r"(?<=\bq[sc]-)[0-9a-f]{32}(?=-\d)"), "UUID"),
    (re.compile(r"(?<=qs-)(\d+)-[0-9a-f]{8}"), r"\1-TAGGED"),
    # How many blocks a file takes is its file system's affair, and it changes a column's width.
    (re.compile(r"\d+(\.\d)? ([KMGT]i)?B(/s)?  +"), "SIZE  "),
    (re.compile(r"\d+(\.\d)? ([KMGT]i)?B\b(/s)?"), "SIZE"),
    (re.compile(r"\b(BYTES|DONE|TOTAL)  +"), r"\1  "),
)


def steady(text: str, home: Path) -> str:
    """The text with everything replaced that differs from run to run."""
    text = text.replace(str(home), "/HOME")
    for pattern, name in _CHANGING:
        text = pattern.sub(name, text)
    return text


def hold(name: str, text: str) -> None:
    """Compare with the golden file; ``QMPSNAP_GOLDEN=write`` writes it, and fails: a run that writes is no test."""
    golden = GOLDEN / name
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
        pytest.fail(f"wrote {golden}: read the difference, then run without QMPSNAP_GOLDEN")
    assert golden.read_text() == text
