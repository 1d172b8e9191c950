"""Bad input on the command line: the family's exit code, an error that says what to do, and nothing created."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from qmpsnap.cli.main import main
from qmpsnap.model.home import Home
from tests.cli import assumed_qemu, seeded

KEYS = {"schema", "code", "message", "hint", "effect", "machine", "operation", "qmp_class"}
UNKNOWN = {
    "show": "show nobody",
    "start": "start nobody",
    "stop": "stop nobody",
    "undefine": "undefine nobody --remove-disks",
    "console": "console nobody",
    "exec": "exec nobody -- true",
    "recover": "recover nobody",
    "chain": "chain nobody",
    "tree": "tree nobody",
    "list": "snapshot list nobody",
    "create": "snapshot create nobody",
    "dry-run": "snapshot create nobody --dry-run",
    "snapshot-show": "snapshot show nobody fresh",
}
BAD_SPECS = {
    "unknown-key": ("name: m\nmemry: 1G\n", r"2:1: unknown key 'memry'; did you mean 'memory'"),
    "not-yaml": ("name: [m\n", r"2:1: not valid YAML"),
    "bad-name": ("name: ../m\n", r"1:7: expected 'name' to be 1 to 63 of a-z, 0-9"),
    "bad-disk-name": (
        "name: m\ndisks: [{name: v/da, size: 1M}]\n",
        r"2:16: expected 'name' to be a lower-case letter and at most 15 more",
    ),
    "size-0": (
        "name: m\ndisks:\n  - {name: vda, size: 0}\n",
        r"3:23: expected 'size' to be a size such as 512M",
    ),
    "memory-0": ("name: m\nmemory: 0\n", r"2:9: expected 'memory' to be a size such as 512M"),
    "alias": ("name: &m m\n", r"1:7: anchors"),
}

OBJECTS: dict[str, tuple[str, int, str | None]] = {
    "snapshot list web --nonsense": ("usage", 2, None),
    "snapshot create web Upper": ("bad-name", 2, None),
    "snapshot list nobody": ("not-found", 3, "nobody"),
    "snapshot create web fresh": ("name-taken", 4, "web"),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("QMPSNAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QMPSNAP_QEMU", "/nonexistent/qemu")
    monkeypatch.setenv("QMPSNAP_QEMU_IMG", "/nonexistent/qemu-img")
    found = Home.from_environment(os.environ, uid=os.geteuid())
    seeded.fill(found)
    # As any earlier command on `web` has left them.
    found.run_dir("web").mkdir(mode=0o700, parents=True)
    found.lock("web").parent.mkdir(mode=0o700)
    found.lock("web").touch(0o600)
    return found


@pytest.fixture
def abilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a QEMU: what is refused below must be refused without running one."""
    assumed_qemu.assume(monkeypatch)


def listing(folder: Path) -> set[str]:
    """Every file and folder, without what SQLite keeps beside an open database."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {name for name in names if not name.endswith(("-wal", "-shm"))}


class Refusal:
    """How a command was refused; it must have left everything as it was."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> None:
        before = listing(folder)
        self.exit_code = main(words)
        printed = capsys.readouterr()
        assert listing(folder) == before
        assert printed.out == ""
        assert all(char.isprintable() for char in printed.err.replace("\n", ""))
        self.text = printed.err


