"""Specs in YAML: what they mean, and that nothing but a SpecError ever comes of one."""

import re
import string
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpsnap.errors import SpecError
from qmpsnap.machine.config import document
from qmpsnap.machine.config.specfile import checked, parse, read
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.spec import DiskSpec, Encryption, Forward, MachineSpec, NicSpec

PROFILES = Path(__file__).parents[2] / "launch" / "profiles"
GUEST = Path("/guest")


def spec_of(text: str, *, profile_dir: Path = PROFILES) -> MachineSpec:
    return parse(text, "machine.yaml", folder=Path("/vms/web"), guest_dir=GUEST, profile_dir=profile_dir)


def disk_of(text: str) -> DiskSpec:
    (disk,) = spec_of(f"name: web\ndisks:\n- {{name: vda, {text}}}").disks
    return disk


def refusal(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        spec_of(text)
    assert caught.value.exit_code == 2
    assert caught.value.effect == "none"
    return caught.value


# --- what a spec means ------------------------------------------------------------------------------------------------


def test_a_name_is_enough() -> None:
    assert spec_of("name: web") == MachineSpec(name="web")


def test_every_key_has_its_place() -> None:
    text = """\
name: web
machine: pc-q35-7.2
accel: kvm
cpu: Skylake-Client,+aes
cpus: 4
memory: 2G
kernel: boot/vmlinuz
initrd: /boot/initrd
append: "console=ttyS0 root=/dev/vda"
firmware: uefi
disks:
- name: vda
  size: 10GiB
  format: raw
  bus: scsi
  cache: none
  discard: no
- {name: vdb, image: ../data.qcow2, read-only: yes}
- {name: vdc, base: /images/base.raw, format: raw, snapshot: off}
nics:
- user
- kind: user
  mac: 52:54:00:12:34:56
  forwards: [2222:22, {host: 53, guest: 5353, protocol: udp, address: 0.0.0.0}]
- {kind: tap, ifname: tap0}
- {kind: bridge, bridge: br0}
agent: false
display: vnc
extra: [-device, "virtio-rng-pci"]
"""
    assert spec_of(text) == MachineSpec(
        name="web",
        machine="pc-q35-7.2",
        accel="kvm",
        cpu="Skylake-Client,+aes",
        cpus=4,
        memory=2 << 30,
        kernel="/vms/web/boot/vmlinuz",
        initrd="/boot/initrd",
        append="console=ttyS0 root=/dev/vda",
        firmware="uefi",
        disks=(
            DiskSpec(name="vda", size=10 << 30, format="raw", bus="scsi", cache="none", discard=False),
            DiskSpec(name="vdb", image="/vms/data.qcow2", read_only=True),
            DiskSpec(name="vdc", base="/images/base.raw", format="raw", snapshot=False),
        ),
        nics=(
            NicSpec(),
            NicSpec(
                mac="52:54:00:12:34:56",
                forwards=(
                    Forward(host=2222, guest=22),
                    Forward(host=53, guest=5353, protocol="udp", address="0.0.0.0"),  # noqa: S104
                ),
            ),
            NicSpec(kind="tap", ifname="tap0"),
            NicSpec(kind="bridge", bridge="br0"),
        ),
        agent=False,
        display="vnc",
        extra=("-device", "virtio-rng-pci"),
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("64M", 64 << 20),
        ("1G", 1 << 30),
        ("1.5G", 3 << 29),
        ("1GiB", 1 << 30),
        ("1 GiB", 1 << 30),
        ("2t", 2 << 40),
        ("0.5K", 512),
        ("512B", 512),
        ("1048576", 1 << 20),
        ("0x200", 512),
        ("'4096'", 4096),
        ("0010240", 10240),
        ("8191P", 8191 << 50),
    ],
)
def test_a_size_is_bytes_or_has_a_unit_of_1024(size: str, expected: int) -> None:
    assert disk_of(f"size: {size}").size == expected


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("256", 256 << 20), ("'256'", 256 << 20), ("256M", 256 << 20), ("1.5G", 3 << 29), ("16T", 16 << 40)],
)
def test_memory_without_a_unit_is_mib(memory: str, expected: int) -> None:
    assert spec_of(f"name: web\nmemory: {memory}").memory == expected


def test_the_secret_of_an_encrypted_disk_is_a_file_or_comes_later() -> None:
    assert disk_of("size: 1M").encryption is None
    assert disk_of("size: 1M, encryption: {}").encryption == Encryption()
    found = disk_of("size: 1M, encryption: {secret-file: keys/vda}").encryption
    assert found is not None
    assert (found.secret_file or "").endswith("/keys/vda")


