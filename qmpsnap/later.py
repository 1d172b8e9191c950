"""Modules of verbs, imported when something of one is asked for first: few programs, and no command, need all."""

from importlib import import_module
from typing import Any


class Later:
    """Stands for a module of :mod:`qmpsnap`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(f"qmpsnap.{self._name}"), name)
