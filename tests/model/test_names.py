"""Which names may be borne, and what is made of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.errors import NameRefused
from qmpsnap.model.names import DISK_NAME, NAME, OperationId, check_disk_name, check_name, job_id, layer_id

LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
DIGITS = frozenset("0123456789")


@given(st.from_regex(NAME, fullmatch=True))
def test_a_name_of_the_form_is_taken_as_it_is(name: str) -> None:
    assert check_name(name, "machine") == name
    assert "/" not in name
    assert name not in (".", "..")
    assert 1 <= len(name) <= 63


@given(st.text(max_size=70))
def test_any_other_text_is_refused(name: str) -> None:
    allowed = 1 <= len(name) <= 63 and name[0] in LETTERS | DIGITS and set(name) <= LETTERS | DIGITS | set("._-")
    if allowed:
        assert check_name(name, "machine") == name
    else:
        with pytest.raises(NameRefused, match=r"^machine name ") as caught:
            check_name(name, "machine")
        assert (caught.value.exit_code, caught.value.code) == (2, "bad-name")


@pytest.mark.parametrize(
    "name", ["", "a\n", "A", "ä", "a/b", "../a", ".a", "-a", "_a", "a b", "a\0", "x" * 64, "\uff12"]
)
def test_names_that_could_do_harm_are_refused_and_shown_escaped(name: str) -> None:
    with pytest.raises(NameRefused, match=re.escape(repr(name))):
        check_name(name, "snapshot")


@given(st.text(max_size=20))
def test_a_disks_name_is_a_letter_and_at_most_fifteen_more_letters_and_digits(name: str) -> None:
    allowed = 1 <= len(name) <= 16 and name[0] in LETTERS and set(name) <= LETTERS | DIGITS
    if allowed:
        assert check_disk_name(name) == name
    else:
        with pytest.raises(NameRefused) as caught:
            check_disk_name(name)
        assert caught.value.exit_code == 2


@given(
    st.tuples(st.from_regex(DISK_NAME, fullmatch=True), st.integers(1, 10**8)),
    st.tuples(st.from_regex(DISK_NAME, fullmatch=True), st.integers(1, 10**8)),
)
def test_two_layers_or_jobs_have_one_id_only_if_disk_and_number_are_the_same(
    one: tuple[str, int], other: tuple[str, int]
) -> None:
    assert (layer_id(*one) == layer_id(*other)) is (one == other)
    jobs = [job_id(OperationId(number), disk) for disk, number in (one, other)]
    assert (jobs[0] == jobs[1]) is (one == other)


def test_ids_are_of_the_documented_form() -> None:
    assert (layer_id("vda", 17), job_id(OperationId(17), "vda")) == ("vda-17", "qs.17.vda")