@pytest.mark.parametrize("word", ["true", "True", "yes", "Yes", "on", "ON", "'yes'"])
def test_a_flag_understands_the_words_for_true(word: str) -> None:
    assert disk_of(f"size: 1M, read-only: {word}").read_only


@pytest.mark.parametrize("word", ["false", "FALSE", "no", "No", "off", "'off'"])
def test_a_flag_understands_the_words_for_false(word: str) -> None:
    assert not disk_of(f"size: 1M, snapshot: {word}").snapshot


@pytest.mark.parametrize(
    ("nics", "expected"),
    [
        ("none", ()),
        ("[]", ()),
        ("[none]", ()),
        ("[{kind: none}]", ()),
        ("user", (NicSpec(),)),
        ("[user]", (NicSpec(),)),
        ("[{}]", (NicSpec(),)),
        ("[user, user]", (NicSpec(), NicSpec())),
        ("[{mac: '52:54:00:AB:CD:EF'}]", (NicSpec(mac="52:54:00:ab:cd:ef"),)),
        (
            "[{forwards: [127.0.0.2:80:8080/udp]}]",
            (NicSpec(forwards=(Forward(host=80, guest=8080, protocol="udp", address="127.0.0.2"),)),),
        ),
    ],
)
def test_network_cards_have_short_forms(nics: str, expected: tuple[NicSpec, ...]) -> None:
    assert spec_of(f"name: web\nnics: {nics}").nics == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("k", "/vms/web/k"),
        ("./k", "/vms/web/k"),
        ("../k", "/vms/k"),
        ("/boot/k", "/boot/k"),
        ("'@guest/vmlinuz'", "/guest/vmlinuz"),
        ("a b,c", "/vms/web/a b,c"),
    ],
)
def test_a_path_starts_from_the_specs_folder(path: str, expected: str) -> None:
    assert spec_of(f"name: web\nkernel: {path}").kernel == expected


def test_a_symbolic_link_stays_in_the_path(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("/boot")
    (tmp_path / "m.yaml").write_text("name: web\nkernel: current/vmlinuz\n")
    spec = read(tmp_path / "m.yaml", guest_dir=GUEST, profile_dir=PROFILES)
    assert spec.kernel == f"{tmp_path}/current/vmlinuz"


def test_disks_may_share_a_base() -> None:
    spec = spec_of("name: web\ndisks: [{name: vda, base: b}, {name: vdb, base: b}]")
    assert [disk.base for disk in spec.disks] == ["/vms/web/b", "/vms/web/b"]


# --- profiles ---------------------------------------------------------------------------------------------------------


def test_a_profile_gives_what_the_spec_leaves_out() -> None:
    spec = spec_of("profile: guest")
    assert (spec.name, spec.kernel, spec.memory) == ("guest", "/guest/vmlinux", 256 << 20)


def test_the_specs_keys_win_as_a_whole() -> None:
    spec = spec_of("name: mine\nprofile: multi-disk\nmemory: 512\ndisks: [{name: only, size: 1M}]")
    assert (spec.name, spec.memory) == ("mine", 512 << 20)
    assert [disk.name for disk in spec.disks] == ["only"]
    assert spec.kernel == "/guest/vmlinux"


def test_paths_in_a_profile_start_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("name: p\nkernel: k\n")
    assert spec_of("profile: p", profile_dir=tmp_path).kernel == f"{tmp_path}/k"


def test_an_error_in_a_profile_points_into_the_profile(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("name: p\ncpus: none\n")
    with pytest.raises(SpecError, match=rf"{tmp_path}/p\.yaml:2:7: expected 'cpus'"):
        spec_of("profile: p", profile_dir=tmp_path)


def test_profiles_do_not_nest(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("profile: p\n")
    with pytest.raises(SpecError, match=r"p\.yaml:1:1: a profile cannot build on another profile"):
        spec_of("profile: p", profile_dir=tmp_path)


def test_an_unknown_profile_lists_the_known_ones() -> None:
    error = refusal("name: web\nprofile: microwm")
    assert error.message == "machine.yaml:2:10: unknown profile 'microwm'; did you mean 'microvm'?"
    assert error.hint == "profiles: guest, microvm, multi-disk, q35-uefi"


@pytest.mark.parametrize("name", ["../profiles/guest", "/etc/passwd", "''", "'*'", "guest.yaml"])
def test_a_profiles_name_is_no_path(name: str) -> None:
    assert "unknown profile" in refusal(f"profile: {name}").message


def test_a_clash_with_a_profiles_key_is_shown_where_the_user_wrote() -> None:
    error = refusal("profile: microvm\nfirmware: uefi")
    assert error.message == "machine.yaml:2:11: a microvm has no flash for UEFI"


# --- files ------------------------------------------------------------------------------------------------------------


def read_bytes(tmp_path: Path, data: bytes) -> MachineSpec:
    path = tmp_path / "m.yaml"
    path.write_bytes(data)
    return read(path, guest_dir=GUEST, profile_dir=PROFILES)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, b"\xef\xbb\xbfname: web\r\ncpus: 2\r\n").cpus == 2


def test_a_file_that_is_not_utf8_is_refused_where_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"m\.yaml:2:6: this is not UTF-8 text"):
        read_bytes(tmp_path, b"name: web\ncpu: \xff\n")


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="larger than 256 KiB"):
        read_bytes(tmp_path, b"#" * (document.MAX_BYTES + 1))
    with pytest.raises(SpecError, match="larger than 256 KiB"):
        spec_of("#" * (document.MAX_BYTES + 1))


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read(tmp_path / name, guest_dir=GUEST, profile_dir=PROFILES)


