"""QEMU's command lines: what is attached in which way, what is refused, and that nothing is guessed silently."""

import contextlib
import shlex

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpsnap.errors import UsageError
from qmpsnap.imports import argv, spec_text
from qmpsnap.imports.argv_words import Places
from qmpsnap.imports.found import Imported
from qmpsnap.model.machines.spec import DiskSpec, Forward, MachineSpec, NicSpec
from tests.imports.sources import EVERYWHERE

UUID = "9f6a1d3e-4b55-4c3a-9a51-6a7f1f1c2b01"
BARE = "qemu-system-x86_64 -nodefaults"


def read(line: str) -> Imported:
    return argv.read(shlex.split(line), places=Places("/srv/vm"))


def disk_of(options: str) -> DiskSpec:
    (disk,) = read(f"{BARE} {options}").spec.disks
    return disk


def test_a_whole_command_line() -> None:
    found = read(
        f"/usr/bin/qemu-system-x86_64 -name guest=Web,debug-threads=on -uuid {UUID.upper()} "
        "-machine pc-q35-7.2,accel=kvm -cpu host,+vmx -smp 4,sockets=1,cores=4 -m size=2G,maxmem=4G"
        " -nodefaults -S -daemonize"
        " -drive if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/code.fd"
        " -drive if=pflash,format=raw,unit=1,file=vars.fd"
        " -drive id=root,if=none,file=root.qcow2,format=qcow2,cache=none,discard=unmap,aio=native"
        " -device virtio-blk-pci,drive=root,id=vda,bootindex=1"
        " -netdev user,id=n0,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-:53 -device virtio-net-pci,netdev=n0,"
        "mac=52:54:00:AA:00:01 -device virtserialport,chardev=q,name=org.qemu.guest_agent.0 -vnc :1"
        " -kernel boot/vmlinuz -append 'root=/dev/vda quiet' -rtc base=utc -device vmgenid,guid=auto"
    )
    assert found.spec == MachineSpec(
        name="web",
        uuid=UUID,
        machine="pc-q35-7.2",
        accel="kvm",
        cpu="host,+vmx",
        cpus=4,
        memory=2 << 30,
        kernel="/srv/vm/boot/vmlinuz",
        append="root=/dev/vda quiet",
        firmware="uefi",
        uefi_code="/usr/share/code.fd",
        uefi_variables="/srv/vm/vars.fd",
        disks=(DiskSpec(name="vda", image="/srv/vm/root.qcow2", cache="none"),),
        nics=(
            NicSpec(
                mac="52:54:00:aa:00:01",
                forwards=(
                    Forward(host=2222, guest=22),
                    Forward(host=53, guest=53, protocol="udp", address=EVERYWHERE),
                ),
            ),
        ),
        agent=True,
    )
    assert found.left_out == (
        "disk vda: aio",
        "-smp: the topology; each vCPU is a socket",
        "-m: room for more memory",
        "-vnc",
    )


NODES = (
    """ -blockdev '{"driver":"file","filename":"/i/a.qcow2","node-name":"f","cache":{"direct":true}}'"""
    """ -blockdev '{"driver":"qcow2","node-name":"q","file":"f"}'"""
)


@pytest.mark.parametrize(
    ("options", "disk"),
    [
        (f"{NODES} -device scsi-hd,drive=q,id=sda",
         DiskSpec(name="sda", image="/i/a.qcow2", bus="scsi", cache="none", discard=False)),
        (f"{NODES} -device '{{\"driver\":\"nvme\",\"drive\":\"q\"}}'",
         DiskSpec(name="q", image="/i/a.qcow2", bus="nvme", cache="none", discard=False)),
        ("-blockdev driver=raw,node-name=r,file.driver=file,file.filename=x,,y.img -device ide-hd,drive=r",
         DiskSpec(name="r", image="/srv/vm/x,y.img", format="raw", bus="ide", discard=False)),
        ("-hda a.qcow2", DiskSpec(name="hda", image="/srv/vm/a.qcow2", bus="ide", discard=False)),
        ("a.img", DiskSpec(name="hda", image="/srv/vm/a.img", format="raw", bus="ide", discard=False)),
        ("-M q35 -hdb /a.img", DiskSpec(name="hdb", image="/a.img", format="raw", bus="sata", discard=False)),
        ("-drive file=file:/a:b.img,if=virtio,format=raw,readonly=on",
         DiskSpec(name="vda", image="/a:b.img", format="raw", discard=False, read_only=True)),
        ("-drive file.driver=file,file.filename=x.img,driver=raw,if=virtio,cache=unsafe",
         DiskSpec(name="vda", image="/srv/vm/x.img", format="raw", discard=False, cache="unsafe")),
    ],
)  # fmt: skip
def test_how_a_disk_is_attached(options: str, disk: DiskSpec) -> None:
    assert disk_of(options) == disk


