"""Damage of every kind on a stopped machine: what `check` finds, what repair does, and that nothing is lost."""

import errno
import json
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

from qmpsnap.block.image import header, verify
from qmpsnap.block.image.create import ImageTool
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import DeadlinePassed, ForeignHost, HostCannot, LockHeld, StoreMismatch
from qmpsnap.machine import statefile
from qmpsnap.model.finding import KINDS
from qmpsnap.model.home import RECORD, Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Point
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change, CreatePlan, DefinePlan
from qmpsnap.ops.base.context import Context, opened
from qmpsnap.ops.check import check
from qmpsnap.ops.lifecycle import power
from qmpsnap.ops.snapshot import delete
from qmpsnap.ops.snapshot.delete import DeleteRequest
from qmpsnap.store import lock
from qmpsnap.store.records import Records
from tests.cli import seeded
from tests.machine.test_statefile import MANIFEST
from tests.store.samples import journalled

MIB = 1 << 20


@pytest.fixture
async def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Context]:
    """A store with the machine ``web``, which is whole: two disks of four and three layers."""
    if shutil.which("qemu-img") is None:
        pytest.fail("qemu-img is missing: scripts/setup installs it")
    monkeypatch.setenv("QMPSNAP_HOME", str(tmp_path))
    home = Home.from_environment(os.environ, uid=os.geteuid())
    seeded.fill(home)
    seeded.make_images(home, "web")
    for file in home.machine_dir("web").iterdir():
        file.chmod(0o600)
    async with opened() as context:
        yield context


def image(context: Context, name: str) -> Path:
    return context.home.machine_dir("web") / f"{name}.qcow2"


def img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def apply(context: Context, **change: object) -> None:
    context.store.apply("web", Change(**change))  # type: ignore[arg-type]


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def with_memory(context: Context) -> Path:
    """Give the snapshot ``fresh`` a state file."""
    path = context.home.machine_dir("web") / "memory-9.vmstate"
    part = Path(f"{path}.part")
    part.write_bytes(b"QEVM" + bytes(MIB))
    part.chmod(0o600)
    state = statefile.finish(str(part), str(path), replace(MANIFEST, operation=OperationId(9)))
    fresh = next(found for found in context.store.snapshots("web") if found.name == "fresh")
    apply(context, snapshots=(replace(fresh, kind="full", vmstate=state),))
    return path


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.rename(path)


def linked(context: Context) -> None:
    image(context, "vda-3").rename(context.home.data / "x")
    image(context, "vda-3").symlink_to(context.home.data / "x")


def state_replaced(context: Context) -> None:
    replaced(with_memory(context))


def state_missing(context: Context) -> None:
    with_memory(context).unlink()


def state_flipped(context: Context) -> None:
    poke(with_memory(context), 1000, b"\1")


def state_cut(context: Context) -> None:
    os.truncate(path := with_memory(context), path.stat().st_size - 1)


def tag_missing(context: Context) -> None:
    fresh = next(found for found in context.store.snapshots("web") if found.name == "fresh")
    points = tuple(replace(point, tag="qs-7-none") for point in fresh.points[:1])
    apply(context, snapshots=(replace(fresh, kind="internal", points=points),))


def variables_missing(context: Context) -> None:
    fresh = next(found for found in context.store.snapshots("web") if found.name == "fresh")
    kept = str(context.home.machine_dir("web") / "vars-7.fd")
    apply(context, snapshots=(replace(fresh, variables=kept),))


def shared(context: Context) -> None:
    fresh = next(found for found in context.store.snapshots("web") if found.name == "fresh")
    apply(context, snapshots=(replace(fresh, points=(Point(disk="vda", layer=LayerId("vda-5")),)),))


def damaged(context: Context) -> None:
    found = header.read(image(context, "vda-3"))
    poke(image(context, "vda-3"), found.l1_offset, (1 << 63 | 3 << 20 | 512).to_bytes(8, "big"))


def written(context: Context, sql: str) -> None:
    """As somebody writes to the store by hand."""
    with closing(sqlite3.connect(context.home.store)) as store, store:
        store.execute(sql)


def interrupted(context: Context) -> None:
    plan = CreatePlan(machine="web", live=False, overlays=(), change=Change())
    journalled(context.store, plan)


def from_the_future(context: Context) -> None:
    """An overlay whose number this store has not given yet."""
    path = image(context, f"vda-{context.store.next_serial()}")
    img("create", "-q", "-f", "qcow2", path, "64M")
    path.chmod(0o600)


