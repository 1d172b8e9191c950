"""Whatever the umask, one that opens all or one that shuts us out: what we or QEMU make is this user's alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = """\
name: private
memory: 64M
disks: [{name: vda, size: 1M}]
"""

# Command lines one after the other; after each the modes of all there is, the store's own files among it.
UNDER = """
import json, os, stat, sys
from pathlib import Path
os.umask(int(sys.argv[1]))
from qmpsnap.cli.common import reading
from qmpsnap.cli.main import main
home, found = Path(os.environ["QMPSNAP_HOME"]), {}
for words in json.loads(sys.argv[2]):
    code = main(words)
    assert code == 0, (words, code)
    with reading() as store:
        store.machines()
        for path in home.rglob("*"):
            mode = path.lstat().st_mode
            kind = "folder" if stat.S_ISDIR(mode) else "socket" if stat.S_ISSOCK(mode) else "file"
            found[str(path.relative_to(home))] = (kind, stat.S_IMODE(mode))
Path(sys.argv[3]).write_text(json.dumps(found))
"""

ALLOWED = {"folder": (0o700,), "socket": (0o700, 0o600), "file": (0o600,)}

MADE = (
    *("qmpsnap.db", "qmpsnap.db-wal", "qmpsnap.db-shm", "locks/private"),
    *("logs/private/qemu.log", "logs/private/console.log"),
    *("run/private/qmp.sock", "run/private/user.sock", "run/private/console.sock", "run/private/qemu.pid"),
    *("run/private/worker/qemu.log", "cache/qemu-abilities", "copies/finished", "copies/pivoted", "copies/chosen"),
)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_all_files_are_private(home: Path, tmp_path: Path, umask: int) -> None:
    spec = tmp_path / "private.yaml"
    spec.write_text(SPEC)
    (home / "copies").mkdir(mode=0o700)
    script = [
        ["define", str(spec)],
        ["mirror", "private", "vda", str(home / "copies/finished"), "--finish"],
        ["start", "private"],
        ["snapshot", "create", "private"],
        ["snapshot", "create", "private", "--file", f"vda={home / 'copies/chosen'}"],
        ["snapshot", "create", "private", "--kind", "full"],
        ["snapshot", "create", "private", "--kind", "internal"],
        ["mirror", "private", "vda", str(home / "copies/pivoted"), "--pivot"],
        ["save", "private"],
        ["restore", "private", "--paused"],
        ["stop", "private", "--force"],
    ]
    modes = tmp_path / "modes"
    with (tmp_path / "said").open("wb") as said:
        argv = [sys.executable, "-c", UNDER, str(umask), json.dumps(script), str(modes)]
        done = subprocess.run(argv, stdout=said, stderr=said, stdin=subprocess.DEVNULL, check=False)
    modes.chmod(0o600)
    assert done.returncode == 0, (tmp_path / "said").read_text()
    found = json.loads(modes.read_text())
    assert not set(MADE) - set(found)
    assert any(name.endswith(".vmstate") for name in found)
    assert {name: oct(mode) for name, (kind, mode) in found.items() if mode not in ALLOWED[kind]} == {}
    assert os.umask(0o022) == 0o022  # that of the tests was never touched
