"""In the guest: the driver for logical volumes, verb by verb, with what it has to refuse."""

import os
import subprocess
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest

from qmpsnap.errors import HostCannot, ImageInUse, NotFoundError, QmpsnapError, StateError, StoreMismatch
from qmpsnap.model.names import OperationId
from qmpsnap.volumes import lvm_merge
from qmpsnap.volumes.driver import Volume
from qmpsnap.volumes.lvm import Lvm
from qmpsnap.volumes.names import VolumeName

from .conftest import GROUP, POOL, tool

T = TypeVar("T")

MACHINE = "0123456789abcdef0123456789abcdef"
MIB = 1 << 20
DRIVER = Lvm()


def do(verb: Callable[..., Coroutine[Any, Any, T]], *arguments: object) -> T:
    return anyio.run(partial(verb, *arguments))


def name(operation: int, role: Any = "snapshot", disk: str = "vda") -> VolumeName:
    return VolumeName.of(MACHINE, OperationId(operation), disk, role)


def volume(lv: str, size: int = 0) -> Volume:
    """As a layer's record has it."""
    uuid = tool("lvs", "--noheadings", "-o", "lv_uuid", f"{GROUP}/{lv}")
    return Volume(path=f"/dev/{GROUP}/{lv}", identity=f"lvm:{uuid}", bytes=size)


def thin(lv: str = "thin", size: int = 32) -> Volume:
    tool("lvcreate", "-y", "-V", f"{size}M", "--thinpool", f"{GROUP}/{POOL}", "-n", lv)
    return volume(lv, size * MIB)


def thick(lv: str = "thick", size: int = 32) -> Volume:
    tool("lvcreate", "-y", "-L", f"{size}M", "-n", lv, GROUP)
    return volume(lv, size * MIB)


def write(path: str, byte: bytes, at: int, count: int = 1) -> None:
    """MiB of one byte, on the disk when it returns."""
    descriptor = os.open(path, os.O_WRONLY)
    for part in range(at, at + count):
        os.pwrite(descriptor, byte * MIB, part * MIB)
    os.fsync(descriptor)
    os.close(descriptor)