def above_the_active(context: Context) -> None:
    """An overlay on the layer that the guest would write to; other machines have used up the numbers since."""
    img(
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        image(context, "vda-5"),
        "-F",
        "qcow2",
        image(context, "vda-9"),
        "64M",
    )


def open_locks(context: Context) -> None:
    (folder := context.home.data / "locks").mkdir(exist_ok=True)
    folder.chmod(0o777)


def newer_record(context: Context) -> None:
    """As a snapshot at a place that a user has chosen leaves it behind, or a new name."""
    records = Records(context.home.machines)
    found = records.read("web")
    assert found
    records.write(replace(found, generation=found.generation + 1))


DAMAGE: dict[str, tuple[Callable[[Context], object], set[str], set[str]]] = {
    # What was done; what is found then; what is left of that after repair.
    "a layer is gone": (lambda c: image(c, "vda-3").unlink(), {"layer-missing"}, {"layer-missing"}),
    "a layer is a link": (linked, {"layer-missing"}, {"layer-missing"}),
    "a layer was copied": (lambda c: replaced(image(c, "vda-3")), {"layer-replaced"}, {"layer-replaced"}),
    "a layer was rebased": (
        lambda c: img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", image(c, "vda-1"), image(c, "vda-4")),
        {"backing-differs"},
        {"backing-differs"},
    ),
    "a layer was resized": (
        lambda c: img("resize", "-q", image(c, "vda-3"), "80M"),
        {"size-differs"},
        {"size-differs"},
    ),
    "a disk has grown": (lambda c: img("resize", "-q", image(c, "vda-5"), "80M"), {"size-differs"}, set()),
    "a disk has shrunk": (
        lambda c: img("resize", "-q", "--shrink", image(c, "vda-5"), "8M"),
        {"size-differs"},
        {"size-differs"},
    ),
    "a layer is marked corrupt": (
        lambda c: poke(image(c, "vda-3"), 79, b"\2"),
        {"image-corrupt"},
        {"image-corrupt"},
    ),
    "a layer is damaged": (damaged, {"image-damaged"}, {"image-damaged"}),
    "a file of nobody": (lambda c: image(c, "copy").write_bytes(b"mine"), {"unreferenced-file"}, set()),
    "a folder of nobody": (lambda c: image(c, "folder").mkdir(), {"unreferenced-file"}, set()),
    "a name that is no UTF-8": (
        lambda c: Path(os.fsdecode(bytes(image(c, "x").parent) + b"/x\xff")).write_bytes(b"mine"),
        {"unreferenced-file"},
        set(),
    ),
    "a number that none has": (
        lambda c: image(c, "vda-99999999999999999999").write_bytes(b"mine"),
        {"unreferenced-file"},
        set(),
    ),
    "a number in other digits": (
        lambda c: image(c, "vda-\u0667").write_bytes(b"mine"),
        {"unreferenced-file"},
        set(),
    ),
    "a copy with a date": (
        lambda c: shutil.copy2(image(c, "vda-5"), image(c, "vda-20261101")),
        {"unreferenced-file"},
        set(),
    ),
    "an unfinished file": (lambda c: image(c, "copy").with_suffix(".part").write_bytes(b"half"), {"part-left"}, set()),
    "an open file": (lambda c: image(c, "vda-3").chmod(0o644), {"mode-open"}, set()),
    "an open folder": (lambda c: c.home.machine_dir("web").chmod(0o755), {"mode-open"}, set()),
    "a folder of the home is open": (open_locks, {"home-open"}, set()),
    "a point on another disk": (
        lambda c: written(c, "UPDATE point SET layer = 'vdb-3' WHERE layer = 'vda-4'"),
        {"layer-misplaced"},
        {"layer-misplaced"},
    ),
    "a parent that is younger": (
        lambda c: written(c, "UPDATE snapshot SET parent = 3 WHERE id = 1"),
        {"parent-younger"},
        {"parent-younger"},
    ),
    "its own parent": (
        lambda c: written(c, "UPDATE snapshot SET parent = 1 WHERE id = 1"),
        {"parent-younger"},
        {"parent-younger"},
    ),
    "a tag is gone": (tag_missing, {"tag-missing"}, {"tag-missing"}),
    "a state file is gone": (state_missing, {"state-file-missing"}, {"state-file-missing"}),
    "a state file was copied": (state_replaced, {"state-file-replaced"}, {"state-file-replaced"}),
    "a state file was cut": (state_cut, {"state-file-damaged"}, {"state-file-damaged"}),
    "a state file has another byte": (state_flipped, {"state-file-damaged"}, {"state-file-damaged"}),
    "a variable store is gone": (variables_missing, {"variables-missing"}, {"variables-missing"}),
    "a snapshot is written to": (shared, {"writable-shared"}, {"writable-shared"}),
    "the record is gone": (lambda c: c.home.record("web").unlink(), {"record-missing"}, set()),
    "an interrupted operation": (interrupted, {"operation-open"}, set()),
    "the store is old, by a number": (
        from_the_future,
        {"store-older", "unreferenced-file"},
        {"store-older", "unreferenced-file"},
    ),
    "the store is old, by a header": (
        above_the_active,
        {"store-older", "unreferenced-file"},
        {"store-older", "unreferenced-file"},
    ),
    "the store is old, by the record": (newer_record, {"store-older"}, {"store-older"}),
}
ONLY_DEEP = {
    "a point on another disk",
    "a parent that is younger",
    "its own parent",
    "a layer is damaged",
    "a state file has another byte",
}


