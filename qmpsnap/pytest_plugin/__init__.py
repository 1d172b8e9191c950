"""pytest fixtures for test suites that need virtual machines.

- ``qmpsnap_fresh``: a booted machine for each test, in the state in which it was once set up for all of them.
- ``qmpsnap_machine``: the machine that those are made from, for the session.
- ``qmpsnap_fresh_sync``, ``qmpsnap_machine_sync``: the same for tests without asyncio.
- ``qmpsnap_controller``: a :class:`qmpsnap.Controller` on an empty home in a temporary folder.
- ``qmpsnap_small_guest``: a running Linux guest on that home, with a guest agent that answers.

However a test or the session ends, machines are stopped and files removed.

pytest imports this package in every environment that has qmpsnap installed. Slow imports (asyncio, qemu.qmp) are
therefore inside the fixtures.
"""

from qmpsnap.pytest_plugin.fixtures import qmpsnap_controller, qmpsnap_small_guest
from qmpsnap.pytest_plugin.fresh import (
    _qmpsnap_supply,
    _qmpsnap_taken,
    qmpsnap_fresh,
    qmpsnap_fresh_sync,
    qmpsnap_machine,
    qmpsnap_machine_sync,
)
from qmpsnap.pytest_plugin.session import (
    pytest_addhooks,
    pytest_addoption,
    pytest_configure,
    pytest_configure_node,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
    pytest_unconfigure,
)

__all__ = [
    "_qmpsnap_supply",
    "_qmpsnap_taken",
    "pytest_addhooks",
    "pytest_addoption",
    "pytest_configure",
    "pytest_configure_node",
    "pytest_runtest_makereport",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
    "pytest_unconfigure",
    "qmpsnap_controller",
    "qmpsnap_fresh",
    "qmpsnap_fresh_sync",
    "qmpsnap_machine",
    "qmpsnap_machine_sync",
    "qmpsnap_small_guest",
]