def test_the_largest_file_of_the_worst_kind_is_answered_in_time(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nested more than"):
        read_bytes(tmp_path, b"[" * document.MAX_BYTES)


# --- anything at all --------------------------------------------------------------------------------------------------


def only_spec_errors(text: str) -> None:
    try:
        spec = spec_of(text)
    except SpecError as error:
        said = error.message
    else:
        assert msgspec.json.decode(msgspec.json.encode(spec), type=MachineSpec) == spec  # as the store keeps it
        return
    assert re.match(r"machine\.yaml:\d+:\d+: .", said)
    assert said.encode()


KEYS = [
    *("name", "profile", "machine", "accel", "cpu", "cpus", "memory", "kernel", "initrd", "append", "firmware"),
    *("disks", "nics", "agent", "display", "extra", "size", "image", "base", "format", "bus", "cache", "discard"),
    *("read-only", "snapshot", "kind", "mac", "forwards", "ifname", "bridge", "host", "guest", "protocol", "address"),
    *("encryption", "secret-file"),
]
WORDS = [
    *("web", "guest", "microvm", "kvm", "host", "1G", "1.3G", "0", "512", "-1", ".nan", "1e9999", "no", "~", "''"),
    *("'@guest/k'", "uefi", "vnc", "none", "user", "tap", "tap0", "nvme", "2222:22", "52:54:00:12:34:56", "'\\0'"),
    *('"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', "!!int 3", "&a 1", "*a", "9" * 60, "0x" + "f" * 60, "|\n x", "%", "@"),
]
YAMLISH = st.recursive(
    st.sampled_from(WORDS) | st.integers().map(str) | st.floats().map(str),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=6).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=20,
)


@given(st.text(max_size=200))
@settings(deadline=None, derandomize=True)
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    only_spec_errors(text)


@given(st.text(alphabet=string.ascii_lowercase[:6] + " \n\t:-[]{},&*!|>'\"%@#?~.0\\xU", max_size=120))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_punctuation_is_a_spec_or_a_spec_error(text: str) -> None:
    only_spec_errors(text)