async def test_a_whole_machine_has_no_finding(web: Context) -> None:
    assert (await check.run(web, "web", deep=True)).findings == ()
    done = await check.run(web, "web", deep=True, mend=True)
    assert (done.findings, done.repaired, done.moved, done.failed) == ((), (), (), ())


@pytest.mark.parametrize("what", DAMAGE)
async def test_damage_is_found_and_what_can_be_is_put_right(web: Context, what: str) -> None:
    damage, expected, left = DAMAGE[what]
    damage(web)
    before = contents(web.home)
    shallow = await check.run(web, "web")
    assert {finding.code for finding in shallow.findings} == (set() if what in ONLY_DEEP else expected)
    found = await check.run(web, "web", deep=True)
    assert {finding.code for finding in found.findings} == expected
    assert contents(web.home) == before, "check alone changes nothing"
    done = await check.run(web, "web", deep=True, mend=True)
    assert {finding.code for finding in done.findings} == left
    assert {finding.code for finding in done.repaired} == expected - left
    assert done.failed == ()
    assert lost(before, web.home) == []
    again = await check.run(web, "web", deep=True, mend=True)
    assert (again.findings, again.repaired, again.moved) == (done.findings, (), ())


def contents(home: Home) -> dict[str, bytes]:
    """Every file of the user's but the store's own, and its records."""
    folders = (home.machines, home.quarantines[0])
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != RECORD]
    return {str(path.relative_to(home.data)): path.read_bytes() for path in files}


def lost(before: dict[str, bytes], home: Home) -> list[str]:
    """What was there before and is nowhere now."""
    now = contents(home)
    return [path for path, data in before.items() if data not in now.values()]


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        (
            "UPDATE layer SET backing = 'vda-3' WHERE id = 'vdb-5'",
            "layer vdb-5 of disk vdb has layer vda-3 as its backing file",
        ),
        ("UPDATE disk SET active = 'vdb-5' WHERE name = 'vda'", "the guest has disk vda on layer vdb-5"),
    ],
)
async def test_layers_and_disks_on_layers_of_another_disk_are_told(web: Context, sql: str, text: str) -> None:
    written(web, sql)
    found = (await check.run(web, "web", deep=True)).findings
    assert text in [finding.text for finding in found if finding.code == "layer-misplaced"]


async def test_parents_in_a_circle_keep_nobody(web: Context) -> None:
    written(web, "UPDATE snapshot SET parent = 3 WHERE id = 1")
    assert main(["tree", "web"]) == main(["snapshot", "list", "web"]) == 0
    with anyio.fail_after(20):
        await delete.preview(web, "web", DeleteRequest(names=("fresh", "before-upgrade", "after-upgrade")))
        await delete.preview(web, "web", DeleteRequest(names=("fresh",), children=True))
        await delete.run(web, "web", DeleteRequest(names=("before-upgrade",), metadata=True))
    assert [one.name for one in web.store.snapshots("web")] == ["fresh", "after-upgrade"]


async def test_what_is_moved_can_be_put_back(web: Context) -> None:
    path = image(web, "copy")
    path.write_bytes(b"mine")
    (moved,) = (await check.run(web, "web", mend=True)).moved
    assert (moved.old, Path(moved.new).read_bytes(), path.exists()) == (str(path), b"mine", False)
    folder = Path(moved.new).parent
    assert folder.is_relative_to(web.home.quarantines[0] / "web")
    assert {stat.S_IMODE(place.stat().st_mode) for place in (folder, folder.parent, folder.parent.parent)} == {0o700}
    note = json.loads((folder / "note.json").read_text())
    assert (note["path"], note["code"]) == (str(path), "unreferenced-file")
    path.write_bytes(b"other")
    (second,) = (await check.run(web, "web", mend=True)).moved
    assert (Path(moved.new).read_bytes(), Path(second.new).read_bytes()) == (b"mine", b"other")


