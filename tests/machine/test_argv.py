"""QEMU's arguments: each profile against its golden file, then what a spec can change, argument by argument.

``QMPSNAP_GOLDEN=write`` writes the golden files anew, and fails all the same: a run that writes is no test.
"""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec.structs import replace

from qmpsnap.machine.config.specfile import parse, read
from qmpsnap.machine.starting.argv import Firmware, Ram, build
from qmpsnap.machine.starting.run_files import RUN_FILES
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import LayerId

PROFILES = Path(__file__).parents[2] / "launch" / "profiles"
GOLDEN = Path(__file__).parent / "golden"
UUID = "6a8c0f2e-5d1b-4c3a-9e7f-0123456789ab"
GUID = "01234567-89ab-4cde-8f01-23456789abcd"
FLASH = Firmware(code="/usr/share/OVMF/OVMF_CODE_4M.fd", vars="/machines/m/vars.fd")
NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))


def chain_of(disk: str, image_format: str = "qcow2") -> Chain:
    """A base and the overlay that the first snapshot made."""
    raw = image_format == "raw"
    base = Layer(
        id=LayerId(f"{disk}-1"),
        path=f"/machines/m/{disk}-1.{image_format}",
        format="raw" if raw else "qcow2",
        backing=None,
        virtual_size=1 << 20,
    )
    top = Layer(
        id=LayerId(f"{disk}-2"),
        path=f"/machines/m/{disk}-2.qcow2",
        format="qcow2",
        backing=base.id,
        virtual_size=1 << 20,
    )
    return Chain(disk, (base, top))


def chains_of(spec: MachineSpec) -> list[Chain]:
    return [chain_of(disk.name, disk.format) for disk in spec.disks]


def spec_of(text: str) -> MachineSpec:
    return parse(f"name: m\n{text}", "m.yaml", folder=Path("/m"), guest_dir=Path("/guest"), profile_dir=PROFILES)


def argv_of(text: str, **changed: Any) -> list[str]:
    spec = spec_of(text)
    given: dict[str, Any] = {"uuid": UUID, "accel": "tcg"} | changed
    return build("qemu", spec, chains_of(spec), **given)


def after(argv: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(argv) if name == option]


def devices(argv: list[str]) -> list[dict[str, Any]]:
    return [json.loads(value) for value in after(argv, "-device")]


def drivers(argv: list[str]) -> list[tuple[str, str | None]]:
    return [(device["driver"], device.get("bus")) for device in devices(argv)]


@pytest.mark.parametrize("name", NAMES)
def test_each_profile_becomes_the_arguments_of_its_golden_file(name: str) -> None:
    spec = read(PROFILES / f"{name}.yaml", guest_dir=Path("/guest"), profile_dir=PROFILES)
    guid = GUID if spec.takes_vmgenid else ""
    argv = build("qemu-system-x86_64", spec, chains_of(spec), uuid=UUID, accel="tcg", firmware=FLASH, vmgenid=guid)
    text = "".join(f"{argument}\n" for argument in argv)
    golden = GOLDEN / f"{name}.argv"
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        golden.write_text(text)
        pytest.fail(f"wrote {golden}: read the difference, then run without QMPSNAP_GOLDEN")
    assert golden.read_text() == text


def test_every_golden_file_has_its_profile() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.argv")) == NAMES


def test_a_profile_is_named_as_its_file() -> None:
    for name in NAMES:
        assert read(PROFILES / f"{name}.yaml", guest_dir=Path("/guest"), profile_dir=PROFILES).name == name


def test_the_same_spec_gives_the_same_arguments() -> None:
    text = "nics: [user, {kind: tap, ifname: tap0}]\ndisks: [{name: vda, size: 1M}, {name: vdb, size: 1M, bus: scsi}]"
    assert argv_of(text) == argv_of(text)


def test_the_security_defaults_are_always_there() -> None:
    argv = argv_of("agent: no")
    assert "-nodefaults" in argv
    assert "-no-user-config" in argv
    assert after(argv, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]


