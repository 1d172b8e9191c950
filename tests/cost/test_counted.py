"""What is counted of a program whose costs are known."""

import sys
from pathlib import Path

from tests.cost import counted
from tests.harness import failing

KNOWN = """\
import asyncio, os, sqlite3, subprocess, sys
from pathlib import Path
from tests.cost import counted

home = Path(os.environ["QMPSNAP_HOME"])
counted.count(Path(sys.argv[1]), below=home)

with (home / "notes-12.txt").open("wb", buffering=0) as file:
    file.write(b"x")
    file.write(b"x" * 5000)
    os.fsync(file)
    os.fdatasync(file)
(home.parent / "outside").write_bytes(b"x")
subprocess.run(["true"], check=True)
if os.fork() == 0:
    (home / "forked").write_bytes(b"x")
    os._exit(0)
os.wait()

with sqlite3.connect(home / "db", isolation_level=None) as sql:
    sql.execute("CREATE TABLE t (n)")
    sql.execute("INSERT INTO t VALUES (1)")
sql.close()


class Client:
    async def execute(self, command, arguments):
        return {}


from qmpsnap.qmp.session import Session
asyncio.run(Session(Client(), "m", 0).execute("query-status"))
"""


def test_every_kind_of_cost_is_counted(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    found = counted.counted([sys.executable, "-c", KNOWN], [], folder=tmp_path, shim=failing.built(tmp_path))
    assert found.qmp == {"query-status": 1}
    assert found.processes == {"true": 1, "os.fork": 1}
    assert found.sql == {"CREATE": 1, "INSERT": 1}
    assert found.fsyncs["notes-N.txt"] == 2
    assert found.fsyncs["db"] == 2  # one for each transaction
    assert found.blocks["notes-N.txt"] == 3
    assert found.blocks["forked"] == 1
    assert "outside" not in found.blocks


def test_a_file_is_known_by_its_place() -> None:
    kind = counted.kind
    home = Path("/h")
    assert kind("/h/machines/still/vda-12.qcow2", home) == "machines/still/vda-N.qcow2"
    assert kind("/h/cache/qemu-abilities/_usr_bin-1234.json", home) == "cache"
    assert kind("/h", home) == "."