async def test_an_image_that_a_header_names_is_not_moved(web: Context) -> None:
    img("create", "-q", "-f", "qcow2", image(web, "hand-made"), "64M")
    img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", image(web, "hand-made"), image(web, "vda-3"))
    done = await check.run(web, "web", mend=True)
    assert {finding.code for finding in done.findings} == {"backing-differs", "unreferenced-file"}
    assert (done.moved, image(web, "hand-made").exists()) == ((), True)


async def test_what_any_machine_needs_is_not_moved(web: Context) -> None:
    """Another machine's spec, layer, and open plan: all of it lies in this machine's folder, by ways of its own."""
    folder = web.home.machine_dir("web")
    (folder / "boot").mkdir()
    needed = [folder / name for name in ("boot/vmlinuz", "initrd", "current", "key,1", "rom", "theirs", "copy.part")]
    for path in needed:
        path.write_bytes(path.name.encode())
    (folder / "newest").symlink_to("current")
    (link := web.home.data / "link").symlink_to(folder)
    spec = replace(
        web.store.machine("bare").spec,
        kernel=str(folder / "boot/../boot/vmlinuz"),
        initrd=str(link / "initrd"),
        append=f"root={link / 'newest'}",
        extra=("-device", f"loader,file={link / 'key,,1'},force-raw=on", "-bios", str(folder / "rom")),
    )
    other = Machine(name="other", uuid="o", host=web.host, spec=spec, created=1)
    layer = Layer(
        id=LayerId("vda-90"), path=str(link / "theirs"), format="raw", backing=None, virtual_size=MIB, owned=False
    )
    web.store.apply("other", Change(define=other, layers=(layer,), active={"vda": layer.id}))
    plan = DefinePlan(machine="other", images=(), overlays=(), variables=str(link / "copy.part"), change=Change())
    journalled(web.store, plan)
    (folder / "mine").write_bytes(b"of nobody")
    done = await check.run(web, "web", mend=True)
    assert (done.findings, [moved.old for moved in done.moved]) == ((), [str(folder / "mine")])
    assert all(path.exists() for path in needed)


async def test_a_layer_under_another_name_is_told_and_stays(web: Context) -> None:
    image(web, "vda-3").rename(image(web, "away"))
    done = await check.run(web, "web", mend=True)
    assert {finding.code for finding in done.findings} == {"layer-missing", "unreferenced-file"}
    (found,) = (finding.text for finding in done.findings if finding.code == "unreferenced-file")
    assert found == f"{image(web, 'away')} is layer vda-3, recorded at {image(web, 'vda-3')}"
    assert (done.moved, image(web, "away").exists()) == ((), True)


