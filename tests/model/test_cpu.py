"""The default CPU in words that every QEMU understands, and what memory of another one is told to be."""

from msgspec.structs import replace

from qmpsnap.model.layers.vmstate import Hardware, differences, hardware_of
from qmpsnap.model.machines.cpu import Value, static_model
from qmpsnap.model.machines.spec import MachineSpec

BASE: dict[str, Value] = {"avx": False, "family": 0, "fpu": False, "model-id": "", "pcommit": False, "vendor": "AMD"}
MAX: dict[str, Value] = {
    "avx": True,
    "family": 15,
    "fpu": True,
    "model-id": "QEMU TCG CPU",
    "pcommit": True,
    "vendor": "AMD",
}
RECORDED = "base,avx=on,family=15,fpu=on,model-id=QEMU TCG CPU"


def hardware(spec: MachineSpec, version: str = "7.2.22", accel: str = "tcg") -> Hardware:
    return hardware_of(spec, uuid="u", accel=accel, qemu_version=version, host_cpu="Xeon")


def test_it_is_what_the_static_model_lacks_but_for_what_no_later_qemu_has() -> None:
    assert static_model(BASE, MAX) == RECORDED
    assert static_model(BASE, MAX | {"vendor": "a,b"}) == ""  # `-cpu` has no way to say that
    assert static_model(BASE, BASE) == ""


def test_a_specs_own_model_goes_first_and_under_kvm_it_is_the_hosts() -> None:
    spec = MachineSpec(name="web", tcg_cpu=RECORDED)
    assert [spec.cpu_under(accel) for accel in ("tcg", "kvm")] == [RECORDED, "host"]
    assert replace(spec, cpu="max").cpu_under("tcg") == "max"
    assert MachineSpec(name="web").cpu_under("tcg") == "max"


def test_memory_of_a_recorded_cpu_loads_with_a_later_qemu_and_that_of_max_does_not() -> None:
    recorded, maximal = MachineSpec(name="web", tcg_cpu=RECORDED), MachineSpec(name="web")
    assert differences(hardware(recorded), hardware(recorded, "11.1.0")) == ()
    for spec in (maximal, MachineSpec(name="web", cpu="max,-avx")):
        assert hardware(spec).is_confined
        assert "now of 11.1.0" in differences(hardware(spec), hardware(spec, "11.1.0"))[0]
        assert differences(hardware(spec), hardware(spec, "7.2.23")) == ()
    assert not hardware(recorded).is_confined
    assert not hardware(maximal, accel="kvm").is_confined


def test_a_long_model_is_named_in_short() -> None:
    long = MachineSpec(name="web", tcg_cpu="base," + ",".join(f"feature{number}=on" for number in range(82)))
    assert differences(hardware(long), hardware(MachineSpec(name="web"))) == ("CPU base with 82 properties, now max",)