LEFT_OUT = {
    "its image is named by the protocol 'nbd', not a file": "-drive file=nbd://me:hunter2@host/x,id=n",
    "its image is named by the protocol 'json', not a file": "-drive 'file=json:{\"hunter2\":1}'",
    "its image is named by the protocol 'fat', not a file": "-hda fat:rw:hunter2",
    "its image is opened by driver rbd, not a file": "-blockdev driver=rbd,node-name=r,pool=x -device nvme,drive=r",
    "the key of its encryption": "-drive file=a.qcow2,format=qcow2,encrypt.key-secret=hunter2",
    "/srv/vm/a.vmdk is vmdk; convert it: qemu-img convert -f vmdk": "-drive file=a.vmdk,format=vmdk",
    "a cdrom with /srv/vm/a.iso": "-M microvm -cdrom a.iso",
    "it is of kind floppy": "-fda a.img",
    "there is no drive lost": "-device virtio-blk-pci,drive=lost",
    "-object secret s0": "-object secret,id=s0,data=hunter2",
    "-spice": "-spice port=1,password=hunter2",
    "-device virtio-balloon-pci b": "-device virtio-balloon-pci,id=b,x=hunter2",
    "-incoming": "-incoming exec:hunter2",
    "-machine smm": "-machine smm=hunter2",
    "-fw_cfg": "-fw_cfg name=opt/x,string=hunter2",
}


@pytest.mark.parametrize("said", LEFT_OUT)
def test_what_is_left_out_is_named_without_its_values(said: str) -> None:
    found = read(f"{BARE} {LEFT_OUT[said]}")
    assert said in "\n".join(found.left_out)
    assert "hunter2" not in msgspec.json.encode(found).decode() + spec_text.render(found)


@pytest.mark.parametrize(
    ("options", "cards"),
    [
        ("", (NicSpec(model="e1000", mac="52:54:00:12:34:56"),)),
        ("-M q35", (NicSpec(model="e1000e", mac="52:54:00:12:34:56"),)),
        ("-nic none", ()),
        ("-net none", ()),
        ("-nic user,model=virtio-net-pci -nic bridge,br=br7,mac=52:54:00:12:34:56",
         (NicSpec(mac="52:54:00:12:34:57"),
          NicSpec(kind="bridge", bridge="br7", model="e1000", mac="52:54:00:12:34:56"))),
        ("-net nic,model=rtl8139,macaddr=52:54:00:00:00:01 -net user,hostfwd=tcp::80-:80",
         (NicSpec(model="rtl8139", mac="52:54:00:00:00:01",
                  forwards=(Forward(host=80, guest=80, address=EVERYWHERE),)),)),
        ("-netdev tap,id=t,ifname=tap3,script=no -device e1000,netdev=t",
         (NicSpec(kind="tap", ifname="tap3", model="e1000", mac="52:54:00:12:34:56"),)),
    ],
)  # fmt: skip
def test_cards_and_the_addresses_that_qemu_gives(options: str, cards: tuple[NicSpec, ...]) -> None:
    assert read(f"qemu-system-x86_64 {options}").spec.nics == cards


def test_qemu_s_own_defaults_are_written_out() -> None:
    found = read("kvm")
    assert found.spec == MachineSpec(
        name="imported",
        machine="pc",
        accel="tcg",
        cpu="qemu64",
        memory=128 << 20,
        nics=(NicSpec(model="e1000", mac="52:54:00:12:34:56"),),
        agent=False,
    )
    assert "the UUID is a new one: the command line has none" in found.changed
    assert "'display: vnc' gives it one" in found.changed[1]
    assert "with -snapshot they were temporary" in "".join(read("kvm -snapshot").changed)
    assert "its format is raw by its name" in "".join(read(f"{BARE} a.img").changed)


REFUSED = {
    "-readconfig, which adds options from a file": f"{BARE} -readconfig f",
    "-add-fd, whose images were passed": f"{BARE} --add-fd set=1,fd=3",
    "-set, which changes other options": f"{BARE} -set device.x.y=z",
    "bash is no QEMU of x86": "bash -c x",
    "qemu-system-aarch64 is no QEMU of x86": "qemu-system-aarch64",
    "option -m has no value": f"{BARE} -m",
    "-m has '1X', not a size": f"{BARE} -m 1X",
    "-smp has cpus=many, not a number": f"{BARE} -smp many",
    "the JSON of -blockdev cannot be read": f"{BARE} -blockdev '{{x'",
    "nested too deeply": f"{BARE} -device '" + '{"a":' * 120 + "1" + "}" * 120 + "'",
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_tell_all_is_refused(said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(REFUSED[said])
    assert said.replace("=many", "='many'") in caught.value.message


def test_a_cdrom_is_kept() -> None:
    spec = read(f"{BARE} -M q35 -cdrom a.iso -drive file=b.iso,media=cdrom").spec
    assert (spec.cdrom, spec.disks) == ("/srv/vm/a.iso", ())


def test_what_starts_it_may_stand_before_it() -> None:
    bare = read(BARE)
    loader = "/q/lib/ld-linux-x86-64.so.2 --library-path /q/lib --argv0 qemu-system-x86_64"
    for starter in ("sudo -u me taskset -c 1", loader):
        assert read(f"{starter} /q/{BARE}") == bare


def test_a_command_line_is_needed() -> None:
    with pytest.raises(UsageError, match="a command line is missing"):
        argv.read([], places=Places("/"))


WORDS = st.sampled_from(
    [
        *(
            "-drive",
            "-device",
            "-blockdev",
            "-netdev",
            "-nic",
            "-m",
            "-smp",
            "-M",
            "if=none,id=a",
            "drive=a",
            "driver=raw",
        ),
        *(",", "=", "{}", '{"file":{"file":[1,null]}}', "file=a,format=x", "user,hostfwd=", "id=a,file=a", "\x00", "é"),
    ]
)


@given(st.lists(WORDS, max_size=12))
@settings(deadline=None)
def test_any_words_are_a_machine_or_a_usage_error(words: list[str]) -> None:
    with contextlib.suppress(UsageError):
        spec_text.render(argv.read(["kvm", *words], places=Places("/")))
