"""Moments and lengths of time as they are told to people and programs."""

import time


def moment(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339, UTC, in whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def exceeds(pause_ms: float | None, limit: float | None) -> bool:
    """Whether a pause was longer than was agreed to, where either is known."""
    return pause_ms is not None and limit is not None and pause_ms > limit
