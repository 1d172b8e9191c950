"""What the measures share: the folder, qmpsnap's homes, libvirt, and where results go."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.bench.libvirt import Libvirt
from tests.bench.measure import Results, Way
from tests.bench.program import QMPSNAP, Sample, run


@dataclass(frozen=True)
class Setting:
    """Where a comparison runs."""

    folder: Path
    results: Results
    virt: Libvirt
    accel: str
    """``tcg`` or ``kvm``, as qmpsnap chooses it on this host."""

    def folder_for(self, name: str) -> Path:
        """A new folder for the files of one measure."""
        place = self.folder / name
        place.mkdir()
        return place


def command(*words: str, home: Path | None = None) -> Way:
    """A whole command of qmpsnap, of the home given or the usual one."""

    async def way() -> Sample:
        if home is None:
            return run(QMPSNAP, *words)
        return run("/usr/bin/env", f"QMPSNAP_HOME={home}", QMPSNAP, *words)

    return way


def usual_home() -> Path:
    """The home that commands have unless another is named."""
    return Path(os.environ["QMPSNAP_HOME"])
