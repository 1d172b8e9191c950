"""Which machines have a generation ID, and what of it memory has to find again."""

import pytest
from msgspec.structs import replace

from qmpsnap.model.layers.vmstate import differences, hardware_of
from qmpsnap.model.machines.record import Machine, Vmgenid
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import OperationId
from qmpsnap.ops.base import vmgenid
from tests.ops.bench import snapshot

SPEC = MachineSpec(name="web")


@pytest.mark.parametrize(
    ("machine_type", "takes"),
    [
        ("q35", True), ("pc", True), ("pc-q35-7.2", True), ("pc-i440fx-11.1", True), ("pc-q35-2.9", True),
        ("pc-q35-rhel9.6.0", True), ("pc-q35-2.8", False), ("pc-i440fx-2.4", False), ("pc-i440fx-trusty", False),
        ("microvm", False), ("isapc", False), ("none", False),
    ],
)  # fmt: skip
def test_a_machine_type_has_the_device_if_its_guest_can_find_it(machine_type: str, *, takes: bool) -> None:
    spec = replace(SPEC, machine=machine_type)
    assert spec.takes_vmgenid is takes
    assert not replace(spec, extra=("-device", "vmgenid,guid=auto")).takes_vmgenid  # there is one at most
    machine = Machine(name="web", uuid="u", host="h", spec=spec, created=0, vmgenid=Vmgenid(guid="g"))
    assert machine.guid == ("g" if takes else "")


def test_memory_is_loaded_with_another_guid_but_not_without_the_device() -> None:
    without, one, other = (
        hardware_of(SPEC, uuid="u", accel="tcg", qemu_version="7.2.22", host_cpu="some", vmgenid=guid)
        for guid in ("", "a", "b")
    )
    assert differences(one, other) == ()
    assert differences(one, without) == ("device 'vmgenid', now missing",)
    assert differences(without, one) == ("no device 'vmgenid', now present",)


def test_a_generation_lasts_until_a_revert_unless_that_resumes_what_was_saved() -> None:
    at = replace(snapshot("saved-1", "vda-1"), operation=OperationId(7))
    machine = Machine(name="web", uuid="u", host="h", spec=SPEC, created=0, vmgenid=vmgenid.new())
    saved = replace(machine, vmgenid=vmgenid.saved(machine, OperationId(7)))
    other = replace(machine, vmgenid=vmgenid.saved(machine, OperationId(8)))
    assert vmgenid.after_revert(saved, at, resumes=True) == machine.vmgenid
    changed = [
        vmgenid.after_revert(each, at, resumes=resumes)
        for each, resumes in ((machine, True), (other, True), (saved, False))
    ]
    assert all(each and each.guid != machine.guid and not each.resting for each in changed)
    assert vmgenid.after_revert(replace(machine, vmgenid=None), at, resumes=True) is None