def test_the_key_of_an_encrypted_disk_comes_by_an_inherited_descriptor() -> None:
    disks = "disks: [{name: vda, size: 1M, encryption: {secret-file: k}}, {name: vdb, size: 1M}]"
    argv = argv_of(disks, secrets={"vda": 7})
    secret = {"qom-type": "secret", "id": "qs-secret-vda", "file": "/proc/self/fd/7"}
    assert [json.loads(value) for value in after(argv, "-object")] == [secret]
    nodes = [json.loads(value) for value in after(argv, "-blockdev")]
    told = {node["node-name"]: node.get("encrypt") for node in nodes}
    key = {"format": "luks", "key-secret": "qs-secret-vda"}
    assert told == {"vda-1": key, "vda-2": key, "vdb-1": None, "vdb-2": None}
    assert argv.index("-object") < argv.index("-blockdev")
    with pytest.raises(ValueError, match="has no key"):
        argv_of(disks)


def test_only_a_bridge_may_spawn_its_helper() -> None:
    argv = argv_of("nics: [{kind: bridge, bridge: br0}]")
    assert after(argv, "-sandbox") == ["on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny"]
    assert json.loads(after(argv, "-netdev")[0]) == {"id": "net0", "type": "bridge", "br": "br0"}


def test_every_socket_is_a_bare_name() -> None:
    argv = argv_of("display: vnc")
    for name in RUN_FILES:
        assert any(name in argument for argument in argv), name
        assert "/" not in name
    paths = [part for value in after(argv, "-chardev") for part in value.split(",") if part.startswith("path=")]
    assert paths == ["path=qmp.sock", "path=user.sock", "path=console.sock", "path=agent.sock"]


def test_both_monitors_speak_qmp() -> None:
    assert after(argv_of(""), "-mon") == ["chardev=qmp,mode=control", "chardev=user,mode=control"]


@pytest.mark.parametrize(("paused", "flags"), [(True, 1), (False, 0)])
def test_only_a_paused_start_stops_the_vcpus(paused: bool, flags: int) -> None:  # noqa: FBT001
    assert argv_of("", paused=paused).count("-S") == flags


def test_the_binary_may_be_several_words() -> None:
    argv = build(("ld.so", "--argv0", "qemu"), spec_of(""), [], uuid=UUID, accel="tcg")
    assert argv[:4] == ["ld.so", "--argv0", "qemu", "-name"]


@pytest.mark.parametrize(
    ("text", "accel", "shown", "cpu"),
    [
        ("", "tcg", "tcg,thread=multi", "max"),
        ("", "kvm", "kvm", "host"),
        ("cpu: qemu64,+aes", "kvm", "kvm", "qemu64,+aes"),
        ("cpu: qemu64", "tcg", "tcg,thread=multi", "qemu64"),
    ],
)
def test_the_accelerator_chooses_the_cpu_unless_the_spec_does(text: str, accel: str, shown: str, cpu: str) -> None:
    argv = argv_of(text, accel=accel)
    assert after(argv, "-accel") == [shown]
    assert after(argv, "-cpu") == [cpu]


def test_memory_is_given_in_exact_bytes() -> None:
    argv = argv_of("memory: 1.5G\ncpus: 3")
    assert after(argv, "-m") == ["size=1610612736B"]
    assert after(argv, "-smp") == ["3"]


def test_a_kernel_is_booted_instead_of_the_first_disk() -> None:
    argv = argv_of("kernel: k\ninitrd: i\nappend: a=1,b c\ndisks: [{name: vda, size: 1M}]")
    assert [after(argv, option) for option in ("-kernel", "-initrd", "-append")] == [["/m/k"], ["/m/i"], ["a=1,b c"]]
    assert "bootindex" not in devices(argv)[-1]


def test_without_a_kernel_the_first_disk_is_booted() -> None:
    argv = argv_of("agent: no\ndisks: [{name: vdb, size: 1M}, {name: vda, size: 1M}]")
    assert [(device["id"], device.get("bootindex")) for device in devices(argv)] == [("vdb", 1), ("vda", None)]


