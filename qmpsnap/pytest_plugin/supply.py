"""The machines of one process's tests: booted or found, kept until the session ends.

The event loop of all of it runs in a thread of its own, so that it outlives each test's.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from msgspec import Struct
from msgspec.json import decode, encode
from msgspec.structs import replace

from qmpsnap.api.controller import Controller as AsyncController
from qmpsnap.api.controller import open_controller
from qmpsnap.api.machine_handle import MachineHandle as AsyncHandle
from qmpsnap.errors import HostCannot, NotFoundError, QmpsnapError
from qmpsnap.machine.config.launch_dir import build_guest
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.pytest_plugin import evidence, ways
from qmpsnap.pytest_plugin.place import Place
from qmpsnap.pytest_plugin.session import Settings
from qmpsnap.pytest_plugin.told import TOLD, Told
from qmpsnap.pytest_plugin.wanted import Wanted
from qmpsnap.pytest_plugin.ways import Forks, Source
from qmpsnap.sync import Controller, MachineHandle
from qmpsnap.sync.runner import Runner


class _Made(Struct, frozen=True):
    """What the first process that needs a machine tells the others: how its tests get it, or why it cannot be had."""

    way: str
    why: str = ""
    templates: str = ""
    error: str = ""


class _BootFailed(Exception):
    """The machine does not come up, whichever way tests are to get it afterwards."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Supply:
    """Machines for tests, one source for each that is wanted."""

    def __init__(self, config: pytest.Config, stack: ExitStack, cache: Path) -> None:
        self.config, self.guest = config, cache / "guest"
        self._settings = Settings.of(config)
        self._place = Place.of(config)
        self._stack = stack
        self._sources: dict[str, Source | Exception] = {}
        self._kept = 0
        home = self._place.make()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # by another worker
            (home / "cache").symlink_to(cache)
        portal = stack.enter_context(start_blocking_portal())
        stack.callback(lambda: portal.call(portal.stop, True))  # Ctrl-C may have left a block that nobody leaves
        self._runner = Runner(portal)
        self._transcript = stack.enter_context(evidence.transcribed())
        self._context = stack.enter_context(portal.wrap_async_context_manager(open_controller(home))).context

    @contextmanager
    def taken(self, wanted: Wanted) -> Iterator[MachineHandle]:
        """A fresh machine for one test."""
        source = self.source(wanted)
        begun = time.perf_counter()
        with source.take() as machine:
            self._told(wanted).seconds.append(time.perf_counter() - begun)
            yield machine
            self._transcript.take(machine.name)

    def keep(self, machine: MachineHandle, item: pytest.Item, folder: Path) -> None:
        """Keep what there is of a failed test's machine, and say in its report what to do with it."""
        whole, self._kept = self._kept < self._settings.keep_failed, self._kept + 1
        messages = self._transcript.take(machine.name)

        async def keep() -> str:
            return await evidence.keep(awaited(machine), folder / "qmpsnap", messages, test=item.name, whole=whole)

        try:
            said = self._runner.run(keep)
        except (QmpsnapError, OSError) as error:
            said = f"nothing could be kept of machine {machine.name}: {error}"
        item.add_report_section("teardown", "qmpsnap", said)

    def source(self, wanted: Wanted) -> Source:
        """Where tests get that machine from; made by the first one that needs it."""
        if wanted.key not in self._sources:
            try:
                self._sources[wanted.key] = self._made(wanted)
            except Exception as error:  # noqa: BLE001 - every test that needs it fails with it, and boots it no more
                self._sources[wanted.key] = error
        source = self._sources[wanted.key]
        if isinstance(source, Exception):
            raise source
        return source

    def _told(self, wanted: Wanted) -> Told:
        return self.config.stash[TOLD][wanted.key]

    def _made(self, wanted: Wanted) -> Source:
        with self._place.locked(wanted.key) as said:
            first = not said.exists()
            made = _Made(self._settings.ways[0]) if first else decode(said.read_bytes(), type=_Made)
            if made.error:
                raise HostCannot(f"another worker could not have machine {wanted.spec.name}: {made.error}")
            try:
                source, made = self._first_possible(wanted, made, first=first)
            except Exception as error:  # noqa: BLE001 - the hook may raise anything
                failure = error.error if isinstance(error, _BootFailed) else error
                if first:
                    said.write_bytes(encode(replace(made, error=str(failure))))
                raise failure from failure.__cause__
            if first:
                said.write_bytes(encode(made))
            told = Told(wanted.spec.name, made.way, made.why, [])
            self.config.stash.setdefault(TOLD, {})[wanted.key] = told
            return source

    def _first_possible(self, wanted: Wanted, made: _Made, *, first: bool) -> tuple[Source, _Made]:
        possible = self._settings.ways[self._settings.ways.index(made.way) :]
        for way in possible:
            try:
                if way == "fork":
                    source, folder = self._forks(wanted, made.templates, first=first)
                    return source, replace(made, way=way, templates=folder)
                return self._own(way, wanted), replace(made, way=way)
            except QmpsnapError as error:
                if way == possible[-1]:
                    raise
                made = replace(made, why="; ".join(filter(None, (made.why, f"no {way}: {error.message}"))))
        raise AssertionError("unreachable: the last way raises")

    def _forks(self, wanted: Wanted, folder: str, *, first: bool) -> tuple[Source, str]:
        if first:
            folder = self._place.folder_for(wanted.spec.memory)
            boot = self._boot(wanted)
            machine = self._define(self._controller_of(folder), wanted.spec, wanted)
            try:
                boot(machine)
                machine.snapshot(ways.WARM, kind="full")
            finally:
                if machine.is_running():
                    machine.stop(force=True)
        else:
            machine = self._controller_of(folder).machine(wanted.spec.name)
        stack = self._stack.enter_context(ExitStack())
        return Forks(stack, machine, self._settings), folder

    def _own(self, way: str, wanted: Wanted) -> Source:
        worker = getattr(self.config, "workerinput", {}).get("workerid", "")
        spec = replace(wanted.spec, name=f"{wanted.spec.name}-{worker or 'own'}")

        def define(q: Controller) -> MachineHandle:
            return self._define(q, spec, wanted)

        return ways.own(way, self._stack, self._controller_of(""), define, self._boot(wanted))

    def _define(self, q: Controller, spec: MachineSpec, wanted: Wanted) -> MachineHandle:
        with contextlib.suppress(NotFoundError):
            ways.remove(q.machine(spec.name))  # of a worker that died
        return q.define(spec, folders=wanted.folders, allow_extra=self._settings.allow_extra)

    def _boot(self, wanted: Wanted) -> Callable[[MachineHandle], None]:
        hook = self.config.hook.pytest_qmpsnap_set_up
        if not wanted.spec.agent and not hook.get_hookimpls():
            raise pytest.UsageError(
                f"machine {wanted.spec.name} has no guest agent, so nobody can tell when it has booted; write the hook"
                " pytest_qmpsnap_set_up, which returns when it has"
            )

        def boot(machine: MachineHandle) -> None:
            try:
                if any(path and path.startswith(f"{self.guest}/") for path in (wanted.spec.kernel, wanted.spec.initrd)):
                    build_guest(self.guest)
                machine.start()
                if wanted.spec.agent:
                    machine.run("true", timeout=self._settings.boot_timeout)
                hook(machine=machine, config=self.config)
            except Exception as error:
                raise _BootFailed(error) from error

        return boot

    def _controller_of(self, folder: str) -> Controller:
        """The controller, which keeps templates in that folder."""
        context = self._context
        home = replace(context.home, templates=Path(folder) if folder else None)
        return Controller(self._runner, AsyncController(replace(context, home=home)))


def awaited(machine: MachineHandle) -> AsyncHandle:
    """The same machine for a test's own event loop."""
    handle = machine._handle  # noqa: SLF001 - of the same library
    return AsyncHandle(replace(handle._context, planning=anyio.Lock()), handle.name)  # noqa: SLF001
