"""What pytest asks of the plugin: options, the marker, one folder for all workers, and the lines of the summary."""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Self

import pytest

from qmpsnap.pytest_plugin import hooks
from qmpsnap.pytest_plugin.place import KEY, Place
from qmpsnap.pytest_plugin.told import TOLD, Told, lines

FAILED = pytest.StashKey[bool]()
"""Of a test whose set-up or call has failed."""
WAYS = ("fork", "load", "revert", "boot")
"""How a test can get its machine, the quickest first."""
_ALL_TOLD = pytest.StashKey[list[Told]]()


class Settings(NamedTuple):
    """The options of a session."""

    ways: tuple[str, ...]
    pool: int
    boot_timeout: float
    keep_failed: int
    allow_extra: bool

    @classmethod
    def of(cls, config: pytest.Config) -> Self:
        """As ``pytest.ini`` and the command line have them; ``pytest.UsageError`` where they make no sense."""
        by = config.getoption("qmpsnap_by") or config.getini("qmpsnap_by")
        if by not in ("auto", *WAYS):
            raise pytest.UsageError(f"qmpsnap_by is {by!r}; use auto, {', '.join(WAYS)}")
        return cls(
            ways=WAYS if by == "auto" else (by,),
            pool=_number(config, "qmpsnap_pool", 1),
            boot_timeout=float(_number(config, "qmpsnap_boot_timeout", 1)),
            keep_failed=_number(config, "qmpsnap_keep_failed", 0),
            allow_extra=bool(config.getini("qmpsnap_allow_extra")),
        )


def _number(config: pytest.Config, name: str, least: int) -> int:
    said = str(config.getini(name))
    if not said.isascii() or not said.isdigit() or int(said) < least:
        raise pytest.UsageError(f"{name} is {said!r}; use a whole number from {least} on")
    return int(said)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command line and of ``pytest.ini``."""
    group = parser.getgroup("qmpsnap", "virtual machines (qmpsnap)")
    group.addoption("--qmpsnap-spec", metavar="FILE", help="spec of the machine that tests get (ini: qmpsnap_spec)")
    group.addoption(
        "--qmpsnap-by",
        choices=("auto", *WAYS),
        help="how a test gets a fresh machine; auto takes the first one that is possible (ini: qmpsnap_by)",
    )
    parser.addini("qmpsnap_spec", "spec of the machine that tests get, a file beside this one; else the small guest")
    parser.addini("qmpsnap_by", f"how a test gets a fresh machine: auto, {', '.join(WAYS)}", default="auto")
    parser.addini("qmpsnap_pool", "machines that each worker keeps waiting (2)", default="2")
    parser.addini("qmpsnap_boot_timeout", "seconds until the guest agent of a booting machine answers", default="180")
    parser.addini("qmpsnap_keep_failed", "failed machines that each worker keeps (3)", default="3")
    parser.addini("qmpsnap_allow_extra", "accept 'extra' QEMU arguments of specs", type="bool", default=False)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """The hooks that a suite may have."""
    pluginmanager.add_hookspecs(hooks)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "qmpsnap(spec=None, memory=None, disks=()): the machine of this test: another spec file, other memory ('512M'),"
        " further disks ([{'name': 'data', 'size': '64M'}])",
    )
    config.stash[_ALL_TOLD] = []


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Let a worker of xdist use the session's folder."""
    Place.of(node.config).send(node.workerinput)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember that a test has failed: its machine is kept."""
    report = yield
    if report.failed and call.when != "teardown":
        item.stash[FAILED] = True
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends what it has to tell."""
    if (sent := getattr(session.config, "workeroutput", None)) is not None:
        sent["qmpsnap"] = [tuple(told) for told in session.config.stash.get(TOLD, {}).values()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker has sent."""
    for told in getattr(node, "workeroutput", {}).get("qmpsnap", ()):
        node.config.stash[_ALL_TOLD].append(Told(*told))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how tests have got their machines, and how quickly."""
    found: Sequence[Told] = [*config.stash.get(TOLD, {}).values(), *config.stash[_ALL_TOLD]]
    if found:
        terminalreporter.section("qmpsnap")
        for line in lines(found):
            terminalreporter.line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what is left of the session's machines: all workers have ended."""
    if KEY in config.stash:
        config.stash[KEY].clear()
