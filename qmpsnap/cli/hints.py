"""Hints as a person at a terminal types them."""

from typing import Final

from qmpsnap.hint import Call, Option, parts_of

_COMMANDS: Final = {
    "attach_disk": "disk attach",
    "attach_nic": "nic attach",
    "cancel": "job cancel",
    "chains": "chain",
    "delete_snapshots": "snapshot delete",
    "detach_disk": "disk detach",
    "detach_nic": "nic detach",
    "describe_snapshot": "snapshot describe",
    "import_argv": "import argv",
    "import_libvirt": "import libvirt",
    "import_proxmox": "import proxmox",
    "jobs": "job list",
    "launched_as": "adopt",
    "pop": "snapshot pop",
    "prune_templates": "template prune",
    "push": "snapshot push",
    "rebuild": "check --rebuild",
    "rename_snapshot": "snapshot rename",
    "revert": "snapshot revert",
    "run": "exec",
    "snapshot": "snapshot create",
    "snapshots": "snapshot list",
    "state": "show",
    "take": "adopt",
    "templates": "template list",
    "wait": "job wait",
}
"""Commands that are called otherwise than the method that does the same."""

_OPTIONS: Final = {
    "compression": "--compress",
    "files": "--file",
    "folders": "--allow",
    "max_pause_ms": "--max-pause",
    "socket": "--qmp",
    "spec": "--take",
}
"""Options that are called otherwise than the keyword that does the same."""

_IMPLIED: Final = {"launched_as": "--spec"}
"""What makes a command the one that does the same as a method."""

_VALUES: Final = {
    ("disks", "keep"): "--keep-disks",
    ("disks", "remove"): "--remove-disks",
    ("memory", False): "--no-memory",
    ("mode", "finish"): "--finish",
    ("state", "paused"): "--paused",
}
"""Values that have an option of their own."""


def as_typed(text: str) -> str:
    """The text, with the commands and options of this command line in it."""
    return "".join(part if isinstance(part, str) else _typed(part) for part in parts_of(text))


def _typed(part: Call | Option) -> str:
    if isinstance(part, Call):
        name = _COMMANDS.get(part.verb, part.verb)
        options = (*map(_option, part.options), _IMPLIED.get(part.verb))
        return " ".join(filter(None, ("qmpsnap", name, part.machine, *part.arguments, *options)))
    return _option(part)


def _option(part: Option) -> str:
    if isinstance(part.value, str | bool) and (own := _VALUES.get((part.name, part.value))):
        return own
    name = _OPTIONS.get(part.name) or f"--{part.name.replace('_', '-')}"
    if part.value is True:
        return name
    if isinstance(part.value, dict):
        return " ".join(f"{name} {key}={value}" for key, value in part.value.items())
    return f"{name} {part.value}"
