"""Runs what is compared in turns, A B A B, and keeps what each run took."""

import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from tests.bench.program import Sample, in_turns, say

Way = Callable[[], Awaitable[Sample]]
"""One run of one of the things that are compared: sets up, times, and puts everything back."""


class Results:
    """The samples of every measure and way, as ``samples["list", "virsh"]``."""

    def __init__(self, rounds: int, wanted: Collection[str]) -> None:
        self.rounds = rounds
        self.samples: dict[tuple[str, str], list[Sample]] = {}
        self._wanted = wanted

    def wants(self, *measures: str) -> bool:
        """Whether any of these measures was asked for."""
        return any(measure in self._wanted for measure in measures)

    async def compare(self, measure: str, ways: Mapping[str, Way], *, share: float = 1) -> None:
        """Run all ways in turns and keep their samples; nothing is done where the measure was not asked for.

        Each way is run once before, unrecorded: what is loaded or cached then is so for all.

        Args:
            measure: its name.
            ways: what is compared, by name.
            share: of the rounds, for what takes long.
        """
        if measure not in self._wanted:
            return
        say(f"{measure} ...")
        for number in range(-1, max(2, round(self.rounds * share))):
            for way in in_turns(tuple(ways), number):
                sample = await ways[way]()
                if number >= 0:
                    self.samples.setdefault((measure, way), []).append(sample)


@contextmanager
def clock() -> Iterator[dict[str, float]]:
    """A sample of how long the block takes in this process."""
    sample: dict[str, float] = {}
    since, used = time.monotonic(), time.process_time()
    yield sample
    sample["wall"] = (time.monotonic() - since) * 1000
    sample["cpu"] = (time.process_time() - used) * 1000
