"""What a machine is like now: as qmpsnap tells it, as QEMU's tools see it, and which processes there are."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from tests.outsider import contents
from tests.outsider.contents import Disk
from tests.outsider.typed import Answer, typed


class Lied(Exception):
    """A look found what may not be."""


@dataclass(frozen=True)
class Look:
    """One machine: its snapshots, chains, and state as the commands print them."""

    snapshots: dict[str, dict[str, Any]]
    chains: dict[str, list[dict[str, Any]]]
    current: str | None
    state: str
    pid: int | None
    monitor: str | None
    warned: str = field(compare=False, default="")

    @property
    def running(self) -> bool:
        """Whether it has a QEMU."""
        return self.pid is not None

    @property
    def stands(self) -> bool:
        """Whether it has a QEMU that runs no guest now."""
        return self.running and (self.state == "prelaunch" or self.state.startswith("paused"))

    def print(self) -> str:
        """All that no failed command may change, if it says that nothing was: a text to compare."""
        layers = {disk: [layer["layer"] for layer in chain] for disk, chain in self.chains.items()}
        told = {
            name: (snapshot["state"], snapshot["parent"], snapshot["disks"], snapshot["description"])
            for name, snapshot in self.snapshots.items()
        }
        return json.dumps([told, layers, self.current], sort_keys=True)


def asked(*words: str, may: tuple[int, ...] = (0,)) -> Answer:
    """A command that only reads, which has to answer."""
    answer = typed(*words, "-o", "json")
    if wrong := answer.wrong():
        raise Lied(f"{' '.join(words)}: {wrong}")
    if answer.code not in may:
        raise Lied(f"{' '.join(words)}: exit {answer.code}: {answer.err[-800:]}")
    return answer


def open_operations(machine: str) -> list[Any]:
    """What the journal has open of it."""
    found: list[Any] = asked("log", machine, "--open").json()["operations"]
    return found


def look(machine: str) -> Look:
    """See it as it is."""
    shown = asked("show", machine).json()
    listed = asked("snapshot", "list", machine).json()["snapshots"]
    chained = asked("chain", machine, may=(0, 7))
    chains = {disk["disk"]: disk["layers"] for disk in chained.json()["disks"]}
    told = asked("list", may=(0, 7)).json()["machines"]
    row = next((row for row in told if row["name"] == machine), None)
    if row is None:
        raise Lied(f"list leaves out {machine}")
    if row["snapshots"] != len(listed) or row["current"] != shown["current"]:
        raise Lied(f"list says {row}, snapshot list has {len(listed)}, show {shown['current']}")
    if (row["pid"] is None) != (shown["pid"] is None):
        raise Lied(f"list says {row}, show {shown['state']} {shown['pid']}")
    return Look(
        {snapshot["name"]: snapshot for snapshot in listed},
        chains,
        shown["current"],
        shown["state"],
        shown["pid"],
        shown["qmp"],
        chained.err if chained.code else "",
    )


def snapshot_disks(snapshot: dict[str, Any]) -> dict[str, Disk]:
    """What a snapshot holds."""
    return {disk: contents.read(*file_of(point), point["tag"]) for disk, point in snapshot["disks"].items()}


def file_of(point: dict[str, Any]) -> tuple[str, str]:
    """The image that a point lies in, and its format."""
    path = str(point["path"])
    return path, "raw" if path.endswith(".raw") else "qcow2"


def active_disks(chains: dict[str, list[dict[str, Any]]]) -> dict[str, Disk]:
    """What the guest reads."""
    return {disk: contents.read(layers[-1]["path"], layers[-1]["format"]) for disk, layers in chains.items()}


def chain_by_headers(path: str, image_format: str) -> list[str]:
    """The files of a chain, base first, by qemu-img alone."""
    told = json.loads(contents.qemu_img("info", "-U", "--backing-chain", "--output", "json", "-f", image_format, path))
    return [os.path.realpath(image["filename"]) for image in reversed(told)]


def chains_differ(seen: Look) -> str:
    """How the chains as they are told differ from those in the headers."""
    for disk, layers in seen.chains.items():
        said = [os.path.realpath(layer["path"]) for layer in layers]
        found = chain_by_headers(layers[-1]["path"], layers[-1]["format"])
        if said != found:
            return f"chain of {disk}: told {said}, the headers say {found}"
    return ""


def processes(root: Path) -> Iterator[psutil.Process]:
    """All that work below the folder or name it, but for this one."""
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            inside = Path(process.cwd()).is_relative_to(root)
            if inside or any(f"{root}/" in word for word in process.cmdline()):
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def opened(pid: int, root: Path) -> set[str]:
    """The images and state files that a process has open."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if target.startswith(f"{root}/") and target.split(maxsplit=1)[0].endswith(
            (".qcow2", ".raw", ".vmstate", ".part")
        ):
            found.add(target)
    return found


class Monitor:
    """A machine's second monitor, by a socket alone."""

    def __init__(self, path: str) -> None:
        """Connect."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(path)
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """One command; what QEMU refuses is an OSError."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise OSError(answer["error"]["desc"])
        raise ConnectionError("QEMU has hung up")

    def io(self, disk: str, line: str) -> None:
        """What qemu-io does, inside QEMU."""
        for backend in self.execute("query-block"):
            if disk in str(backend.get("qdev", "")).split("/"):
                said = self.execute(
                    "human-monitor-command", **{"command-line": f'qemu-io -d {backend["qdev"]} "{line}"'}
                )
                if said.strip():
                    raise OSError(said.strip())
                return
        raise OSError(f"QEMU has no disk {disk}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()
