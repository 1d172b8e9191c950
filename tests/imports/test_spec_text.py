"""Specs as text: what is printed describes the very machine, and comments are only comments."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from qmpsnap.imports import spec_text
from qmpsnap.imports.found import Imported, Moment, plain_name
from qmpsnap.machine.config.specfile import parse
from qmpsnap.model.machines.spec import DiskSpec, Encryption, Forward, MachineSpec, NicSpec
from qmpsnap.model.names import NAME
from tests.imports.sources import EVERYWHERE

UUID = "9f6a1d3e-4b55-4c3a-9a51-6a7f1f1c2b01"
PATHS = st.text(st.characters(min_codepoint=0x20, blacklist_characters="\x7f", blacklist_categories=["Cs", "Cc", "Cn"]))


def read_again(text: str) -> MachineSpec:
    return parse(text, "s.yaml", folder=Path("/nowhere"), guest_dir=Path("/guest"), profile_dir=Path("/profiles"))


def whole(image: str) -> MachineSpec:
    return MachineSpec(
        name="true",
        uuid=UUID,
        machine="pc-q35-7.2",
        accel="tcg",
        cpu="qemu64,+x2apic",
        cpus=3,
        memory=(1 << 30) + (1 << 20),
        append=image,
        kernel="/boot/vmlinuz",
        firmware="uefi",
        uefi_code="/usr/share/code.fd",
        uefi_variables=image,
        disks=(
            DiskSpec(name="vda", image=image, format="raw", bus="scsi", cache="none", discard=False),
            DiskSpec(name="no", size=4096 + 512, read_only=True, snapshot=False),
            DiskSpec(name="b", base="/b.qcow2", encryption=Encryption(secret_file="/run/key")),  # noqa: S106
        ),
        cdrom=image,
        nics=(
            NicSpec(
                mac="52:54:00:12:34:56", model="e1000", forwards=(Forward(host=2222, guest=22, address=EVERYWHERE),)
            ),
            NicSpec(kind="bridge", bridge="br0"),
        ),
        agent=False,
        display="vnc",
        extra=("-device", "x,y=1"),
    )


@given(PATHS)
@settings(deadline=None)
def test_what_is_printed_is_read_again(text: str) -> None:
    spec = whole(f"/srv/{text}x")
    assert read_again(spec_text.render(Imported(origin="a test", spec=spec))) == spec


@given(st.text())
@settings(deadline=None)
def test_nothing_that_is_told_gets_out_of_its_comment(text: str) -> None:
    spec = MachineSpec(name="web")
    moment = Moment(name="s1", original=text, created=0, why_not=text)
    found = Imported(origin=text, spec=spec, changed=(text,), left_out=(text,), moments=(moment,), runs=text)
    assert read_again(spec_text.render(found, define=text)) == spec


@given(st.text(), st.sets(st.text()))
def test_any_name_has_an_allowed_one_beside_those_that_are_taken(text: str, taken: set[str]) -> None:
    first = plain_name(text, taken=(), fallback="snapshot")
    assert NAME.match(first)
    second = plain_name(text, taken={first, *taken}, fallback="snapshot")
    assert NAME.match(second)
    assert second not in {first, *taken}