def test_every_layer_is_spelled_out_down_to_no_backing() -> None:
    argv = argv_of("disks: [{name: vda, size: 1M}]")
    base, top = (json.loads(value) for value in after(argv, "-blockdev"))
    assert (base["node-name"], base["backing"], base["read-only"]) == ("vda-1", None, True)
    assert (top["node-name"], top["backing"], top["read-only"]) == ("vda-2", "vda-1", False)
    assert devices(argv)[-1]["drive"] == "vda-2"


def test_a_comma_in_a_path_stays_in_its_json() -> None:
    spec = spec_of("agent: no\ndisks: [{name: vda, size: 1M}]")
    chain = chain_of("vda")
    odd = replace(chain, layers=(replace(chain.layers[0], path='/odd,file="x" é.qcow2'), chain.layers[1]))
    argv = build("qemu", spec, [odd], uuid=UUID, accel="tcg")
    assert json.loads(after(argv, "-blockdev")[0])["file"]["filename"] == '/odd,file="x" é.qcow2'


def test_scsi_disks_share_one_controller() -> None:
    argv = argv_of("agent: no\ndisks: [{name: a, size: 1M, bus: scsi}, {name: b, size: 1M, bus: scsi}]")
    assert drivers(argv) == [("virtio-scsi-pci", None), ("scsi-hd", "qs-scsi.0"), ("scsi-hd", "qs-scsi.0")]
    assert [device.get("scsi-id") for device in devices(argv)] == [None, 0, 1]


SEVEN = "agent: no\ndisks: [" + ", ".join(f"{{name: s{i}, size: 1M, bus: sata}}" for i in range(7)) + "]\n"


@pytest.mark.parametrize("machine", ["q35", "pc-q35-7.2"])
def test_sata_disks_take_the_ports_q35_has_and_then_a_controller(machine: str) -> None:
    argv = argv_of(f"{SEVEN}machine: {machine}")
    own = [("ide-hd", f"ide.{port}") for port in range(6)]
    assert drivers(argv) == [*own, ("ich9-ahci", None), ("ide-hd", "qs-sata1.0")]


def test_sata_disks_bring_their_controller_to_another_machine() -> None:
    argv = argv_of(f"{SEVEN}machine: pc")
    first = [("ide-hd", f"qs-sata0.{port}") for port in range(6)]
    assert drivers(argv) == [("ich9-ahci", None), *first, ("ich9-ahci", None), ("ide-hd", "qs-sata1.0")]


def test_ide_disks_take_the_two_channels_of_a_pc() -> None:
    disks = ", ".join(f"{{name: d{number}, size: 1M, bus: ide}}" for number in range(4))
    argv = argv_of(f"agent: no\nmachine: pc\ndisks: [{disks}]")
    assert drivers(argv) == [("ide-hd", f"ide.{channel}") for channel in (0, 0, 1, 1)]
    assert [device["unit"] for device in devices(argv)] == [0, 1, 0, 1]


@pytest.mark.parametrize(("machine", "place"), [("q35", ("ide.5", 0)), ("pc", ("ide.1", 1))])
def test_a_cdrom_is_read_only_and_boots_behind_the_first_disk(machine: str, place: tuple[str, int]) -> None:
    argv = argv_of(f"agent: no\nmachine: {machine}\ncdrom: /i.iso\ndisks: [{{name: vda, size: 1M}}]")
    device = devices(argv)[-1]
    assert (device["driver"], device["bus"], device["unit"], device["bootindex"]) == ("ide-cd", *place, 2)
    node = json.loads(after(argv, "-blockdev")[-1])
    assert (node["node-name"], node["read-only"], node["driver"]) == (device["drive"], True, "raw")


def test_a_card_is_of_its_model() -> None:
    argv = argv_of("agent: no\nnics: [{model: e1000e}, user]")
    assert [driver for driver, _ in drivers(argv)] == ["e1000e", "virtio-net-pci"]


@pytest.mark.parametrize("bus", ["virtio", "scsi", "sata", "nvme"])
def test_a_disk_bears_its_name_as_id_and_serial(bus: str) -> None:
    device = devices(argv_of(f"disks: [{{name: data, size: 1M, bus: {bus}}}]"))[-1]
    assert (device["id"], device["serial"]) == ("data", "data")
    assert "share-rw" not in device