def read(path: str, at: int) -> bytes:
    """The first byte of a MiB, by the device itself."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(descriptor, 1, at * MIB)
        finally:
            os.close(descriptor)
    return b""


def names() -> set[str]:
    return set(tool("lvs", "--noheadings", "-o", "lv_name", GROUP).split()) - {POOL}


def test_a_thin_snapshot_keeps_what_was_there_and_a_clone_of_it_can_be_written_to() -> None:
    origin = thin()
    write(origin.path, b"a", 1)
    ability = do(DRIVER.probe, origin)
    assert (ability.able, ability.reserve, ability.clone_moves) == (True, 0, 0)
    kept = do(DRIVER.snapshot, origin, name(17))
    assert (kept.path, kept.name, kept.state, kept.bytes) == (
        DRIVER.where(origin, name(17)), name(17), "ok", origin.bytes
    )  # fmt: skip
    assert Path(kept.path).exists()
    write(origin.path, b"b", 1)
    clone = do(DRIVER.clone, kept, name(18, "clone"))
    assert (read(clone.path, 1), read(origin.path, 1)) == (b"a", b"b")
    write(clone.path, b"c", 1)
    assert (read(clone.path, 1), read(origin.path, 1)) == (b"c", b"b")
    again = do(DRIVER.clone, kept, name(19, "clone"))
    assert read(again.path, 1) == b"a"
    tool("vgchange", "-an", GROUP)
    tool("vgchange", "-ay", GROUP)
    assert (read(again.path, 1), Path(kept.path).exists()) == (b"a", False)  # no boot activates it
    do(DRIVER.activate, [kept.path, f"/dev/{GROUP}/gone"])
    assert read(kept.path, 1) == b"a"
    assert {one.path: one for one in do(DRIVER.list, origin, MACHINE)} == {
        one.path: one for one in (kept, clone, again)
    }
    assert 1 * MIB <= do(DRIVER.size, clone).own < 2 * MIB
    do(DRIVER.remove, kept)  # its clones live on
    do(DRIVER.remove, kept)
    do(DRIVER.remove, clone)
    assert (read(again.path, 1), names()) == (b"a", {"thin", name(19, "clone").text})


def test_a_thick_snapshot_has_a_size_and_its_clone_is_a_copy() -> None:
    origin = thick()
    write(origin.path, b"a", 1, 3)
    write(origin.path, b"z", 31)
    driver = Lvm(thick="40%")
    ability = do(driver.probe, origin)
    assert (ability.able, ability.reserve, ability.clone_moves) == (True, 16 * MIB, 32 * MIB)
    kept = do(driver.snapshot, origin, name(17))
    assert (kept.state, kept.bytes) == ("ok", 32 * MIB)
    write(origin.path, b"b", 1, 3)
    size = do(driver.size, kept)
    assert (size.own, size.full and 0.15 < size.full < 0.25) == (16 * MIB, True)
    clone = do(driver.clone, kept, name(18, "clone"))
    assert [read(clone.path, at) for at in (1, 3, 31)] == [b"a", b"a", b"z"]
    assert (read(origin.path, 1), read(kept.path, 1)) == (b"b", b"a")
    write(clone.path, b"c", 1)
    found = do(driver.list, origin, MACHINE)
    assert [(one.path, one.state, one.bytes) for one in found] == [(one.path, "ok", 32 * MIB) for one in (clone, kept)]
    on_clone = do(driver.snapshot, clone, name(19))
    with pytest.raises(StateError, match=name(19).text):
        do(driver.remove, clone)  # LVM would remove its snapshots as well
    for one in (on_clone, clone, kept):
        do(driver.remove, one)
    assert names() == {"thick"}


def test_a_thick_snapshot_that_has_run_full_is_invalid() -> None:
    origin = thick()
    kept = do(Lvm(thick="4M").snapshot, origin, name(17))
    write(origin.path, b"b", 0, 8)
    (found,) = do(DRIVER.list, origin, MACHINE)
    assert (found.path, found.state) == (kept.path, "invalid")
    assert do(DRIVER.size, kept).full == 1
    with pytest.raises(StateError, match="has run full"):
        do(DRIVER.clone, kept, name(18, "clone"))
    do(DRIVER.remove, found)
    assert names() == {"thick"}


def test_a_thick_snapshot_is_merged_into_its_origin_and_taken_anew() -> None:
    origin = thick()
    write(origin.path, b"a", 1, 3)
    kept = do(Lvm(thick="40%").snapshot, origin, name(17))
    write(origin.path, b"b", 1, 3)
    found = do(lvm_merge.mergeable, kept, origin)
    assert found
    assert (found.reserve, 3 * MIB <= found.moves < 4 * MIB) == (16 * MIB, True)
    merge = partial(lvm_merge.merge, kept, origin, reserve=found.reserve)
    descriptor = os.open(kept.path, os.O_RDONLY)
    assert do(lvm_merge.mergeable, kept, origin) is None
    with pytest.raises(ImageInUse, match="is open"):
        do(merge)
    os.close(descriptor)
    tool("udevadm", "settle")
    anew = do(merge)
    assert (anew.path, anew.bytes, anew.name, anew.identity != kept.identity) == (
        kept.path, kept.bytes, kept.name, True
    )  # fmt: skip
    write(origin.path, b"c", 1)
    assert [read(path, at) for path in (origin.path, kept.path) for at in (1, 3)] == [b"c", b"a", b"a", b"a"]
    assert do(merge) == anew  # as after an interruption: it is done
    tool("lvconvert", "--merge", kept.path.removeprefix("/dev/"))
    again = do(merge)  # the snapshot is gone, and lacks
    assert (read(origin.path, 1), again.path, do(DRIVER.size, again).own) == (b"a", kept.path, 16 * MIB)
    do(Lvm(thick="4M").snapshot, origin, name(18))
    assert do(lvm_merge.mergeable, again, origin) is None  # it could be filled by the merge


def test_what_is_no_snapshot_yet_is_a_part() -> None:
    """LVM makes a plain volume first; a copy has a name of its own until it is whole."""
    origin = thick()
    for lv in (name(17).text, f"{name(18, 'clone').text}.part"):
        thick(lv, 4)
    found = do(DRIVER.list, origin, MACHINE)
    assert [(one.name, one.state) for one in found] == [(name(18, "clone"), "part"), (name(17), "part")]
    assert do(DRIVER.list, origin, "f" * 32) == ()
    for one in found:
        do(DRIVER.remove, one)
    assert names() == {"thick"}


@pytest.mark.parametrize("make", [thin, thick])
def test_what_is_refused_changes_nothing(make: Callable[[], Volume]) -> None:
    origin = make()
    kept = do(DRIVER.snapshot, origin, name(17))
    before = tool("lvs", "--noheadings", "-o", "lv_name,lv_uuid,lv_attr", GROUP)
    other = Volume(path=origin.path, identity=kept.identity)
    gone = Volume(path=f"/dev/{GROUP}/gone", identity=kept.identity)
    group = Volume(path="/dev/gone/gone")
    for verb, arguments, error, words in (
        (DRIVER.snapshot, (origin, name(17)), StateError, "already"),
        (DRIVER.clone, (kept, name(17)), StateError, "already"),
        (DRIVER.snapshot, (other, name(18)), StoreMismatch, "another volume"),
        (DRIVER.clone, (other, name(18, "clone")), StoreMismatch, "another volume"),
        (DRIVER.remove, (other,), StoreMismatch, "another volume"),
        (DRIVER.remove, (origin,), StoreMismatch, "another volume"),  # ours, but by no name of ours
        (DRIVER.snapshot, (gone, name(18)), NotFoundError, "no logical volume"),
        (DRIVER.clone, (gone, name(18, "clone")), NotFoundError, "no logical volume"),
        (DRIVER.size, (gone,), NotFoundError, "no logical volume"),
        (DRIVER.probe, (group,), NotFoundError, "no volume group"),
        (DRIVER.list, (group, MACHINE), NotFoundError, "no volume group"),
    ):
        with pytest.raises(error, match=words) as refused:
            do(verb, *arguments)
        assert refused.value.effect == "none"
    assert tool("lvs", "--noheadings", "-o", "lv_name,lv_uuid,lv_attr", GROUP) == before


def test_a_volume_that_is_open_is_not_removed() -> None:
    kept = do(DRIVER.snapshot, thin(), name(17))
    clone = do(DRIVER.clone, kept, name(18, "clone"))
    descriptor = os.open(clone.path, os.O_RDONLY)
    with pytest.raises(ImageInUse, match="is open"):
        do(DRIVER.remove, clone)
    os.close(descriptor)
    tool("udevadm", "settle")
    do(DRIVER.remove, clone)
    assert names() == {"thin", kept.path.rpartition("/")[2]}


def test_a_pool_or_group_without_room_is_refused_before_anything() -> None:
    origin, bulk = thin(), thin("bulk", 256)
    kept = do(DRIVER.snapshot, origin, name(17))
    write(bulk.path, b"x", 0, 200)
    for verb, arguments in ((DRIVER.snapshot, (origin, name(18))), (DRIVER.clone, (kept, name(18, "clone")))):
        with pytest.raises(HostCannot, match=r"less than 64 MiB are free") as refused:
            do(verb, *arguments)
        assert refused.value.effect == "none"
    assert not do(DRIVER.probe, origin).able
    large = thick("large", 500)
    with pytest.raises(HostCannot, match=r"bytes free") as refused:
        do(Lvm(thick="100%").snapshot, large, name(18))
    assert (refused.value.effect, names()) == ("none", {"thin", "bulk", "large", name(17).text})


def test_no_name_is_taken_for_an_option() -> None:
    for path in (f"/dev/{GROUP}/--help", "/dev/-h/x", "/dev/vg0/a b", "/dev/vg0/..", "/dev/sda", "/dev/vg0/x/y", "--"):
        assert "is no logical volume" in do(DRIVER.probe, Volume(path=path)).why
        with pytest.raises(QmpsnapError, match="is no logical volume"):
            do(DRIVER.snapshot, Volume(path=path), name(17))
    origin = thin("+a.b_c-d")
    kept = do(DRIVER.snapshot, origin, name(17))
    assert do(DRIVER.list, origin, MACHINE) == (kept,)


def test_a_snapshot_of_a_snapshot_is_refused_with_the_reason() -> None:
    kept = do(DRIVER.snapshot, thick(), name(17))
    assert "is a snapshot itself" in do(DRIVER.probe, kept).why
    assert "is a part of other volumes" in do(DRIVER.probe, volume(POOL)).why
    assert do(DRIVER.probe, None).able


def test_a_program_that_does_not_end_is_left_and_does_its_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed, it could leave the origin suspended."""
    origin = thin()
    slow = tmp_path / "lvcreate"
    slow.write_text('#!/bin/sh\nwhile [ ! -e "$0.go" ]; do sleep 0.1; done\n/sbin/lvcreate "$@"\n: >"$0.done"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("qmpsnap.volumes.lvm._PATIENCE", 2.0)
    monkeypatch.setenv("QMPSNAP_STORAGE_DEADLINE", "1")
    with pytest.raises(QmpsnapError, match="lvcreate") as late:
        do(DRIVER.snapshot, origin, name(17))
    assert (late.value.code, late.value.effect, do(DRIVER.list, origin, MACHINE)) == ("storage-hangs", "unknown", ())
    Path(f"{slow}.go").touch()
    subprocess.run(["timeout", "60", "sh", "-c", f"until [ -e {slow}.done ]; do sleep 0.1; done"], check=True)
    assert [one.state for one in do(DRIVER.list, origin, MACHINE)] == ["ok"]
