"""What LVM's programs are told, and what is made of their answers, as LVM 2.03.16 has given them in the guest."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, ImageInUse, UsageError
from qmpsnap.model.names import OperationId
from qmpsnap.volumes import lvm as lvm_driver
from qmpsnap.volumes import lvm_merge
from qmpsnap.volumes import lvm_report as lvm
from qmpsnap.volumes.driver import Volume
from qmpsnap.volumes.lvm import Lvm, judge
from qmpsnap.volumes.lvm_report import LogicalVolume, Place
from qmpsnap.volumes.names import VolumeName

RECORDED = Path(__file__).parent / "recorded"
MACHINE = "0123456789abcdef0123456789abcdef"
MIB = 1 << 20
THIN, THICK = Place("vg0", "thin"), Place("vg0", "thick")


def recorded(name: str) -> dict[str, LogicalVolume]:
    return lvm.parse((RECORDED / f"{name}.json").read_bytes())


def snapshot(operation: int, disk: str) -> str:
    return VolumeName.of(MACHINE, OperationId(operation), disk).text


def test_volumes_are_read_from_the_report() -> None:
    found = recorded("lvs")
    seen = {name: (one.is_thin, one.is_thick_snapshot, one.is_invalid, one.seen // MIB) for name, one in found.items()}
    assert seen == {
        "pool": (False, False, False, 200),
        "thin": (True, False, False, 300),
        snapshot(17, "vda"): (True, False, False, 300),
        f"qc-{MACHINE}-19-vda": (True, False, False, 300),
        "thick": (False, False, False, 100),
        snapshot(17, "vdb"): (False, True, True, 100),
        snapshot(18, "vdb"): (False, True, False, 100),
        f"qc-{MACHINE}-20-vdb.part": (False, False, False, 8),
        snapshot(21, "vdb"): (False, False, False, 8),
    }  # fmt: skip
    assert found[snapshot(17, "vda")].origin_uuid == found["thin"].lv_uuid
    assert found["thin"].mapped == pytest.approx(20 * MIB, abs=64 << 10)
    assert recorded("gone") == {}


def test_ours_are_told_by_their_names() -> None:
    ours = lvm.ours(recorded("lvs"), "01234567-89ab-cdef-0123-456789abcdef")
    assert [(name.role, name.operation, name.disk) for name, _ in ours] == [
        ("clone", 19, "vda"), ("clone", 20, "vdb"), ("snapshot", 17, "vda"), ("snapshot", 17, "vdb"),
        ("snapshot", 18, "vdb"), ("snapshot", 21, "vdb"),
    ]  # fmt: skip
    assert lvm.ours(recorded("lvs"), "f" * 32) == []


def test_a_report_that_is_not_understood_is_an_error() -> None:
    for text in (b"", b"{}", b'{"report": [{"lv": [{"lv_uuid": "x"}]}]}', b"  Volume group not found"):
        with pytest.raises(HostCannot, match="not understood"):
            lvm.parse(text)


def test_a_volume_is_judged_by_its_kind_and_by_the_figures_of_its_pool_or_group() -> None:
    found = recorded("lvs")
    assert judge(THIN, found["thin"], found, "20%").able
    thick = judge(THICK, found["thick"], found, "20%")
    assert (thick.able, thick.reserve, thick.clone_moves) == (True, 24 * MIB, 100 * MIB)
    assert "20% of" in thick.note
    crowded = replace(found["thick"], vg_free=str(20 * MIB))
    assert "20971520 bytes free" in judge(THICK, crowded, found, "20%").why
    for name, words in ((snapshot(18, "vdb"), "is a snapshot itself"), ("pool", "is a part of other volumes")):
        assert words in judge(Place("vg0", name), found[name], found, "20%").why
    full = recorded("full")
    assert "thin pool vg0/pool is 100.00% full" in judge(THIN, full["thin"], full, "20%").why
    off = recorded("inactive")
    assert "does not say how full it is" in judge(THIN, off["thin"], off, "20%").why


@pytest.mark.parametrize(
    ("setting", "size"),
    [("20%", 24), ("1%", 4), ("100%", 104), ("999%", 104), ("1M", 4), ("10M", 12), ("1G", 104), ("1T", 104)],
)
def test_the_size_of_a_thick_snapshot_is_in_whole_extents_and_no_more_than_it_can_use(setting: str, size: int) -> None:
    assert lvm.thick_size(setting, 100 * MIB, 4 * MIB) == size * MIB


@pytest.mark.parametrize("setting", ["", "20", "0%", "%", "-5%", "20%%", "1.5G", "5K", "5 G", "0G", "5G\n", "--help"])
def test_other_sizes_are_refused(setting: str) -> None:
    with pytest.raises(UsageError, match="is no size of a thick LVM snapshot"):
        lvm.thick_size(setting, 100 * MIB, 4 * MIB)


def test_a_path_is_taken_apart_only_if_lvm_could_have_made_it() -> None:
    assert Place.parse("/dev/vg0/thin") == THIN
    assert Place.parse("/dev/a+b_c.d-e/.x") == Place("a+b_c.d-e", ".x")
    for path in (
        "/dev/vg0/-thin", "/dev/-vg0/thin", "/dev/vg0/..", "/dev/./x", "/dev/vg0/a/b", "/dev/vg0/", "/dev/vg0",
        "/dev/mapper/vg0-thin\n", "/dev/vg0/a b", "dev/vg0/thin", "/dev/vg0/thin\n", f"/dev/vg0/{'a' * 128}",
    ):  # fmt: skip
        assert Place.parse(path) is None, path


def test_arguments_end_with_names_that_are_no_options() -> None:
    name = snapshot(17, "vda")
    uuid = recorded("lvs")["thin"].lv_uuid
    for argv in (
        lvm.list_volumes("vg0"),
        lvm.thin_snapshot(THIN, name),
        lvm.thick_snapshot(THICK, name, 8 * MIB),
        lvm.thin_clone(Place("vg0", name), name),
        lvm.plain_volume("vg0", name, 8 * MIB),
        lvm.rename(THICK, name),
        lvm.merge(Place("vg0", name)),
        lvm.refresh(THICK),
        lvm.remove("vg0", uuid),
    ):
        at = argv.index("--")
        assert not any(word.startswith("-") for word in argv[at + 1 :])
        assert "/dev/" not in " ".join(argv)
    assert lvm.remove("vg0", uuid)[2:4] == ["--select", f'lv_uuid="{uuid}" && lv_role!={{thickorigin}}']


def test_the_last_line_that_is_no_warning_says_what_failed() -> None:
    said = (
        b"  WARNING: Sum of all thin volume sizes (600.00 MiB) exceeds ...\n  Volume \x1b[1mx failed.\n  WARNING: y\n"
    )
    assert lvm.last_line(said) == "Volume \\x1b[1mx failed."
    assert lvm.last_line(b"  WARNING: y\n") == "it does not say why"


async def test_the_driver_says_what_this_host_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qmpsnap.volumes.lvm.SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no lvs program" in (await Lvm().probe(None)).why
    for program in ("lvs", "lvcreate", "lvremove"):
        (tmp_path / program).touch(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root" in (await Lvm().probe(None)).why
    assert "only root" in (await Lvm().probe(Volume(path="/dev/vg0/thin"))).why


async def test_a_merge_waits_for_who_has_a_volume_open_and_is_begun_again_where_it_is_deferred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = VolumeName.of(MACHINE, OperationId(17), "vdb")
    found = recorded("lvs")
    origin = found["thick"]
    kept = replace(found[name.text], origin_uuid=origin.lv_uuid, lv_attr="sri-a-s---")
    anew = replace(kept, lv_uuid="n-e-w")
    opened, merging = replace(origin, lv_attr="owi-aos---"), replace(origin, lv_attr="Owi-a-s---")
    looks: list[tuple[LogicalVolume, ...]] = [(opened, kept)]
    ran: list[list[str]] = []

    async def listed(_: str) -> dict[str, LogicalVolume]:
        look = looks.pop(0) if len(looks) > 1 else looks[0]
        return {one.lv_name: one for one in look}

    async def run(argv: list[str]) -> str:
        ran.append(argv)
        return ""

    for module in (lvm_merge, lvm_driver):
        monkeypatch.setattr(module, "listed", listed)
        monkeypatch.setattr(module, "run", run)
    for limit, seconds in (("_INTERVAL", 0.001), ("_RETRY", 0.0005)):
        monkeypatch.setattr(lvm_merge, limit, seconds)
    volume = Volume(path=f"/dev/vg0/{name.text}", identity=kept.identity, name=name)
    with pytest.raises(ImageInUse, match="vg0/thick is open"):
        await lvm_merge.merge(volume, Volume(path="/dev/vg0/thick", identity=origin.identity), reserve=8 * MIB)
    monkeypatch.setattr(lvm_merge, "_RETRY", 5.0)
    looks[:] = [(opened, kept), (origin, kept), (merging,), (origin,), (origin, anew)]
    made = await lvm_merge.merge(volume, Volume(path="/dev/vg0/thick", identity=origin.identity), reserve=8 * MIB)
    assert (made.path, made.identity, [argv[0] for argv in ran]) == (
        volume.path, anew.identity, ["lvconvert", "lvcreate"]
    )  # fmt: skip
    monkeypatch.setattr(lvm_merge, "_RETRY", 0.0005)
    looks[:] = [(merging,), (merging,), (merging,), (origin,), (origin, anew)]
    await lvm_merge.merge(volume, Volume(path="/dev/vg0/thick", identity=origin.identity), reserve=8 * MIB)
    assert {argv[1] for argv in ran[2:-1]} == {"--refresh"}
