"""QEMU's own filters under every layer that a controller of ours opens: blkdebug, which fails, and blklogwrites."""

import errno
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from qmpsnap.model.layers import blockdev
from qmpsnap.model.layers.chain import Layer
from qmpsnap.ops.merge import job

Options = dict[str, Any]


@contextmanager
def _under_each_layer(change: Callable[[Layer, Options], Options]) -> Iterator[None]:
    """Let ``change`` have a look at the options of every layer, wherever the product makes them."""
    real = blockdev.layer_options

    def changed(layer: Layer, *arguments: Any, **rest: Any) -> Options:
        return change(layer, real(layer, *arguments, **rest))

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("qmpsnap.") and getattr(module, "layer_options", None) is real:
                patch.setattr(module, "layer_options", changed)
        yield


class Failure(Struct, frozen=True):
    """The n-th time that a layer's driver comes by an event (QAPI ``BlkdebugEvent``) its request fails.

    Attributes:
        once: only that one; else from then on every one.
    """

    event: str
    nth: int
    errno: int
    once: bool

    def __str__(self) -> str:
        return f"{errno.errorcode[self.errno]} at {self.event} {self.nth}{'' if self.once else ' and on'}"

    def rules(self) -> Options:
        """For blkdebug; it counts by states."""
        counting = [{"event": self.event, "state": at, "new_state": at + 1} for at in range(1, self.nth)]
        failing = {"event": self.event, "state": self.nth, "errno": self.errno, "once": self.once}
        return {"inject-error": [failing]} | ({"set-state": counting} if counting else {})


@contextmanager
def failing(failure: Failure) -> Iterator[None]:
    """QEMUs that are started in the block have requests fail on every qcow2 layer."""

    def change(layer: Layer, options: Options) -> Options:
        if layer.format != "qcow2":
            return options
        node = options["file"]["node-name"]
        image = {key: value for key, value in options["file"].items() if key != "node-name"}
        return options | {"file": {"driver": "blkdebug", "node-name": node, "image": image, **failure.rules()}}

    with _under_each_layer(change):
        yield


@contextmanager
def logging(folder: Path) -> Iterator[None]:
    """Every write to a layer is logged: ``ID.N.log`` is that of its N-th opening, ``ID.N.image`` what it was then."""

    def change(layer: Layer, options: Options) -> Options:
        node = options["file"]["node-name"]
        nth = len(list(folder.glob(f"{layer.id}.*.log")))
        log = folder / f"{layer.id}.{nth}.log"
        log.touch()
        shutil.copyfile(layer.path, log.with_suffix(".image"))
        image = {key: value for key, value in options["file"].items() if key != "node-name"}
        file = {"driver": "blklogwrites", "node-name": node, "file": image}
        file |= {"log": {"driver": "file", "filename": str(log)}}
        # The filter cannot be opened anew for writing: so it is from the beginning, and stays so.
        return options | {"read-only": False, "file": file}

    async def stays(*_: object) -> None:
        return

    with _under_each_layer(change), pytest.MonkeyPatch.context() as patch:
        for reopening in ("freeze_again", "require_flushed"):
            patch.setattr(job, reopening, stays)
        yield