@pytest.mark.parametrize(
    ("cache", "write_cache", "direct", "no_flush"),
    [
        ("writeback", "on", False, False),
        ("none", "on", True, False),
        ("writethrough", "off", False, False),
        ("directsync", "off", True, False),
        ("unsafe", "on", False, True),
    ],
)
def test_a_cache_mode_means_what_it_means_to_qemu(
    cache: str,
    write_cache: str,
    direct: bool,  # noqa: FBT001
    no_flush: bool,  # noqa: FBT001
) -> None:
    argv = argv_of(f"disks: [{{name: vda, size: 1M, cache: {cache}}}]")
    assert devices(argv)[-1]["write-cache"] == write_cache
    for value in after(argv, "-blockdev"):
        assert json.loads(value)["cache"] == {"direct": direct, "no-flush": no_flush}


def test_no_id_of_ours_can_be_a_disks_name() -> None:
    argv = argv_of("display: vnc\nnics: [user]\ndisks: [{name: a, size: 1M, bus: scsi}, {name: scsi0, size: 1M}]")
    ours = [device["id"] for device in devices(argv) if device["id"] not in ("a", "scsi0")]
    assert ours == ["qs-vga", "qs-serial", "qs-agent", "qs-scsi", "qs-nic0"]


def test_a_microvm_has_no_pci_devices() -> None:
    text = "machine: microvm\nnics: [user]\ndisks: [{name: a, size: 1M}, {name: b, size: 1M, bus: scsi}]"
    assert [driver for driver, _ in drivers(argv_of(text))] == [
        "virtio-serial-device",
        "virtserialport",
        "virtio-blk-device",
        "virtio-scsi-device",
        "scsi-hd",
        "virtio-net-device",
    ]


@pytest.mark.parametrize(
    ("text", "accel", "append"),
    [
        ("machine: microvm\nkernel: k\nappend: quiet", "tcg", ["quiet tsc_early_khz=2445430"]),
        ("machine: microvm\nkernel: k", "tcg", ["tsc_early_khz=2445430"]),
        ("machine: microvm\nkernel: k\nappend: tsc_early_khz=1", "tcg", ["tsc_early_khz=1"]),
        ("machine: microvm\nkernel: k\nappend: quiet", "kvm", ["quiet"]),
        ("machine: microvm", "tcg", []),
        ("machine: q35\nkernel: k\nappend: quiet", "tcg", ["quiet"]),
    ],
)
def test_linux_on_a_microvm_under_tcg_is_told_the_rate_of_its_only_clock(
    text: str, accel: str, append: list[str]
) -> None:
    assert after(argv_of(text, accel=accel, tsc_khz=2_445_430), "-append") == append


def test_uefi_is_two_flash_nodes_of_which_the_code_is_read_only() -> None:
    argv = argv_of("firmware: uefi", firmware=FLASH)
    code, variables = (json.loads(value) for value in after(argv, "-blockdev"))
    assert (code["file"]["filename"], code["read-only"], code["file"]["read-only"]) == (FLASH.code, True, True)
    assert (variables["file"]["filename"], variables["read-only"]) == (FLASH.vars, False)
    assert after(argv, "-machine") == ["q35,pflash0=uefi-code,pflash1=uefi-vars,dump-guest-core=off"]


def test_uefi_without_its_images_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="wants UEFI"):
        argv_of("firmware: uefi")


def test_a_disk_without_a_chain_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="disk vda of machine m has no chain"):
        build("qemu", spec_of("disks: [{name: vda, size: 1M}]"), [chain_of("vdb")], uuid=UUID, accel="tcg")


def test_forwards_listen_on_the_loopback_unless_told_otherwise() -> None:
    argv = argv_of("nics: [{forwards: ['2222:22', {host: 53, guest: 5353, protocol: udp, address: 0.0.0.0}]}]")
    assert json.loads(after(argv, "-netdev")[0]) == {
        "id": "net0",
        "type": "user",
        "hostfwd": [{"str": "tcp:127.0.0.1:2222-:22"}, {"str": "udp:0.0.0.0:53-:5353"}],
    }
    assert devices(argv)[-1]["romfile"] == ""


