"""Takes verbs of a stopped machine through calls of the C library that fail, and compares what is said with what is.

``python -m tests.cli.sweep HOME`` runs with the shim of :mod:`tests.harness.failing`; it prints what is not so.
"""

import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmpsnap.model.home import Home
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.cli import forked
from tests.harness import failing

SPEC = "name: {name}\nmemory: 16M\nagent: false\nnics: none\ndisks:\n  - {{name: vda, size: 1M}}\n"
SYNCS = "fsync fdatasync"
WRITES = "fsync fdatasync pwrite ftruncate rename unlink"


def looked(home: Home, machine: str) -> Any:
    """What the store has of the machine; by a fork, as an open store would change what closing does."""
    with tempfile.TemporaryFile() as said:
        if (pid := os.fork()) == 0:
            with SqliteStore(home.store, machines=home.machines) as store:
                known = [found.name for found in store.machines()]
                found = None
                if machine in known:
                    names = [found.name for found in store.snapshots(machine)]
                    found = [names, [list(chain.ids) for chain in store.chains(machine)]]
            os.write(said.fileno(), json.dumps(found).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        said.seek(0)
        return json.loads(said.read())


def told(words: list[str], fails: dict[str, Any] | None = None) -> tuple[int, str]:
    return forked.served(json.dumps({"words": words, "fails": fails, "streams": {"1": "/dev/null"}}))


def tried(home: Home, machine: str, words: list[str], fails: dict[str, Any]) -> Iterator[str]:
    """What is not so after one command line."""
    before = looked(home, machine)
    code, said = told([*words, "-o", "json"], fails)
    after = looked(home, machine)
    recovered, why = told(["recover", machine])
    now = looked(home, machine)
    if "Traceback" in said or "Traceback" in why:
        yield f"a traceback: {said}{why}"
    elif recovered not in ({0} if now else {0, 3}):
        yield f"recover ends with {recovered}: {why}"
    elif code == 0:
        if after == before or now != after:
            yield "exit 0, and it was not done"
    else:
        effect = json.loads(said.splitlines()[-1])["effect"]
        if effect == "none" and not before == after == now:
            yield f"it says none: {before} {after} {now}: {said}"
        if effect == "applied" and before == now:
            yield f"it says applied: {said}"


def faults() -> Iterator[dict[str, Any]]:
    """Which calls fail: once or for ever, from which one on."""
    for calls, times, error, places in (
        (SYNCS, 1, errno.EIO, range(0, 30, 3)),
        (SYNCS, failing.FOR_EVER, errno.EIO, range(1, 30, 6)),
        (WRITES, 1, errno.ENOSPC, range(2, 90, 23)),
        (WRITES, failing.FOR_EVER, errno.ENOSPC, range(5, 90, 31)),
    ):
        for after in places:
            yield {"calls": calls, "times": times, "error": error, "after": after}


def swept(home: Home, spec: Path) -> Iterator[str]:
    """Every case; none puts the machine back, so that each begins with what the one before has left."""
    for number, fails in enumerate(faults()):
        name, other = f"s{number}", f"m{number}"
        spec.write_text(SPEC.format(name=other))
        verbs = [("a", ["snapshot", "create", "a", name])]
        verbs += [("a", ["snapshot", "delete", "a", name])] if number % 2 else []
        verbs += [("a", ["commit", "a", "vda", "--consume"])] if number % 4 == 0 else []
        verbs += [(other, ["define", str(spec)])] if number % 5 == 0 else []
        for machine, words in verbs:
            if "delete" in words:
                told(["snapshot", "create", "a", name])  # unless it is there
            for what in tried(home, machine, words, fails):
                yield f"{words} with {fails}: {what}"
    code, said = told(["check", "a", "--deep"])
    if code:
        yield f"check ends with {code}: {said}"


if __name__ == "__main__":
    forked.load()
    place = Path(sys.argv[1])
    the_spec = place / "spec.yaml"
    the_spec.write_text(SPEC.format(name="a"))
    told(["define", str(the_spec)])
    for line in swept(Home.from_environment(dict(os.environ), uid=os.geteuid()), the_spec):
        sys.stdout.write(f"{line}\n")
