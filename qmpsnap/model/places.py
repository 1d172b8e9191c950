"""Where a user's home lies, by the environment: as text, which is all that a reading verb needs."""

from __future__ import annotations

import os

from qmpsnap.host.value import Value

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Mapping

RECORD = "record.json"
"""The name of a machine's record in its folder."""

ACTIVE = ("active.env", "active.json")
"""The names of the files in an adopted machine's folder that tell its owner which images to start."""


class Places(Value):
    """The four places; :class:`qmpsnap.model.home.Home` says what each is for and what lies in it."""

    data: str
    run: str
    cache: str
    images: tuple[str, ...]

    @property
    def beneath(self) -> bool:
        """Whether all lies under one folder, as ``QMPSNAP_HOME`` has it."""
        return self.run == f"{self.data}/run" and self.cache == f"{self.data}/cache"

    @property
    def store(self) -> str:
        """The store's file."""
        return f"{self.data}/qmpsnap.db"

    @property
    def machines(self) -> str:
        """The folder with one folder of images per machine."""
        return f"{self.data}/machines"


def from_environment(environment: Mapping[str, str], *, uid: int) -> Places:
    """The places for a user: ``QMPSNAP_HOME``, or the XDG folders, or root's under ``/var`` and ``/run``."""
    user = _tidy(environment.get("HOME", "/"))
    cache = _xdg(environment, "XDG_CACHE_HOME") or _inside(user, ".cache")
    if home := environment.get("QMPSNAP_HOME"):
        data = _absolute(home)
        run, cache = f"{data}/run", f"{data}/cache"
    elif uid == 0:
        data, run, cache = "/var/lib/qmpsnap", "/run/qmpsnap", _inside(cache, "qmpsnap")
    else:
        data = _inside(_xdg(environment, "XDG_DATA_HOME") or _inside(user, ".local/share"), "qmpsnap")
        runtime = _xdg(environment, "XDG_RUNTIME_DIR")
        run, cache = _inside(runtime, "qmpsnap") if runtime else f"{data}/run", _inside(cache, "qmpsnap")
    images = tuple(_absolute(part) for part in environment.get("QMPSNAP_IMAGES", "").split(":") if part)
    return Places(data, run, cache, images)


def _xdg(environment: Mapping[str, str], variable: str) -> str:
    """The folder a variable names; a relative one counts for nothing, as the XDG specification wants it."""
    path = environment.get(variable, "")
    return _tidy(path) if path.startswith("/") else ""


def _absolute(path: str) -> str:
    return _tidy(path if path.startswith("/") else f"{os.getcwd()}/{path}")  # noqa: PTH109


def _tidy(path: str) -> str:
    """The path as pathlib has it, which the store's texts are compared with."""
    root = "//" if path.startswith("//") and not path.startswith("///") else "/" if path.startswith("/") else ""
    return root + "/".join(part for part in path.split("/") if part not in ("", "."))


def _inside(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name
