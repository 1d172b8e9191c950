"""``scripts/bench``: how much time qmpsnap's care costs."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench import commit, compare, fork, parts, pause, suite, volume
from tests.bench.program import PYTHON, ROOT, ProgramFailed
from tests.harness.processes import kill_qemus


def main() -> int:
    """Run what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="compare|commit|fork|parts|pause|suite|volume")
    for name, module, about in (
        ("compare", compare, "everything, beside libvirt and a bare QMP script"),
        ("commit", commit, "a commit of the active layer"),
        ("fork", fork, "how soon a fork runs and answers, and the memory of many"),
        ("parts", parts, "where library calls spend their time"),
        ("pause", pause, "how long a full snapshot holds the guest"),
        ("suite", suite, "what a test takes that gets a fork, beside a load and a boot for each"),
        ("volume", volume, "how long a volume snapshot does, and the guest's longest read and write meanwhile"),
    ):
        kind = kinds.add_parser(name, help=about)
        kind.set_defaults(run=module.run)
        module.arguments(kind)
    given = parser.parse_args()
    # All is timed as an installed program: compiled once, not at every start.
    subprocess.run([PYTHON, "-m", "compileall", "-q", ROOT / "qmpsnap"], check=True)
    guest = subprocess.run([ROOT / "launch" / "guest" / "build"], check=True, stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory(prefix="qs-bench-") as name:
        home = Path(name) / "home"
        os.environ["QMPSNAP_HOME"] = str(home)
        (home / "cache").mkdir(parents=True)
        (home / "cache" / "guest").symlink_to(guest.stdout.strip())
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends
        try:
            return int(given.run(Path(name), given))
        except ProgramFailed as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        finally:
            kill_qemus(home)


if __name__ == "__main__":
    sys.exit(main())