async def test_what_was_not_moved_leaves_no_note(web: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    image(web, "copy").write_bytes(b"mine")

    def elsewhere(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", elsewhere)
        done = await check.run(web, "web", mend=True)
    assert ([finding.code for finding in done.findings], done.moved) == (["unreferenced-file"], ())
    assert "is on another file system" in done.failed[0]
    assert [place for place in web.home.quarantines if place.exists()] == []
    assert image(web, "copy").read_bytes() == b"mine"


def img_that_says(tmp_path: Path, text: str, code: int) -> ImageTool:
    program = tmp_path / "says"
    program.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit {code}\n")
    program.chmod(0o700)
    return ImageTool(str(program))


@pytest.mark.parametrize("why", ["missing", "key", "unsupported", "late"])
async def test_an_image_that_could_not_be_looked_at_is_not_called_damaged(
    web: Context, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(*_: object, **__: object) -> None:
        raise DeadlinePassed("checking it took longer than 3600 s")

    match why:
        case "missing":
            web = replace(web, image=ImageTool("no-such-program"))
        case "key":
            web = replace(web, image=img_that_says(tmp_path, "Invalid password, cannot unlock any keyslot", 1))
        case "unsupported":
            web = replace(web, image=img_that_says(tmp_path, "This image format does not support checks", 63))
        case _:
            monkeypatch.setattr(verify, "check", late)
    found = (await check.run(web, "web", deep=True)).findings
    assert {finding.code for finding in found} == {"image-unread"}
    web = replace(web, image=img_that_says(tmp_path, "3 errors were found", 2))
    monkeypatch.undo()
    found = (await check.run(web, "web", deep=True)).findings
    assert {finding.code for finding in found} == {"image-damaged"}


async def test_a_state_file_that_could_not_be_read_is_not_called_damaged(
    web: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(_: object) -> None:
        raise HostCannot("it is compressed, and the package zstandard is missing")

    with_memory(web)
    monkeypatch.setattr(statefile, "verified", unreadable)
    assert [found.code for found in (await check.run(web, "web", deep=True)).findings] == ["state-file-unread"]


async def test_who_works_on_the_machine_is_told_and_nothing_else(web: Context) -> None:
    image(web, "vda-3").unlink()
    with lock.machine_lock(web.home.lock("web"), machine="web", verb="commit"):
        (finding,) = (await check.run(web, "web")).findings
        assert finding.code == "machine-busy"
        assert f"'commit' (pid {os.getpid()}" in finding.text
        with pytest.raises(LockHeld):
            await check.run(web, "web", mend=True)
    assert [finding.code for finding in (await check.run(web, "web")).findings] == ["layer-missing"]


async def test_an_old_store_starts_nothing_and_changes_nothing(web: Context) -> None:
    above_the_active(web)
    interrupted(web)
    with pytest.raises(StoreMismatch, match="old copy") as caught:
        await power.start(web, "web")
    assert (caught.value.exit_code, caught.value.effect) == (7, "none")
    assert "check --rebuild --set-aside" in as_typed(caught.value.hint)
    assert len(web.store.operations("web", only_open=True)) == 1, "not even recovery is done by an old record"


async def test_what_an_interrupted_operation_made_is_no_sign_of_an_old_store(web: Context) -> None:
    above_the_active(web)
    layer = replace(web.store.layer(LayerId("vda-5")), id=LayerId("vda-9"), path=str(image(web, "vda-9")))
    plan = CreatePlan(machine="web", live=False, overlays=(), change=Change(layers=(layer,)))
    journalled(web.store, plan)
    assert [finding.code for finding in (await check.run(web, "web")).findings] == ["operation-open"]


async def test_another_hosts_machine_is_named_and_left_out(web: Context, capsys: pytest.CaptureFixture[str]) -> None:
    far = Machine(name="far", uuid="f", host="elsewhere", spec=web.store.machine("bare").spec, created=1)
    web.store.apply("far", Change(define=far))
    with pytest.raises(ForeignHost):
        await check.run(web, "far")


class TestCommandLine:
    """The same from the shell."""

    def test_findings_exit_7_and_none_0(self, web: Context, capsys: pytest.CaptureFixture[str]) -> None:
        del web
        assert main(["check", "web"]) == 0
        assert capsys.readouterr().out == "web: no finding(s)\n"

    def test_a_finding_says_what_it_means_and_what_repair_would_do(
        self, web: Context, capsys: pytest.CaptureFixture[str]
    ) -> None:
        image(web, "copy").write_bytes(b"mine")
        assert main(["check", "web", "-o", "json"]) == 7
        (machine,) = json.loads(capsys.readouterr().out)["machines"]
        (finding,) = machine["findings"]
        assert (finding["code"], finding["invariant"], finding["file"]) == (
            "unreferenced-file", "I3", str(image(web, "copy")),
        )  # fmt: skip
        assert finding["means"] == KINDS["unreferenced-file"].means
        assert finding["repair"] == KINDS["unreferenced-file"].repair
        assert main(["check", "web", "--repair", "-o", "name"]) == 0
        assert capsys.readouterr().out == ""

    def test_all_machines_are_looked_at(self, web: Context, capsys: pytest.CaptureFixture[str]) -> None:
        del web
        assert main(["check", "-o", "name"]) == 7  # of lab there is no image
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"lab"}

    def test_one_that_is_worked_on_is_named_and_the_others_are_repaired(
        self, web: Context, capsys: pytest.CaptureFixture[str]
    ) -> None:
        strays = [web.home.machine_dir(name) / "stray" for name in ("bare", "web")]  # before and behind lab
        for stray in strays:
            stray.parent.mkdir(mode=0o700, exist_ok=True)
            stray.write_bytes(b"mine")
        with lock.machine_lock(web.home.lock("lab"), machine="lab", verb="commit"):
            assert main(["check", "--repair", "-o", "json"]) == LockHeld.exit_code
            out, err = capsys.readouterr()
            assert main(["check", "lab", "--repair"]) == LockHeld.exit_code
        found = json.loads(out)
        assert {machine["machine"]: len(machine["moved"]) for machine in found["machines"]} == {"bare": 1, "web": 1}
        ((name, why),) = [(machine["machine"], machine["why"]) for machine in found["left_out"]]
        assert (name, "lab is in use by 'commit'" in why) == ("lab", True)
        assert "lab: not checked: machine lab is in use" in err
        assert "hint: try again when it has ended" in err
        assert not any(stray.exists() for stray in strays)
