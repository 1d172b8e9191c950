"""CPU models that are the same with every QEMU, so that memory saved with one can be loaded with the next."""

from collections.abc import Mapping

Value = bool | int | str

STATIC = "base"
"""QEMU's x86 model without any feature, the same whatever its version, machine type and accelerator are."""
NOT_KEPT = frozenset({"pcommit"})
"""What a later QEMU (10.0) does not give any more. No processor has it, so no guest misses it."""


def static_model(nothing: Mapping[str, Value], wanted: Mapping[str, Value]) -> str:
    """The argument of ``-cpu`` for a model as it is now: the static one, and what this one has besides; pure.

    Empty where it cannot be written down: ``-cpu`` takes no value with a comma.
    """
    added = {name: value for name, value in sorted(wanted.items()) if nothing.get(name) != value}
    words = [f"{name}={_word(value)}" for name, value in added.items() if name not in NOT_KEPT]
    return "" if not words or any("," in word for word in words) else ",".join((STATIC, *words))


def _word(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