def test_a_tap_runs_no_script() -> None:
    argv = argv_of("nics: [{kind: tap, ifname: tap0}]")
    assert json.loads(after(argv, "-netdev")[0]) == {
        "id": "net0",
        "type": "tap",
        "ifname": "tap0",
        "script": "no",
        "downscript": "no",
    }


def test_cards_without_a_mac_differ_between_cards_and_machines() -> None:
    text = "nics: [user, user, {mac: '52:54:00:AA:bb:cc'}]"
    here = [device["mac"] for device in devices(argv_of(text)) if "mac" in device]
    there = [device["mac"] for device in devices(argv_of(text, uuid=UUID[::-1])) if "mac" in device]
    assert here[2] == there[2] == "52:54:00:aa:bb:cc"
    assert len({*here, *there}) == 5
    assert all(mac.startswith("52:54:00:") and len(mac) == 17 for mac in here)


def test_no_nics_no_agent_no_display_is_no_device_at_all() -> None:
    argv = argv_of("agent: no\nnics: none")
    assert not after(argv, "-device")
    assert not after(argv, "-netdev")
    assert after(argv, "-display") == ["none"]


def test_vnc_listens_on_a_socket_in_the_run_folder() -> None:
    argv = argv_of("display: vnc")
    assert after(argv, "-display") == ["vnc=unix:vnc.sock"]
    assert ("VGA", None) in drivers(argv)


def test_extra_arguments_come_last_so_that_they_win() -> None:
    assert argv_of("extra: [-m, '512']")[-2:] == ["-m", "512"]


def test_a_log_folder_with_a_comma_is_one_option() -> None:
    argv = build("qemu", spec_of(""), [], uuid=UUID, accel="tcg", logs="/data/a,b/logs/web")
    assert any(word.endswith(",logfile=/data/a,,b/logs/web/console.log,logappend=on") for word in argv)


@pytest.mark.parametrize(
    ("accel", "exact", "cpu"),
    [("tcg", False, "base,avx=on"), ("tcg", True, "base,avx=on,enforce=on"), ("kvm", True, "host")],
)
def test_a_recorded_cpu_is_enforced_where_memory_is_loaded(
    *, accel: Literal["kvm", "tcg"], exact: bool, cpu: str
) -> None:
    spec = replace(spec_of(""), tcg_cpu="base,avx=on")
    argv = build("qemu", spec, [], uuid=UUID, accel=accel, exact=exact)
    assert argv[argv.index("-cpu") + 1] == cpu


def test_memory_in_a_file_has_the_name_that_a_stream_without_one_gives_it() -> None:
    argv = argv_of("machine: pc-q35-7.2\nmemory: 64M", ram=Ram(7))
    (memory,) = (json.loads(value) for value in after(argv, "-object"))
    assert memory == {
        "qom-type": "memory-backend-file",
        "id": "pc.ram",
        "size": 64 << 20,
        "mem-path": "/proc/self/fd/7",
        "share": False,
        "x-use-canonical-path-for-ramblock-id": False,
    }
    assert after(argv, "-machine") == ["pc-q35-7.2,memory-backend=pc.ram,dump-guest-core=off"]
    microvm = after(argv_of("machine: microvm", ram=Ram(7)), "-machine")[0]
    assert microvm.startswith("microvm,memory-backend=microvm.ram")
    read_only = json.loads(after(argv_of("", ram=Ram(7, read_only=True)), "-object")[0])
    assert (read_only["readonly"], read_only["rom"]) == (True, "off")


def test_blank_disks_have_no_image() -> None:
    argv = argv_of("disks: [{name: vda, size: 1M}, {name: vdb, size: 1M, format: raw}]", blank=True)
    nodes = [json.loads(value) for value in after(argv, "-blockdev")]
    assert [(node["node-name"], node["driver"], node["size"]) for node in nodes] == [
        ("vda-2", "null-co", 1 << 20),
        ("vdb-2", "null-co", 1 << 20),
    ]
    assert not any("/machines/" in word for word in argv)
