"""What a plan was made of, to be compared with what is there once it is applied."""

from msgspec import Struct

from qmpsnap.errors import StateError
from qmpsnap.model.planning.inputs import Basis


class Expectation(Struct):
    """The first one who looks records what there is; whoever works on the machine then must find the same, once."""

    seen: tuple[Basis, str] | None = None
    """What the store said of the machine, and whether its guest ran."""
    met: bool = False

    def see(self, basis: Basis, mode: str) -> None:
        """Record what a plan is made of; a plan of several parts is of the moment of its first."""
        self.seen = self.seen or (basis, mode)

    def require(self, basis: Basis, mode: str) -> None:
        """Make sure that this is what was seen; what the plan itself changes afterwards is not compared."""
        if not self.met and self.seen != (basis, mode):
            raise StateError(
                f"machine {basis.name} has changed since the plan was made", hint="plan again", machine=basis.name
            )
        self.met = True
