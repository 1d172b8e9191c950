"""The plan of a fork: a machine on the points of another one's snapshot. Pure."""

import time
import uuid

from msgspec.structs import replace

from qmpsnap.errors import StateError
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine, Origin
from qmpsnap.model.machines.spec import MachineSpec, NicSpec
from qmpsnap.model.names import LayerId, layer_id
from qmpsnap.model.operations.operation import Change, ForkPlan, Overlay
from qmpsnap.model.planning.inputs import Basis, PlanInputs
from qmpsnap.ops.base import vmgenid
from qmpsnap.ops.fork.request import ForkRequest


def points(parent: Basis, snapshot: Snapshot) -> tuple[Chain, ...]:
    """The chain below each disk's point, in the order of the spec's disks."""
    assert parent.record
    found = [(disk, snapshot.point(disk.name)) for disk in parent.record.spec.disks]
    return tuple(parent.forest.chain(disk.name, point.layer) for disk, point in found if point)


def machine(
    parent: Machine, snapshot: Snapshot, chains: tuple[Chain, ...], *, name: str, request: ForkRequest
) -> Machine:
    """The machine to be: of its parent's hardware, with an identity of its own as far as QEMU gives it one."""
    origin = Origin(
        machine=parent.name,
        snapshot=snapshot.name,
        uuid=parent.origin.uuid if parent.origin else parent.uuid,
        ephemeral=request.ephemeral,
        owner=request.owner,
    )
    return Machine(
        name=name,
        uuid=str(uuid.uuid4()),
        host=parent.host,
        spec=_spec(parent.spec, name, {chain.disk: chain.active for chain in chains}),
        created=time.time(),
        consent=parent.consent,
        origin=origin,
        vmgenid=vmgenid.new() if parent.vmgenid else None,
    )


def _spec(spec: MachineSpec, name: str, below: dict[str, Layer]) -> MachineSpec:
    disks = tuple(
        replace(disk, size=None, image=None, own=False, base=below[disk.name].path, format=below[disk.name].format)
        for disk in spec.disks
    )
    return replace(spec, name=name, disks=disks, nics=tuple(_nic(nic, name) for nic in spec.nics))


def _nic(nic: NicSpec, name: str) -> NicSpec:
    """A card as a fork has it: no MAC and no port of the host that its parent has already."""
    if nic.kind == "tap":
        raise StateError(
            f"network card 'tap' with interface {nic.ifname} is the parent's alone; fork {name} cannot have it",
            hint="use 'bridge' or 'user' in the spec of machines that are to be forked",
        )
    return replace(nic, mac=None, forwards=())


def plan(
    at: PlanInputs, new: Machine, chains: tuple[Chain, ...], request: ForkRequest, *, variables: bool, bake: bool
) -> ForkPlan:
    """What will be done; one serial number for each disk is used, from that of the inputs on."""
    folder = at.home.machine_dir(new.name)
    overlays: list[Overlay] = []
    active: dict[str, LayerId] = {}
    for number, chain in enumerate(chains, start=at.serial):
        identity = layer_id(chain.disk, number)
        layer = Layer(
            id=identity,
            path=str(folder / f"{identity}.qcow2"),
            format="qcow2",
            backing=chain.active.id,
            virtual_size=chain.active.virtual_size,
        )
        overlays.append(Overlay(disk=chain.disk, layer=layer, backing=chain.active))
        active[chain.disk] = identity
    assert new.origin
    return ForkPlan(
        machine=new.name,
        images=(),
        overlays=tuple(overlays),
        variables=str(at.home.variables(new.name)) if variables else None,
        parent=new.origin.machine,
        snapshot=new.origin.snapshot,
        paused=request.paused,
        fresh=request.identity == "fresh",
        bake=bake,
        change=Change(define=new, layers=tuple(one.layer for one in overlays), active=active),
    )
