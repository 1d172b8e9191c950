"""The tester's own oracle: it tells what is from what may not be."""

import struct

import pytest

from tests.outsider import contents, writer
from tests.outsider.contents import CHUNK, SIZE, Counted, Disk, Found, OneOf
from tests.outsider.known import Expect, Known, Snap, both


def disk(head: int, last: int, lost: int | None = None) -> Disk:
    """A disk on which the guest has counted so far, but for a sector that was lost."""
    raw = bytearray(SIZE)
    for number in range(1, last + 1):
        if number != lost:
            at = (writer.RING + number % writer.SLOTS) * 512
            raw[at : at + 512] = struct.pack("<I", number) * 128
    raw[writer.HEAD * 512 : writer.HEAD * 512 + 512] = struct.pack("<I", head) * 128
    return contents.parsed(bytes(raw))


@pytest.mark.parametrize("head", [0, 5, 255, 256, 700])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (1, 1)])
def test_every_moment_of_the_counting_guest_is_one(head: int, first: int, second: int) -> None:
    found: Found = {"vda": disk(head, head + first), "vdb": disk(0, head + second)}
    assert Counted(head).problem(found) == ""
    assert "counted" in Counted(head + 1).problem(found)
    assert "counted" in Counted(0, head - 1).problem(found)


@pytest.mark.parametrize(
    ("vda", "vdb"),
    [
        (disk(9, 9), disk(0, 8)),  # the second disk of an earlier moment
        (disk(9, 9), disk(0, 11)),  # or of a later one
        (disk(9, 12), disk(0, 9)),  # written twice over
        (disk(9, 9, lost=4), disk(0, 9)),
        (disk(9, 9), disk(0, 9, lost=9)),
    ],
)
def test_what_is_no_moment_of_it_is_told(vda: Disk, vdb: Disk) -> None:
    assert "something is missing" in Counted(0).problem({"vda": vda, "vdb": vdb})


def test_a_write_that_may_not_have_arrived_is_one_of_two() -> None:
    before = contents.empty("vda")
    sure, unsure = (before.written("vda", 3, 7, sure=sure) for sure in (True, False))
    old = {"vda": contents.parsed(bytes(SIZE))}
    new = {"vda": contents.parsed(bytes(3 * CHUNK) + b"\7" * CHUNK + bytes(SIZE - 4 * CHUNK))}
    assert [sure.problem(found) == "" for found in (old, new)] == [False, True]
    assert [unsure.problem(found) == "" for found in (old, new)] == [True, True]
    assert OneOf((before, sure)).problem(new) == ""
    assert contents.exactly(new).problem(old) == "vda chunk 3 holds 0, not [7]"


def test_a_commit_beside_a_create_may_overwrite_what_that_has_taken() -> None:
    known = Known("m1", "none", contents.empty("vda"))
    taken = Expect(appear={"new": Snap(contents.empty("vda"), ("vda",))})
    assert both(known, taken, Expect(agreed=True)).consume == {"new"}
    assert both(known, taken, Expect()).consume == set()
