"""How long a guest will be held for its memory, by what was measured before."""

import pytest
from msgspec.structs import replace

from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Hardware, Vmstate
from qmpsnap.model.names import OperationId
from qmpsnap.ops.memory import strategy

HARDWARE = Hardware(
    uuid="u",
    qemu_version="7.2.22",
    machine_type="pc-q35-7.2",
    accel="tcg",
    cpu="max",
    cpus=1,
    memory=8 << 30,
    devices=(),
)
STATE = Vmstate(
    path="/memory",
    bytes=1,
    digest="",
    device=1,
    inode=1,
    mode="background",
    layout="stream",
    compression="none",
    hardware=HARDWARE,
)


def took(pause_ms: float | None, state: Vmstate | None = STATE) -> Snapshot:
    return Snapshot(
        name="s",
        kind="full" if state else "disk",
        state="ok",
        parent=None,
        created=0,
        description="",
        mode="live",
        points=(),
        operation=OperationId(1),
        pause_ms=pause_ms,
        vmstate=state,
    )


OTHERS = {
    "a disk snapshot": took(9, None),
    "not measured": took(None),
    "the other mode": took(9, replace(STATE, mode="stopped")),
    "other memory": took(9, replace(STATE, hardware=replace(HARDWARE, memory=4 << 30))),
    "another QEMU": took(9, replace(STATE, hardware=replace(HARDWARE, qemu_version="10.0.13"))),
    "another accelerator": took(9, replace(STATE, hardware=replace(HARDWARE, accel="kvm"))),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_was_measured_otherwise_says_nothing(other: str) -> None:
    assert strategy.lasted([took(1340), OTHERS[other], took(1500)], "background", HARDWARE) == (1340, 1500)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ([], 120),
        ([1340, 1832, 1500], 1500),  # more memory is in use than what was computed from
        ([20, 30, 25], 25),
        ([9000, 20, 30, 25], 25),  # the last three
        ([20, 25, 9000], 25),
        ([9000], 120),  # else it would be refused for ever what could show it to have been an outlier
        ([1340, 1500], 1340),
    ],
)
def test_the_median_of_the_last_three(before: list[float], expected: float) -> None:
    measured = strategy.lasted([took(ms) for ms in before], "background", HARDWARE)
    assert strategy.expected_ms(120, measured) == expected
