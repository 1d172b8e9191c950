"""What every verb that reads says of a home, as JSON; the home's folder is called ``{home}`` there."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

Run = Callable[[list[str]], tuple[int, str]]
"""Runs a command line; its exit code and what it printed."""

_OF_A_MACHINE = ("show", "snapshot list", "tree", "chain", "log", "check", "check --deep")


def said(run: Run, home: str) -> dict[str, Any]:
    """By its words: the exit code and the document of each verb, for all machines and snapshots."""

    def ask(*words: str) -> Any:
        code, text = run([*words, "-o", "json"])
        return [code, json.loads(text.replace(home, "{home}"))]

    answers = {"list": ask("list"), "check": ask("check")}
    for name in (found["name"] for found in answers["list"][1]["machines"]):
        for words in ([*of.split(), name] for of in _OF_A_MACHINE):
            answers[" ".join(words)] = ask(*words)
        for snapshot in (found["name"] for found in answers[f"snapshot list {name}"][1]["snapshots"]):
            answers[f"snapshot show {name} {snapshot}"] = ask("snapshot", "show", name, snapshot)
    return answers


def comparable(document: Any) -> Any:
    """Without the bytes that files take up: those are the file system's choice."""
    if isinstance(document, dict):
        return {key: comparable(value) for key, value in document.items() if key != "bytes" or "layer" not in document}
    return [comparable(each) for each in document] if isinstance(document, list) else document


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """What is not the same, one value a line: two whole answers beside each other say too much to be read."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() <= now.keys():  # new fields may appear
        for key in before:
            yield from differences(before[key], now[key], f"{where}/{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{where}/{number}")
    elif before != now:
        yield f"{where}: {before} -> {now}"


def _process(words: list[str]) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "qmpsnap", *words], check=False, capture_output=True, text=True)
    return done.returncode, done.stdout


if __name__ == "__main__":
    json.dump(said(_process, sys.argv[1]), sys.stdout, indent=1, ensure_ascii=False, sort_keys=True)
