"""Another program that has a file open: a process of its own, which takes none of QEMU's locks."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAYS = {
    "writes": "held = open(path, 'r+b')",
    "appends": "held = open(path, 'ab')",
    "has it mapped": "import mmap; f = open(path, 'r+b'); held = mmap.mmap(f.fileno(), 4096); f.close()",
    "reads": "held = open(path, 'rb')",
}


@contextmanager
def outsider(path: str | Path, way: str = "writes") -> Iterator[int]:
    """A process that has the file open in one of :data:`WAYS` for the block; its pid."""
    code = f"import sys; path = sys.argv[1]; {WAYS[way]}; print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.communicate(timeout=20)
