"""UEFI firmware images: this host's, or those that a spec names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qmpsnap.errors import HostCannot, SpecError
from qmpsnap.machine.starting.argv import Firmware
from qmpsnap.model.machines.spec import MachineSpec

PAIRS = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
)
"""Where distributions put code and variable template."""

_FLASH: Final = 8 << 20
"""Bytes that QEMU maps at most for both images (machine property ``max-fw-size``)."""
_BLOCK: Final = 4096
_QCOW2: Final = b"QFI\xfb"


def find_firmware(pairs: Sequence[tuple[str, str]] = PAIRS) -> Firmware:
    """The first pair that is there; ``vars`` is the template that each machine gets its own copy of."""
    for code, variables in pairs:
        if Path(code).is_file() and Path(variables).is_file():
            return Firmware(code=code, vars=variables)
    raise HostCannot("there is no UEFI firmware on this host", hint="apt-get install ovmf")


def code_of(spec: MachineSpec) -> str:
    """The code that a machine runs."""
    return spec.uefi_code or find_firmware().code


def chosen(spec: MachineSpec, pairs: Sequence[tuple[str, str]] = PAIRS) -> Firmware:
    """The code that a new machine runs, and the variable store that it gets a copy of.

    A variable store fits only the code that it was made with: without ``uefi-code`` the pair is taken whose template
    has its size.
    """
    code, variables = spec.uefi_code, spec.uefi_variables
    for named in filter(None, (code, variables)):
        _require_flash(named)
    if code and not variables:
        variables = next((template for other, template in pairs if other == code), None)
        if variables is None:
            raise SpecError(
                f"uefi-code: the variable template of {code} is not known",
                hint="name a variable store that was made with it as 'uefi-variables'",
            )
    if variables and not code:
        size = Path(variables).stat().st_size
        there = [pair for pair in pairs if all(Path(file).is_file() for file in pair)]
        code = next((code for code, template in there if Path(template).stat().st_size == size), None)
        if code is None:
            raise HostCannot(
                f"uefi-variables: no firmware of this host has a variable store of {size} bytes, as {variables} has",
                hint="apt-get install ovmf, or name the firmware that it was made with as 'uefi-code'",
            )
    return Firmware(code=code, vars=variables) if code and variables else find_firmware(pairs)


def _require_flash(path: str) -> None:
    """Refuse a file that QEMU could not map as flash."""
    try:
        size = Path(path).stat().st_size
        with Path(path).open("rb") as file:
            begins = file.read(len(_QCOW2))
    except OSError as error:
        raise HostCannot(f"the firmware image {path} cannot be read: {error.strerror}") from error
    if begins == _QCOW2:
        raise SpecError(
            f"the firmware image {path} is a qcow2 image, and flash is raw",
            hint=f"convert it: qemu-img convert -f qcow2 -O raw {path} NEW, then name NEW",
        )
    if not 0 < size <= _FLASH or size % _BLOCK:
        raise SpecError(
            f"the firmware image {path} has {size} bytes; flash has a multiple of {_BLOCK} and {_FLASH} at most"
        )
