"""Wrong specs: for each the sentence that says where it is wrong and why, and the hint."""

from pathlib import Path

import pytest

from qmpsnap.errors import SpecError
from qmpsnap.machine.config.specfile import parse

PROFILES = Path(__file__).parents[2] / "launch" / "profiles"


def refusal(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse(text, "machine.yaml", folder=Path("/vms/web"), guest_dir=Path("/guest"), profile_dir=PROFILES)
    assert caught.value.exit_code == 2
    assert caught.value.effect == "none"
    return caught.value


TOP = "expected the spec to be a mapping of keys to values"
WRONG = [
    # keys
    ("name: web\nmemmory: 1G", "2:1: unknown key 'memmory'; did you mean 'memory'?"),
    ("name: web\nMemory: 1G", "2:1: unknown key 'Memory'; did you mean 'memory'?"),
    ("name: web\ncolour: red", "2:1: unknown key 'colour'"),
    ("name: web\n<<: {cpus: 2}", "2:1: unknown key '<<'"),
    ("name: web\n1: 2", "2:1: unknown key '1'"),
    ("name: web\ncpus: 1\ncpus: 2", "3:1: key 'cpus' occurs twice"),
    ("name: web\n'name': web", "2:1: key 'name' occurs twice"),
    ("name: web\n? [a]\n: b", "2:3: expected a word as the key"),
    ("cpus: 2", "1:1: key 'name' is missing"),
    ("name: web\n'cpus` - at `$.memory': 1", "2:1: unknown key 'cpus` - at `$.memory'"),
    ("name: web\nkernel:", "2:8: expected 'kernel' to be a file's path, found nothing"),
    ("name: web\nextra: [~]", "2:9: expected an item of 'extra' to be a string, found nothing"),
    ("name: web\ntcg_cpu: max", "2:1: unknown key 'tcg_cpu'; did you mean 'cpu'?"),
    ("name: web\ndisks: [{name: vda, size: 1M, opened: {}}]", "2:31: unknown key 'opened'"),
    # the document
    ("", "1:1: the document is empty"),
    ("# only a comment\n", "1:1: the document is empty"),
    ("---\n...\n", "1:1: the document is empty"),
    ("just words", f"1:1: {TOP}, found the string 'just words'"),
    ("- name: web", f"1:1: {TOP}, found a list"),
    ("name: web\n---\nname: other", "2:1: not valid YAML: but found another document"),
    ("name: web\n  cpus: 2", "2:7: not valid YAML: mapping values are not allowed here"),
    ("name: web\nkernel: @guest/k", "2:9: not valid YAML: found character '@' that cannot start any token"),
    ("name: web\n\tcpus: 2", "2:1: not valid YAML: found character '\\t' that cannot start any token"),
    ("name: 'web", "1:11: not valid YAML: found unexpected end of stream"),
    ("name: [web", "1:11: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ("name: web\x00", "1:10: character U+0000 is not allowed in YAML"),
    ("name: web\ncpu: \ud800", "2:6: character U+D800 is not allowed in YAML"),
    ("name: &a web", "1:7: anchors (&name) are refused"),
    ("name: *a", "1:7: aliases (*name) are refused"),
    ("name: !!str web", "1:7: tags (!name) are refused"),
    ("name: !!python/object/apply:os.system [x]", "1:7: tags (!name) are refused"),
    ("name: ! web", "1:7: tags (!name) are refused"),
    ("extra: " + "[" * 20, "1:17: nested more than 10 deep"),
    # types
    (
        "name: 12",
        (
            "1:7: expected 'name' to be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
            ", found the number 12"
        ),
    ),
    (
        "name:",
        (
            "1:6: expected 'name' to be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
            ", found nothing"
        ),
    ),
    (
        "name: [web]",
        (
            "1:7: expected 'name' to be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
            ", found a list"
        ),
    ),
    (
        "name: {a: b}",
        (
            "1:7: expected 'name' to be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
            ", found a mapping"
        ),
    ),
    ("name: web\nappend: true", "2:9: expected 'append' to be a string, found the word true"),
    ("name: web\nextra: [-smp, 4]", "2:15: expected an item of 'extra' to be a string, found the number 4"),
    ("name: web\nextra: -smp", "2:8: expected 'extra' to be a list, found the string '-smp'"),
    ("name: web\ndisks: {}", "2:8: expected 'disks' to be a list, found a mapping"),
    (
        "name: web\ndisks: [vda]",
        "2:9: expected an item of 'disks' to be a mapping of keys to values, found the string 'vda'",
    ),
    ("name: web\nnics: tap", "2:7: expected 'nics' to be a list, found the string 'tap'"),
    ("name: web\nagent: maybe", "2:8: expected 'agent' to be true or false, found the string 'maybe'"),
    ("name: web\nagent: 1", "2:8: expected 'agent' to be true or false, found the number 1"),
    ("name: web\nagent: []", "2:8: expected 'agent' to be true or false, found a list"),
    # names and words
    (
        "name: Web",
        (
            "1:7: expected 'name' to be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
            ", found the string 'Web'"
        ),
    ),
    (
        "name: ../web",
        (
            "1:7: expected 'name' to be 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
            ", found the string '../web'"
        ),
    ),
    (
        "name: web\naccel: kvn",
        ("2:8: expected 'accel' to be one of auto, kvm, tcg, found the string 'kvn'; did you mean 'kvm'?"),
    ),
    ("name: web\nfirmware: on", "2:11: expected 'firmware' to be one of bios, uefi, found the string 'on'"),
    ("name: web\ndisplay: false", "2:10: expected 'display' to be one of none, vnc, found the word false"),
    (
        "name: web\nmachine: q35,smm=on",
        ("2:10: expected 'machine' to be a machine type's name such as q35, found the string 'q35,smm=on'"),
    ),
    (
        "name: web\ncpu: 486",
        "2:6: expected 'cpu' to be a CPU model such as max or Skylake-Client,+aes, found the number 486",
    ),
    (
        "name: web\ncpu: -x",
        ("2:6: expected 'cpu' to be a CPU model such as max or Skylake-Client,+aes, found the string '-x'"),
    ),
    ('name: web\nkernel: k\nappend: "a\\nb"', "3:9: 'append' holds the character U+000A"),
    ('name: web\nkernel: "a\\0b"', "2:9: 'kernel' holds the character U+0000"),
    ('name: web\nextra: ["\\ud800"]', "2:9: an item of 'extra' holds the character U+D800"),
    ('name: web\nkernel: "\\UFFFFFFFF"', None),
    # numbers and sizes
    ("name: web\ncpus: 0", "2:7: expected 'cpus' to be a whole number from 1 to 4096, found the number 0"),
    ("name: web\ncpus: 4097", "2:7: expected 'cpus' to be a whole number from 1 to 4096, found the number 4097"),
    ("name: web\ncpus: 1.0", "2:7: expected 'cpus' to be a whole number from 1 to 4096, found the number 1.0"),
    ("name: web\ncpus: true", "2:7: expected 'cpus' to be a whole number from 1 to 4096, found the word true"),
    ("name: web\ncpus: '2'", "2:7: expected 'cpus' to be a whole number from 1 to 4096, found the string '2'"),
    (f"name: web\ncpus: {'9' * 5000}", "2:7: the number is too long"),
    (
        "name: web\nmemory: 0",
        "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most, found the number 0",
    ),
    (
        "name: web\nmemory: -1G",
        (
            "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
            ", found the string '-1G'"
        ),
    ),
    (
        "name: web\nmemory: 17T",
        (
            "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
            ", found the string '17T'"
        ),
    ),
    (
        "name: web\nmemory: 1.3G",
        (
            "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
            ", found the string '1.3G'"
        ),
    ),
    (
        "name: web\nmemory: 1500K",
        (
            "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
            ", found the string '1500K'"
        ),
    ),
    (
        "name: web\nmemory: 1GB",
        (
            "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
            ", found the string '1GB'"
        ),
    ),
    (
        "name: web\nmemory: 1.5",
        (
            "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
            ", found the number 1.5"
        ),
    ),
    (
        "name: web\nmemory: .inf",
        (
            "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
            ", found the number .inf"
        ),
    ),
    (
        "name: web\nmemory: lots",
        (
            "2:9: expected 'memory' to be a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
            ", found the string 'lots'"
        ),
    ),
    # what does not go together
    ("name: web\ninitrd: i", "2:9: 'initrd' and 'append' need a 'kernel'"),
    ("name: web\nappend: quiet", "2:9: 'initrd' and 'append' need a 'kernel'"),
    ("name: web\naccel: tcg\ncpu: host,+aes", "3:6: cpu 'host' needs KVM"),
    ("name: web\nmachine: microvm\nfirmware: uefi", "3:11: a microvm has no flash for UEFI"),
    ("name: web\nmachine: microvm\ndisplay: vnc", "3:10: a microvm has no display"),
    (
        "name: web\nmachine: microvm\ndisks: [{name: a, size: 1M, bus: nvme}]",
        ("3:8: disk 'a': a microvm has no nvme bus"),
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_spec_says_where_and_why(text: str, message: str | None) -> None:
    error = refusal(text)
    if message is None:  # the words are Python's own
        assert error.message.startswith("machine.yaml:2:")
        assert "not valid YAML" in error.message
    else:
        assert error.message == f"machine.yaml:{message}"


WRONG_DISKS = [
    ("{size: 1M}", "2:9: key 'name' is missing"),
    ("{name: vda}", "2:9: disk 'vda' needs one of 'size', 'image', 'base', 'device', 'rbd'"),
    ("{name: vda, device: /dev/v/w, format: qcow2}", "2:47: disk 'vda': 'device' is always raw"),
    ("{name: vda, device: /dev/v/w, size: 1M}", "2:39: disk 'vda' has both 'device' and 'size'; one is enough"),
    ("{name: vda, device: d, encryption: {}}", "2:32: disk 'vda': only qcow2 images are encrypted"),
    ("{name: vda, rbd: {image: i}}", "2:26: key 'pool' is missing"),
    ("{name: vda, rbd: {pool: p}}", "2:26: key 'image' is missing"),
    ("{name: vda, rbd: p/i}", "2:26: expected 'rbd' to be a mapping of keys to values, found the string 'p/i'"),
    ("{name: vda, rbd: {pool: p, image: i, key: k}}", "2:46: unknown key 'key'"),
    (
        "{name: vda, rbd: {pool: p, image: --help}}",
        (
            "2:43: expected 'image' to be a name in Ceph, at most 96 of A-Z, a-z, 0-9, '_', '.', '+', '=' and '-', not"
            " beginning with '-', found the string '--help'"
        ),
    ),
    ("{name: vda, image: i, base: b}", "2:31: disk 'vda' has both 'image' and 'base'; one is enough"),
    (
        "{name: VDA, size: 1M}",
        (
            "2:16: expected 'name' to be a lower-case letter and at most 15 more letters or digits, as in 'vda' or "
            "'data1', found the string 'VDA'"
        ),
    ),
    (
        "{name: v-a, size: 1M}",
        (
            "2:16: expected 'name' to be a lower-case letter and at most 15 more letters or digits, as in 'vda' or "
            "'data1', found the string 'v-a'"
        ),
    ),
    ("{name: vda, size: 1M}, {name: vda, size: 2M}", "2:39: two disks have the name 'vda'"),
    ("{name: vda, size: 1M, read_only: true}", "2:31: unknown key 'read_only'; did you mean 'read-only'?"),
    (
        "{name: vda, size: 0}",
        (
            "2:27: expected 'size' to be a size such as 512M or 1.5G, in multiples of 512B and below 8192P"
            ", found the number 0"
        ),
    ),
    (
        "{name: vda, size: 0M}",
        (
            "2:27: expected 'size' to be a size such as 512M or 1.5G, in multiples of 512B and below 8192P"
            ", found the string '0M'"
        ),
    ),
    (
        "{name: vda, size: 1000}",
        (
            "2:27: expected 'size' to be a size such as 512M or 1.5G, in multiples of 512B and below 8192P"
            ", found the number 1000"
        ),
    ),
    (
        "{name: vda, size: 1}",
        (
            "2:27: expected 'size' to be a size such as 512M or 1.5G, in multiples of 512B and below 8192P"
            ", found the number 1"
        ),
    ),
    (
        "{name: vda, size: 512.5B}",
        (
            "2:27: expected 'size' to be a size such as 512M or 1.5G, in multiples of 512B and below 8192P"
            ", found the string '512.5B'"
        ),
    ),
    (
        "{name: vda, size: 8192P}",
        (
            "2:27: expected 'size' to be a size such as 512M or 1.5G, in multiples of 512B and below 8192P"
            ", found the string '8192P'"
        ),
    ),
    ("{name: vda, image: ''}", "2:28: expected 'image' to be a file's path, found the string ''"),
    ("{name: vda, image: dir/}", "2:28: expected 'image' to be a file's path, found the string 'dir/'"),
    ("{name: vda, image: ~/i}", "2:28: 'image': '~' is not expanded"),
    ("{name: vda, image: '@home/i'}", "2:28: 'image': only @guest/ is known among the paths that begin with '@'"),
    (
        "{name: vda, size: 1M, bus: usb}",
        ("2:36: expected 'bus' to be one of ide, nvme, sata, scsi, virtio, found the string 'usb'"),
    ),
    ("{name: vda, size: 1M, format: vmdk}", "2:39: expected 'format' to be one of qcow2, raw, found the string 'vmdk'"),
    (
        "{name: vda, size: 1M, cache: off}",
        (
            "2:38: expected 'cache' to be one of directsync, none, unsafe, writeback, writethrough"
            ", found the string 'off'"
        ),
    ),
    (
        "{name: vda, size: 1M, encryption: yes}",
        ("2:43: expected 'encryption' to be a mapping of keys to values, found the string 'yes'"),
    ),
    ("{name: vda, size: 1M, encryption: {secret: x}}", "2:44: unknown key 'secret'; did you mean 'secret-file'?"),
    ("{name: vda, size: 1M, format: raw, encryption: {}}", "2:44: disk 'vda': only qcow2 images are encrypted"),
    ("{name: vda, image: i, bus: sata, read-only: yes}", "2:53: disk 'vda': QEMU has no read-only SATA disks"),
    ("{name: vda, size: 1M, bus: ide}", "2:8: disk 'vda': machine q35 has no ide bus"),
    ("{name: a, image: i}, {name: b, base: ./i}", "2:8: disk 'a': another disk uses its image /vms/web/i too"),
]


@pytest.mark.parametrize("machine", ["microvm", "q35"])
def test_a_cdrom_needs_a_place(machine: str) -> None:
    disks = ", ".join(f"{{name: d{number}, size: 1M, bus: sata}}" for number in range(6 if machine == "q35" else 0))
    found = refusal(f"name: web\nmachine: {machine}\ncdrom: /i.iso\ndisks: [{disks}]")
    assert found.message.startswith(f"machine.yaml:3:8: machine {machine} has no bus for a CD-ROM drive")


@pytest.mark.parametrize(("disks", "message"), WRONG_DISKS)
def test_a_wrong_disk_says_where_and_why(disks: str, message: str) -> None:
    assert refusal(f"name: web\ndisks: [{disks}]").message == f"machine.yaml:{message}"


WRONG_NICS = [
    ("wifi", "2:8: expected an item of 'nics' to be a mapping of keys to values, found the string 'wifi'"),
    ("{kind: wifi}", "2:15: expected 'kind' to be one of bridge, none, tap, user, found the string 'wifi'"),
    ("{kind: tap}", "2:8: a network card of kind 'tap' needs 'ifname'"),
    ("{kind: bridge}", "2:8: a network card of kind 'bridge' needs 'bridge'"),
    ("{ifname: tap0}", "2:9: 'ifname' belongs to kind 'tap', this card's kind is 'user'"),
    ("{kind: tap, ifname: t, forwards: []}", "2:31: 'forwards' belongs to kind 'user', this card's kind is 'tap'"),
    (
        "{kind: tap, ifname: 'tap0,script=x'}",
        ("2:28: expected 'ifname' to be an interface's name such as tap0 or br0, found the string 'tap0,script=x'"),
    ),
    (
        "{kind: bridge, bridge: an-endless-bridge}",
        ("2:31: expected 'bridge' to be an interface's name such as tap0 or br0, found the string 'an-endless-bridge'"),
    ),
    (
        "{mac: 52:54:00:12:34}",
        (
            "2:14: expected 'mac' to be a unicast MAC address such as 52:54:00:12:34:56"
            ", found the string '52:54:00:12:34'"
        ),
    ),
    (
        "{mac: 53:54:00:12:34:56}",
        (
            "2:14: expected 'mac' to be a unicast MAC address such as 52:54:00:12:34:56"
            ", found the string '53:54:00:12:34:56'"
        ),
    ),
    (
        "{mac: 52:54:00:12:34:5a}, {mac: 52:54:00:12:34:5A}",
        ("2:34: two network cards have the MAC address 52:54:00:12:34:5a"),
    ),
    ("{forwards: 2222:22}", "2:19: expected 'forwards' to be a list, found the string '2222:22'"),
    (
        "{forwards: [ssh]}",
        "2:20: expected an item of 'forwards' to be like '2222:22' (host:guest), found the string 'ssh'",
    ),
    (
        "{forwards: [70000:22]}",
        "2:20: expected 'host' to be a whole number from 1 to 65535, found the string '70000:22'",
    ),
    ("{forwards: [22:0]}", "2:20: expected 'guest' to be a whole number from 1 to 65535, found the string '22:0'"),
    (
        "{forwards: [1.2.3:22:22]}",
        "2:20: expected 'address' to be an IPv4 address, as in 127.0.0.1 or 0.0.0.0, found the string '1.2.3:22:22'",
    ),
    ("{forwards: [{host: 22}]}", "2:20: key 'guest' is missing"),
    (
        "{forwards: [{host: 22, guest: 22, protocol: icmp}]}",
        ("2:52: expected 'protocol' to be one of tcp, udp, found the string 'icmp'"),
    ),
    ("{forwards: [{host: 2, guest: 3, hots: 4}]}", "2:40: unknown key 'hots'; did you mean 'host'?"),
    ("{forwards: [2222:22]}, {forwards: [2222:80]}", "2:31: tcp port 2222 of 127.0.0.1 is forwarded twice"),
]


@pytest.mark.parametrize(("nics", "message"), WRONG_NICS)
def test_a_wrong_network_card_says_where_and_why(nics: str, message: str) -> None:
    assert refusal(f"name: web\nnics: [{nics}]").message == f"machine.yaml:{message}"


def test_an_unknown_key_lists_the_known_ones() -> None:
    assert refusal("name: web\nram: 1G").hint.startswith(
        "keys here: name, uuid, profile, machine, accel, cpu, cpus, memory"
    )


def test_a_number_for_a_string_is_told_to_be_quoted() -> None:
    assert refusal("name: web\ncpu: 486").hint == "put it in quotes: '486'"


def test_an_unquoted_at_sign_is_told_to_be_quoted() -> None:
    assert refusal("name: web\nkernel: @guest/k").hint == "put a value that begins with @, % or ` in quotes"
