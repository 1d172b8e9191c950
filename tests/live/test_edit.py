"""``edit``: a machine's spec in an editor; what that leaves is taken, refused or kept."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.imports import spec_text
from qmpsnap.machine.config import specfile
from qmpsnap.model.machines.spec import DiskSpec, Forward, MachineSpec, NicSpec
from tests.live.machine import MIB
from tests.live.test_dry_runs import everything

SPEC = "name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}, {name: vdb, size: 1M, bus: scsi}]\n"


@pytest.fixture
def still(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for the texts that are kept
    spec = tmp_path / "s.yaml"
    spec.write_text(SPEC)
    assert main(["define", str(spec)]) == 0
    capsys.readouterr()
    return home


def edit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sed: str, *options: str
) -> tuple[int, str, str]:
    """The exit code, answer and notes of an ``edit`` whose editor is that sed script."""
    monkeypatch.setenv("EDITOR", f"sed -i -e '{sed}'")
    monkeypatch.delenv("VISUAL", raising=False)
    code = main(["edit", "still", *options])
    return code, *capsys.readouterr()


def kept(err: str) -> Path:
    found = re.search(r"the edited text is kept in (\S+)", err)
    assert found, err
    return Path(found[1])


def test_what_is_edited_is_recorded(
    still: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sed = "s/memory: 64M/memory: 96M/; s/bus: scsi/bus: scsi\\n    cache: none/"
    before = everything(still)
    code, out, err = edit(monkeypatch, capsys, sed, "--dry-run", "-o", "json")
    assert code == 0
    would = json.loads(out)
    assert [one["key"] for one in would["changes"]] == ["memory", "vdb.cache"]
    assert everything(still) == before
    code, out, err = edit(monkeypatch, capsys, sed, "-o", "json")
    assert (code, json.loads(out)) == (0, would | {"dry_run": False})
    assert "this would change machine still:\n  memory: 67108864 -> 100663296\n" in err
    assert main(["show", "still", "-o", "json"]) == 0
    assert "100663296" in capsys.readouterr().out


def test_a_change_is_worded_as_in_the_spec(
    still: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = edit(monkeypatch, capsys, "$a agent: false", "--dry-run")
    assert (code, "  agent: default -> false\n" in out) == (0, True), out


def test_nothing_is_changed_without_a_change(
    still: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(still)
    code, out, err = edit(monkeypatch, capsys, "")
    assert (code, out) == (0, "")
    assert "left as it is; nothing was changed" in err
    code, out, err = edit(monkeypatch, capsys, "s/^name:/name:  /")
    assert (code, out) == (0, "machine still has this spec already\n")
    monkeypatch.setenv("EDITOR", "false")
    assert main(["edit", "still"]) == 9
    assert "the editor 'false' failed: exit code 1" in (err := capsys.readouterr().err)
    assert "kept in" not in err  # as nothing was edited
    assert not list(Path(tempfile.gettempdir()).glob("qmpsnap-edit-*"))
    monkeypatch.setenv("EDITOR", 'sh -c \'echo "# mine" >>"$0"; false\'')
    assert main(["edit", "still"]) == 9
    assert kept(capsys.readouterr().err).read_text().endswith("# mine\n")
    monkeypatch.setenv("VISUAL", "/nonexistent/editor")
    assert main(["edit", "still"]) == 9
    assert everything(still) == before


@pytest.mark.parametrize(
    ("sed", "said"),
    [
        ("s/memory: 64M/memory: lots/", "still.yaml:5:"),
        ("s/name: vda/name: vdx/", "has the disks vda, vdb"),
        ("1,$d", "still.yaml"),
        ("$a kernel: /nonexistent/kernel", "there is no kernel"),
    ],
)
def test_what_is_refused_is_kept_as_text(
    still: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sed: str, said: str
) -> None:
    before = everything(still)
    code, out, err = edit(monkeypatch, capsys, sed)
    assert (out, said in err) == ("", True), err
    assert code in (2, 4)
    assert kept(err).exists()
    assert kept(err).stat().st_mode & 0o77 == 0 or kept(err).parent.stat().st_mode & 0o77 == 0
    assert everything(still) == before


def test_the_text_of_a_spec_is_read_as_that_spec(tmp_path: Path) -> None:
    spec = MachineSpec(
        name="web",
        machine="pc-q35-7.2",
        memory=3 * MIB + 512 * 1024 * 2,
        cpus=3,
        kernel="/boot/vm linuz",
        append="console=ttyS0 'a: b' # c",
        disks=(DiskSpec(name="vda", size=MIB, cache="none"), DiskSpec(name="vdb", size=1536, bus="scsi")),
        nics=(NicSpec(forwards=(Forward(host=2222, guest=22),)), NicSpec(mac="52:54:00:00:00:01")),
        extra=("-device", "x,y=z"),
        agent=False,
    )
    read = specfile.parse(spec_text.of(spec), "t", folder=tmp_path, guest_dir=tmp_path, profile_dir=tmp_path)
    assert replace(read, tcg_cpu="") == spec


async def test_an_adopted_or_unknown_machine_is_refused(q: qmpsnap.Controller) -> None:
    assert main(["edit", "nobody"]) == 3
