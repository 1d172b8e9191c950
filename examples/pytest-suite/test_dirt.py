"""Tests that ruin their machine, each in its own way; none of them finds what another one has done.

Usage: pytest -n 2 examples/pytest-suite
       pytest -n 2 examples/pytest-suite --qmpsnap-by boot      to compare: load, revert, boot
"""

import pytest

from qmpsnap.sync import MachineHandle

LOOK = """
test "$(cat /mnt/config)" = original || echo "the file was changed"
test ! -e /run/dirt && test ! -e /etc/dirt && test ! -e /mnt/dirt || echo "files are left"
test "$(cat /proc/sys/vm/swappiness)" = 60 || echo "a kernel setting was changed"
test "$(grep -c dirt /proc/mounts)" = 0 || echo "a file system is mounted"
pidof crond >/dev/null && pidof syslogd >/dev/null || echo "a daemon is missing"
pidof sleep >/dev/null && echo "a process is left"
test "$(df -m /mnt | awk 'NR == 2 { print $3 }')" -lt 20 || echo "the disk is full"
true
"""
"""Says what is not as it was set up."""

DIRT = {
    "files": "echo {0} >/mnt/config && echo {0} | tee /run/dirt /etc/dirt /mnt/dirt",
    "kernel": "sysctl -w vm.swappiness={0} && mkdir /run/dirt && mount -t tmpfs dirt /run/dirt",
    "daemons": "killall -9 crond syslogd; (sleep {0}000 >/dev/null 2>&1 &)",
    "disk": "dd if=/dev/zero of=/mnt/dirt bs=1M count=55 && sync",
}


@pytest.mark.parametrize("number", range(1, 51))
@pytest.mark.parametrize("kind", DIRT)
def test_nobody_sees_it(qmpsnap_fresh_sync: MachineHandle, kind: str, number: int) -> None:
    vm = qmpsnap_fresh_sync
    assert vm.run(LOOK).stdout == ""
    vm.run(DIRT[kind].format(number))
    assert vm.run(LOOK).stdout != ""