def test_an_unknown_machine_is_not_found(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in UNKNOWN.values():
        refusal = Refusal(capsys, tmp_path, *words.split())
        assert refusal.exit_code == 3, words
        assert "there is no machine 'nobody'" in refusal.text
        assert "hint: known machines: bare, lab, web" in refusal.text


def test_an_unknown_snapshot_or_disk_is_not_found(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("snapshot show web nothing", "chain web vdz", "snapshot create web --disks vda,vdz"):
        assert Refusal(capsys, tmp_path, *words.split()).exit_code == 3, words


@pytest.mark.parametrize("name", BAD_SPECS)
def test_a_bad_spec_is_pointed_at(name: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = BAD_SPECS[name]
    spec = tmp_path / "m.yaml"
    spec.write_text(text)
    refusal = Refusal(capsys, tmp_path, "define", str(spec))
    assert refusal.exit_code == 2
    assert f"qmpsnap: {spec}:{message}" in refusal.text


@pytest.mark.parametrize("name", ["Upper", "../up", "a b", "-o", "", "x" * 64, "\x1b[31m"])
def test_a_bad_snapshot_name_is_refused(
    name: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Refusal(capsys, tmp_path, "snapshot", "create", "web", name).exit_code == 2


@pytest.mark.parametrize("words", ["list --nonsense", "snapshot list web --outp json", "snapshot", "frobnicate", ""])
def test_bad_usage_is_refused(words: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = Refusal(capsys, tmp_path, *words.split())
    assert refusal.exit_code == 2
    assert "--help" in refusal.text


@pytest.mark.parametrize("form", ["-o json", "-ojson", "--output json", "--output=json"])
@pytest.mark.parametrize("words", OBJECTS)
def test_an_error_is_an_object_when_json_is_asked_for(
    words: str, form: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, exit_code, machine = OBJECTS[words]
    refusal = Refusal(capsys, tmp_path, *words.split(), *form.split())
    error = json.loads(refusal.text)
    assert refusal.exit_code == exit_code
    assert set(error) == KEYS
    assert (error["schema"], error["code"], error["effect"]) == ("qmpsnap/1", code, "none")
    assert (error["machine"], error["operation"], error["qmp_class"]) == (machine, None, None)
    assert error["message"]
    assert error["hint"]


@pytest.mark.parametrize("words", ["show \udcff", "snapshot create web x -m \udcff", "define \udcff.yaml"])
def test_bytes_that_are_no_text_are_refused(
    words: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = Refusal(capsys, tmp_path, *words.split())
    assert refusal.exit_code == 2
    assert "is not UTF-8 text" in refusal.text


def test_a_taken_name_is_refused(
    home: Home, abilities: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "web.yaml"
    spec.write_text("name: web\n")
    refusal = Refusal(capsys, home.machines, "define", str(spec))
    assert refusal.exit_code == 4
    assert "machine web has existed since 2026-01-01T00:01:00Z" in refusal.text
    refusal = Refusal(capsys, home.machines, "snapshot", "create", "web", "fresh")
    assert refusal.exit_code == 4
    assert "a snapshot fresh since 2026-01-01T01:01:00Z" in refusal.text


def test_another_hosts_machine_is_left_alone(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(home.store) as sql:
        sql.execute("UPDATE machine SET host = 'elsewhere' WHERE name = 'web'")
    sql.close()
    for words in ("start web", "stop web", "snapshot create web", "undefine web --remove-disks", "recover web"):
        refusal = Refusal(capsys, home.data, *words.split())
        assert refusal.exit_code == 4, words
        assert "belongs to host elsewhere since 2026-01-01T00:01:00Z" in refusal.text
        assert "hint: try again on elsewhere" in refusal.text
    # Looking is allowed, and nobody here can know whether it runs.
    for words in ("list", "show web"):
        assert main(words.split()) == 0
        assert "unknown" in capsys.readouterr().out


def test_a_newer_store_is_refused(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(home.store) as sql:
        sql.execute("PRAGMA user_version = 99")
    sql.close()
    for words in ("list", "show web", "snapshot create web", "tree web"):
        refusal = Refusal(capsys, tmp_path, *words.split())
        assert refusal.exit_code == 7, words
        assert "has schema 99" in refusal.text


def test_a_damaged_store_is_refused(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.store.write_bytes(b"this was a store once" * 1000)
    assert Refusal(capsys, tmp_path, "list").exit_code == 7


def test_a_missing_program_is_the_hosts_fault(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "m.yaml"
    spec.write_text("name: m\n")
    refusal = Refusal(capsys, tmp_path, "define", str(spec))
    assert refusal.exit_code == 9
    assert "there is no /nonexistent/qemu on this host" in refusal.text
    assert "set QMPSNAP_QEMU" in refusal.text


def test_a_home_that_cannot_be_made_is_the_hosts_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QMPSNAP_HOME", str(tmp_path / "file" / "home"))
    assert Refusal(capsys, tmp_path, "list").exit_code == 9


def test_an_image_outside_the_allowed_folders_is_refused(
    home: Home, abilities: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "specs").mkdir()
    image = tmp_path / "outside" / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    spec = tmp_path / "specs" / "m.yaml"
    for path in (image, "../outside/disk.raw"):
        spec.write_text(f"name: m\ndisks: [{{name: vda, base: '{path}', format: raw}}]\n")
        refusal = Refusal(capsys, tmp_path, "define", str(spec))
        assert refusal.exit_code == 2
        assert "is outside the allowed folders" in refusal.text


@pytest.mark.usefixtures("home", "abilities")
@pytest.mark.parametrize(("declared", "content"), [("qcow2", b""), ("raw", b"QFI\xfb")])
def test_an_image_that_is_not_what_is_declared_is_refused(
    declared: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").write_bytes(content + bytes(1 << 20))
    spec = tmp_path / "m.yaml"
    spec.write_text(f"name: m\ndisks: [{{name: vda, image: disk, format: {declared}}}]\n")
    refusal = Refusal(capsys, tmp_path, "define", str(spec))
    assert refusal.exit_code == 2
    assert f"is declared {declared}" in refusal.text


def test_control_characters_are_never_printed_raw(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("snapshot list lab", "snapshot show lab base", "tree lab"):
        for form in ("table", "json"):
            assert main([*words.split(), "-o", form]) == 0
            printed = capsys.readouterr().out
            assert all(char.isprintable() for char in printed.replace("\n", "")), (words, form)
            if form == "json":
                document = json.loads(printed)
                found = document.get("snapshot") or document["snapshots"][0]
                assert found["description"] == seeded.HOSTILE
    main(["define", "\x1b[31m\x9b.yaml"])
    main(["--\x1b[31m"])
    printed_err = capsys.readouterr().err
    assert all(char.isprintable() for char in printed_err.replace("\n", ""))


def test_a_reader_that_has_had_enough_is_no_error(home: Home) -> None:
    seeded.make_images(home, "web")
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -m qmpsnap snapshot list web -o json | true', sys.executable],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
