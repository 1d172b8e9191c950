"""Moments in time as they are told to people and programs."""

import time


def moment(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339, UTC, in whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
