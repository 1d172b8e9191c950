"""UEFI firmware images of this host."""

from collections.abc import Sequence
from pathlib import Path

from qmpsnap.errors import HostCannot
from qmpsnap.machine.starting.argv import Firmware

PAIRS = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
)
"""Where distributions put code and variable template."""


def find_firmware(pairs: Sequence[tuple[str, str]] = PAIRS) -> Firmware:
    """The first pair that is there; ``vars`` is the template that each machine gets its own copy of."""
    for code, variables in pairs:
        if Path(code).is_file() and Path(variables).is_file():
            return Firmware(code=code, vars=variables)
    raise HostCannot("there is no UEFI firmware on this host", hint="apt-get install ovmf")
