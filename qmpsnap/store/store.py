"""The contract of a store: machines, disks, layers, snapshots and the journal.

``tests/store/test_contract.py`` holds every backend to it; :mod:`qmpsnap.store.sqlite.backend` is the one there is.
Each call is one transaction and may block for an fsync: async callers go through a worker thread.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Protocol

from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.stamp import Stamp
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change, Ended, Operation, OperationState, P
from qmpsnap.model.operations.undefine import UndefinePlan
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.store.sqlite.frozen_files import FrozenTable
from qmpsnap.store.sqlite.homes import HomeTable
from qmpsnap.store.sqlite.images import ImageTable
from qmpsnap.store.sqlite.pruning import PrunedTable
from qmpsnap.store.sqlite.record_table import RecordTable

Removal = Callable[[Sequence[Layer]], UndefinePlan]
"""Plans the removal of the files of layers that nobody needs any more."""


class Store(Protocol):
    """The calls of every backend. Unknown names raise ``NotFoundError``; a failed call changes nothing."""

    @property
    def images(self) -> ImageTable:
        """Which images each machine reads."""

    @property
    def frozen(self) -> FrozenTable:
        """The state of frozen images' files; opening an operation removes those of images that it may write to."""

    @property
    def pruned(self) -> PrunedTable:
        """How many ended operations of each machine were removed from the journal."""

    @property
    def home(self) -> HomeTable:
        """The id and path of the home that this store belongs to."""

    @property
    def records(self) -> RecordTable:
        """The machines' records beside their images; a change is written there before its operation settles."""

    @property
    def is_there(self) -> bool:
        """Whether the store exists; if not, it is empty and keeps nothing."""

    def machines(self) -> tuple[Machine, ...]:
        """All machines by name, those of other hosts included."""

    def machine(self, name: str) -> Machine:
        """One machine."""

    def ephemeral(self) -> tuple[str, ...]:
        """Names of the forks that are removed once their QEMU has ended."""

    def chains(self, machine: str) -> tuple[Chain, ...]:
        """The live chains, in the order of the spec's disks."""

    def snapshots(self, machine: str) -> tuple[Snapshot, ...]:
        """The machine's snapshots, oldest first."""

    def layer(self, layer: LayerId) -> Layer:
        """One layer, in a live chain or not."""

    def layers(self, wanted: Iterable[LayerId]) -> dict[LayerId, Layer]:
        """Those of these layers that are recorded."""

    def layer_at(self, path: str) -> Layer | None:
        """The layer recorded for that absolute path."""

    def layers_of_file(self, device: int, inode: int) -> tuple[Layer, ...]:
        """The layers recorded for that file."""

    def forest(self) -> Forest:
        """Every layer, disk and point of all machines; it takes the longer, the more there are."""

    def forest_around(self, machine: str, *layers: LayerId) -> Forest:
        """The part of it that is connected with a machine's layers, and with those named; as much as all of it says.

        A machine's layers are those that its disks and snapshots name, and those that lie in its folder.
        """

    def forest_below(self, machine: str) -> Forest:
        """The part of it that a machine reads, with every disk and point in that, but not what others have above it."""

    def at_once(self) -> AbstractContextManager[None]:
        """For the block, which accesses no file and changes nothing: all that this thread reads is of one moment."""

    def basis(self, machine: str, *, sharers: bool = True) -> Basis:
        """What a machine's plans are made from, of one moment; the machine need not be recorded yet.

        Args:
            machine: its name.
            sharers: with the layers that are connected with its own, and those at chosen places that no machine reads;
                else what it reads itself.
        """

    def require_writable(self) -> None:
        """Make sure that it can be written, before something begins that has to be recorded afterwards."""

    def set_process(self, machine: str, process: Process | None) -> None:
        """Record the QEMU that runs the machine, or that none does."""

    def next_serial(self) -> int:
        """The number the next operation would get; for plans that are only printed."""

    def open_operation(self, plan: P, basis: Basis, *, serial: OperationId, serials: int = 1) -> Operation[P]:
        """Make a plan durable as ``planned``, under the number that it was made with; it takes so many numbers.

        No file is accessed, so waiting for storage blocks nobody's access to the store. The records that the plan was
        made from have to be unchanged. A plan's ``opening`` change, if it has one, is applied in the same transaction:
        before anything is done.

        Raises:
            NumberTaken: another operation has that number, or a later one: make the plan again.
            OperationPending: an earlier operation of the machine has not ended, or one of another machine that changes
                what this one reads or changes, or is about to read what this one changes.
            StateError: another machine reads what would change, or writes to what would be read, by now; or the store
                says something else of the machine, or of a layer that the plan is about.
        """

    def mark(
        self,
        operation: OperationId,
        state: OperationState,
        *,
        step: str | None = None,
        error: str | None = None,
        writes: Iterable[LayerId] = (),
    ) -> None:
        """Make an operation's progress durable; ``step`` is one that :mod:`qmpsnap.model.operations.steps` knows.

        From then on it writes to the layers ``writes``: what is recorded of them as frozen is forgotten with it.
        """

    def settle(
        self,
        operation: OperationId,
        machine: str,
        change: Change,
        *,
        step: str | None = None,
        state: Ended = "settled",
        error: str | None = None,
        frozen: Mapping[LayerId, Stamp] = MappingProxyType({}),
    ) -> None:
        """Apply a change and end the operation so, both or neither; with ``step`` the operation goes on from there.

        ``frozen``: the files of the layers that it has frozen, which are recorded with it unless an image of the
        machine is known to have been overwritten.
        """

    def apply(self, machine: str, change: Change) -> None:
        """Apply a change that needs no operation, because it is nothing but this one transaction."""

    def forget(self, machine: str, *, removal: Removal | None = None) -> tuple[Layer, ...]:
        """Remove the machine and the layers that only it used; returns those, from the top down.

        Layers that others read stay, hidden where nothing names them any more. Operations that are open have failed;
        the one that removes the files of the layers that went, if they are to go, is opened with the same commit.
        """

    def unborn(self) -> tuple[str, ...]:
        """Names that have an open operation and are no machine's: it is still to be one, or its files are to go."""

    def operations(self, machine: str, *, only_open: bool = False) -> tuple[Operation, ...]:
        """The machine's journal, oldest first; without those that were pruned."""

    def follow_devices(self) -> None:
        """Where the kernel has given a file system another device number, the recorded files have it from now on.

        Left alone where the store has machines of other hosts, on which the same files have other numbers.
        """
