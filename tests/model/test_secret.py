"""Keys of disks: what QEMU would not take is refused, and nothing prints one."""

import pytest

from qmpsnap.errors import UsageError
from qmpsnap.model.machines.secret import LEAST, MOST, Secret

KEY = b"k" * LEAST


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "has 0 bytes"),
        (KEY[1:], f"has {LEAST - 1} bytes; {LEAST} to {MOST} are possible"),
        (b"k" * (MOST + 1), f"has more bytes; {LEAST} to {MOST} are possible"),
        (KEY + b"\0", "contains a zero byte"),
        (KEY + b"\xff", "is not UTF-8 text"),
    ],
)
def test_what_is_no_key_is_refused_without_being_told(value: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why) as refused:
        Secret(value, what="the secret of web/vda")
    assert "kkk" not in f"{refused.value} {refused.value.__cause__!r}"


def test_a_key_is_not_printed() -> None:
    secret = Secret(KEY, what="it")
    assert secret.reveal() == KEY
    assert "kkk" not in f"{secret} {secret!r} {[secret]}"
    assert not hasattr(secret, "__dict__")
