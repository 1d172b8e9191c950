"""The hooks that a suite's ``conftest.py`` may have."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qmpsnap.sync import MachineHandle


@pytest.hookspec
def pytest_qmpsnap_set_up(machine: "MachineHandle", config: pytest.Config) -> None:
    """Bring a machine that has just booted into the state in which every test gets it.

    Called once for each machine of the session, in the process that boots it; also where each worker boots its own.

    Args:
        machine: runs, and its guest agent has answered, if it has one. Its name begins with that in the spec.
        config: of the session.
    """