@given(st.lists(st.tuples(st.sampled_from(KEYS[:16]), YAMLISH), max_size=6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_structure_is_a_spec_or_a_spec_error(pairs: list[tuple[str, str]]) -> None:
    only_spec_errors("".join(f"{key}: {value}\n" for key, value in pairs))


@given(st.binary(max_size=100))
@settings(deadline=None, derandomize=True)
def test_any_bytes_are_a_spec_or_a_spec_error(data: bytes) -> None:
    only_spec_errors(data.decode("latin-1"))


GOOD: dict[str, Any] = {
    "size": st.integers(1, 1 << 40).map(lambda sectors: sectors * 512),
    "bus": st.sampled_from(["virtio", "scsi", "nvme", "sata"]),
    "snapshot": st.booleans(),
}


@given(st.fixed_dictionaries(GOOD))
@settings(deadline=None, derandomize=True)
def test_what_is_written_is_what_is_read(values: dict[str, Any]) -> None:
    snapshot = "yes" if values["snapshot"] else "no"
    disk = disk_of(f"size: {values['size']}, bus: {values['bus']}, snapshot: {snapshot}")
    assert disk == DiskSpec(name="vda", **values)


# --- what a program says ----------------------------------------------------------------------------------------------


def checked_of(spec: MachineSpec) -> MachineSpec:
    return checked(spec, folder=Path("/vms/web"), guest_dir=GUEST)


@pytest.mark.parametrize("profile", [path.stem for path in PROFILES.glob("*.yaml")])
def test_a_program_may_say_what_a_file_may(profile: str) -> None:
    spec = spec_of(f"profile: {profile}\nname: web\n")
    assert checked_of(spec) == spec


def test_every_value_comes_back() -> None:
    spec = MachineSpec(
        name="web",
        memory=64 << 20,
        kernel='/boot/it\'s "this"',
        append='quiet root="/dev/vda"',
        disks=(
            DiskSpec(name="vda", size=512, cache="unsafe", discard=False, snapshot=False),
            DiskSpec(name="vdb", image="/a: b", format="raw", read_only=True, bus="scsi"),
            DiskSpec(name="vdc", size=1 << 20, encryption=Encryption(secret_file="/run/key")),  # noqa: S106
            DiskSpec(name="vdd", size=1 << 20, encryption=Encryption()),
        ),
        nics=(
            NicSpec(mac="52:54:00:12:34:56", forwards=(Forward(host=2222, guest=22),)),
            NicSpec(kind="tap", ifname="t"),
        ),
        extra=("-device", "x,y=1"),
    )
    assert checked_of(spec) == spec


def test_a_path_of_a_program_starts_where_it_is() -> None:
    image: Any = Path("a.qcow2")
    spec = MachineSpec(name="web", disks=(DiskSpec(name="vda", image=image), DiskSpec(name="b", base="@guest/b")))
    assert [disk.image or disk.base for disk in checked_of(spec).disks] == ["/vms/web/a.qcow2", "/guest/b"]


WRONG: dict[str, MachineSpec] = {
    "'../../web'": MachineSpec(name="../../web"),
    "'vda/../../x'": MachineSpec(name="web", disks=(DiskSpec(name="vda/../../x", size=512),)),
    "two disks have the name 'vda'": MachineSpec(name="web", disks=(DiskSpec(name="vda", size=512),) * 2),
    "another disk uses its image /a": MachineSpec(
        name="web", disks=(DiskSpec(name="vda", image="/a"), DiskSpec(name="vdb", image="/a"))
    ),
    "needs one of 'size', 'image', 'base', 'device', 'rbd'": MachineSpec(name="web", disks=(DiskSpec(name="vda"),)),
    "has both 'size' and 'image'": MachineSpec(name="web", disks=(DiskSpec(name="vda", size=512, image="/a"),)),
    "one of directsync.*found the string 'unsave'; did you mean": MachineSpec(
        name="web",
        disks=(DiskSpec(name="vda", size=512, cache="unsave"),),  # type: ignore[arg-type]
    ),
    "true or false": MachineSpec(name="web", disks=(DiskSpec(name="vda", size=512, snapshot="never"),)),  # type: ignore[arg-type]
    "an interface's name": MachineSpec(name="web", nics=(NicSpec(kind="tap", ifname="t,script=/x"),)),
    "a machine type's name": MachineSpec(name="web", machine="q35,accel=kvm"),
    "multiples of 1M": MachineSpec(name="web", memory=512),
    "'memory' to be a size": MachineSpec(name="web", memory=1.5),  # type: ignore[arg-type]
    "'name' to be 1 to 63 of a-z.*found the number 5": MachineSpec(name=5),  # type: ignore[arg-type]
    "holds the character U\\+0000": MachineSpec(name="web", kernel="/k", append="a\0b"),
    "has a value of an impossible type": MachineSpec(name="web", extra=(object(),)),  # type: ignore[arg-type]
    "'initrd' and 'append' need a 'kernel'": MachineSpec(name="web", append="quiet"),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_program_is_held_to_the_same_rules(why: str) -> None:
    with pytest.raises(SpecError, match=why) as refused:
        checked_of(WRONG[why])
    assert refused.value.message.startswith("the spec")


def test_what_is_no_file_is_raw_and_no_path_but_that_of_its_configuration() -> None:
    text = (
        "name: web\ndisks:\n- {name: vda, device: ../dev/vg0/web}\n"
        "- {name: vdb, rbd: {pool: p, image: i, namespace: n, conf: ceph.conf, user: u}}"
    )
    vda, vdb = spec_of(text).disks
    assert (vda.device, vda.format, vda.storage, vda.existing) == ("/vms/dev/vg0/web", "raw", "host_device", vda.device)
    rbd = RbdImage(pool="p", image="i", namespace="n", conf="/vms/web/ceph.conf", user="u")
    assert (vdb.rbd, vdb.format, vdb.storage, vdb.existing) == (rbd, "raw", "rbd", rbd.filename)
    spec = MachineSpec(name="web", disks=(vda, vdb))
    assert checked_of(spec) == spec
