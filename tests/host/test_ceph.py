"""What ``rbd`` says of an image, told by its status and its words; the real program is tried in tests/live."""

from pathlib import Path

import pytest

from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.host import ceph
from qmpsnap.model.machines.rbd import RbdImage


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("rbd: error opening image web: (2) No such file or directory", ImageRefused, "there is no image rbd:rbd/web"),
        ("rbd: couldn't connect to the cluster!", HostCannot, "the Ceph cluster of rbd:rbd/web cannot be reached"),
    ],
)
def test_a_cluster_that_is_not_reached_lacks_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, error: type[Exception], words: str
) -> None:
    program = tmp_path / "rbd"
    program.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 2\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(error, match=words) as refused:
        ceph.info(RbdImage(pool="rbd", image="web"))
    assert type(refused.value) is error
    with pytest.raises(HostCannot) as refused:
        ceph.done(RbdImage(pool="rbd", image="web"), "rm", seconds=9)
    assert isinstance(refused.value, ceph.Failed) == (error is ImageRefused)
