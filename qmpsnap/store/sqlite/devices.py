"""Device numbers that the kernel has given anew: a file system may have another one after a boot, or a mount.

Files are told by device and inode. Where all files that were recorded on a device, and are there, lie on one other by
now, with the inodes that they had, it is the device that has another number; all that is recorded follows it.
"""

import os
import sqlite3
import stat
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from qmpsnap.model.operations import steps
from qmpsnap.store.sqlite import queries
from qmpsnap.store.sqlite.json_values import decoded
from qmpsnap.store.sqlite.queries import signed, unsigned

File = tuple[str, int, int]
"""Path, and the device and inode that were recorded."""


def moved(files: Iterable[File]) -> dict[int, int]:
    """Every recorded device that has another number now, to that number."""
    found: dict[int, int] = {}
    on: dict[int, list[File]] = {}
    for file in files:
        on.setdefault(file[1], []).append(file)
    for device, here in on.items():
        if new := _now(device, here):
            found[device] = new
    return found


def _now(device: int, files: Iterable[File]) -> int | None:
    """The number that the files' device has now; None while it is the old one, or nobody can tell."""
    numbers = set()
    for path, _, inode in files:
        try:
            status = os.lstat(path)
        except OSError:
            continue  # it says nothing, like all that lies on a file system that is not mounted
        if status.st_dev == device or status.st_ino != inode or not stat.S_ISREG(status.st_mode):
            return None  # the device is there, or this is another file: then the others may be so as well
        numbers.add(status.st_dev)
    return numbers.pop() if len(numbers) == 1 else None


def follow(sql: sqlite3.Connection, numbers: Mapping[int, int]) -> None:
    """Record the new numbers: of layers, of state files, and in the plans and steps of what is open."""
    for identity, device in sql.execute("SELECT id, device FROM layer").fetchall():
        if new := numbers.get(unsigned(device)):
            sql.execute("UPDATE layer SET device = ?, version = version + 1 WHERE id = ?", (signed(new), identity))
    for number, text in sql.execute("SELECT id, vmstate FROM snapshot WHERE vmstate IS NOT NULL").fetchall():
        sql.execute("UPDATE snapshot SET vmstate = ? WHERE id = ?", (_text(text, numbers), number))
    for number, plan, step in sql.execute(f"SELECT id, plan, step FROM operation WHERE {queries.PENDING}").fetchall():
        values = (_text(plan, numbers), steps.on_device(step, numbers), number)
        sql.execute("UPDATE operation SET plan = ?, step = ?, version = version + 1 WHERE id = ?", values)


def _text(text: str, numbers: Mapping[int, int]) -> str:
    return msgspec.json.encode(_renumbered(decoded(text), numbers)).decode()


def _renumbered(value: Any, numbers: Mapping[int, int]) -> Any:
    """A recorded value with the new numbers: a file's identity is always a device beside an inode."""
    if isinstance(value, list):
        return [_renumbered(each, numbers) for each in value]
    if not isinstance(value, dict):
        return value
    new = {key: _renumbered(each, numbers) for key, each in value.items()}
    if "inode" in new and new.get("device") in numbers:
        new["device"] = numbers[new["device"]]
    return new
