"""What the reading commands print, byte by byte, for a store with fixed values.

``QMPSNAP_GOLDEN=write`` writes the golden files anew, and fails all the same: a run that writes is no test.
"""

import os
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from qmpsnap.api import plans
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.cli import plan_output
from qmpsnap.cli.main import main
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.ops.outside import compare
from qmpsnap.ops.snapshot import plan as create_plan
from qmpsnap.ops.snapshot.plan import CreateRequest
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.cli import seeded

GOLDEN = Path(__file__).parent / "golden"
FORMS = ("table", "json", "name")
READING = {
    "list": "list",
    "show": "show web",
    "show-bare": "show bare",
    "snapshot-list": "snapshot list web",
    "snapshot-list-hostile": "snapshot list lab",
    "snapshot-list-empty": "snapshot list bare",
    "snapshot-show": "snapshot show web before-upgrade",
    "snapshot-show-hostile": "snapshot show lab base",
    "log": "log bare",
    "tree": "tree web",
    "tree-branches": "tree lab",
    "tree-empty": "tree bare",
    "chain": "chain web",
    "chain-one-disk": "chain web vdb",
    "dry-run": "snapshot create web next -m 'not taken' --dry-run",
    "dry-run-one-disk": "snapshot create web --disks vdb --dry-run",
}
FAILING = {
    "no-machine": "show nobody",
    "no-snapshot": "snapshot show web nothing",
    "name-taken": "snapshot create web fresh --dry-run",
    "no-disk": "chain web vdz",
    "usage": "snapshot list",
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Home:
    if shutil.which("qemu-img") is None and os.environ.get("CI") != "true":
        pytest.skip("qemu-img is missing")
    folder = str(tmp_path_factory.mktemp("home"))
    home = Home.from_environment({"QMPSNAP_HOME": folder}, uid=os.geteuid())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qmpsnap.store.sqlite.journal.time", SimpleNamespace(time=lambda: seeded.EPOCH))
        seeded.fill(home)
        for machine in ("web", "lab"):
            seeded.make_images(home, machine)
    return home


@pytest.fixture
def home(filled: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("QMPSNAP_HOME", str(filled.data))
    monkeypatch.setattr(compare, "headers", _fixed_allocation)
    return filled


def _fixed_allocation(chain: Chain) -> dict[LayerId, Header | str]:
    """The headers as they are, but for what a file system makes of a file's size."""
    return {
        layer: found if isinstance(found, str) else replace(found, allocated=196_608 + len(layer) * 4096)
        for layer, found in _real_headers(chain).items()
    }


_real_headers = compare.headers


def hold(name: str, text: str, home: Home) -> None:
    """Compare with the golden file of that name, once what differs from run to run is replaced."""
    text = text.replace(str(home.data), "/HOME")
    text = re.sub(r'^( *"?host"?: *"?)[^",\n]+', r"\1HOST", text, flags=re.MULTILINE)
    text = re.sub(r'("pid": )\d+', r"\1PID", text)
    golden = GOLDEN / name
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
        pytest.fail(f"wrote {golden}: read the difference, then run without QMPSNAP_GOLDEN")
    assert golden.read_text() == text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", READING)
def test_an_answer_is_its_golden_file(name: str, form: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*shlex.split(READING[name]), "-o", form])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    hold(f"{name}.{form}", printed.out, home)


@pytest.mark.parametrize("form", ["table", "json"])
@pytest.mark.parametrize("name", FAILING)
def test_an_error_is_its_golden_file(name: str, form: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(FAILING[name])
    assert main([*words, "-o", form]) != 0
    printed = capsys.readouterr()
    assert printed.out == ""
    hold(f"error-{name}.{form}", printed.err, home)


@pytest.mark.parametrize("form", FORMS)
def test_a_live_plan_is_its_golden_file(form: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with SqliteStore(home.store, machines=home.machines) as store:
        basis = store.basis("web")
    at = PlanInputs(basis=basis, serial=OperationId(6), home=home, mode="live", now=seeded.EPOCH)
    machine, plan = at.machine, create_plan.plan(at, CreateRequest(name="next", description=""))
    plan_output.print_plan(form, plans.of_create((machine, plan)))  # type: ignore[arg-type]
    hold(f"dry-run-live.{form}", capsys.readouterr().out, home)


def test_a_chain_that_disagrees_says_where(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    image = home.machine_dir("web") / "vda-3.qcow2"
    away = image.rename(home.data / "away")
    try:
        assert main(["chain", "web", "vda"]) == 7
    finally:
        away.rename(image)
    printed = capsys.readouterr()
    hold("chain-disagrees.table", f"{printed.out}\non stderr:\n{printed.err}", home)


def test_every_golden_file_has_its_test() -> None:
    names = {f"{name}.{form}" for name in (*READING, "dry-run-live") for form in FORMS}
    names |= {f"error-{name}.{form}" for name in FAILING for form in ("table", "json")}
    names |= {"chain-disagrees.table"}
    assert {path.name for path in GOLDEN.glob("*")} == names


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*")), ids=lambda path: path.name)
def test_nothing_that_is_printed_steers_a_terminal(path: Path) -> None:
    found = re.findall(r"[^\n]", path.read_text())
    assert [char for char in found if not char.isprintable()] == []
