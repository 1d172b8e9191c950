"""Who reads which layer, counted over all machines, and what a change does to that."""

import pytest

from qmpsnap.errors import NotFoundError
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.planning.layer_graph import Reference, Writer
from tests.model.world import World


def shared() -> tuple[World, LayerId, LayerId]:
    """web with one snapshot, and a clone of it on the frozen layer."""
    world = World()
    world.define("web", ("vda", world.image("vda", size=1)))
    world.create("web", "s1")
    base, active = world.ids("web")
    world.clone("shop", ("root", base))
    return world, base, active


def test_a_chain_is_read_from_the_backing_up() -> None:
    world, base, active = shared()
    chain = world.forest.chain("vda", active)
    assert (chain.disk, chain.ids) == ("vda", (base, active))
    assert world.forest.chain("root", world.active("shop", "root")).ids == (base, "root-3")


def test_an_unknown_layer_is_not_found() -> None:
    world, _, active = shared()
    with pytest.raises(NotFoundError, match="there is no layer vda-99"):
        world.forest.layer(LayerId("vda-99"))
    with pytest.raises(NotFoundError, match="there is no layer vda-1"):
        world.forest.apply("web", Change(removed_layers=(LayerId("vda-1"),))).chain("vda", active)


def test_readers_are_named_one_by_one() -> None:
    world, base, active = shared()
    forest = world.forest
    assert forest.readers(base) == ("snapshot s1 of machine web", f"layer {active} (of web)", "layer root-3 (of shop)")
    assert forest.readers(active) == ("disk vda of machine web",)
    assert forest.readers(base, but_layer=active, but_snapshots_of="web") == ("layer root-3 (of shop)",)
    assert forest.readers(base, but_snapshots_of="shop")[0] == "snapshot s1 of machine web"


def test_machines_are_counted_through_layers_and_points() -> None:
    world, base, active = shared()
    assert world.forest.machines_above(base) == {"web", "shop"}
    assert world.forest.machines_above(active) == {"web"}
    world.undefine("shop")
    assert world.forest.machines_above(base) == {"web"}


def test_a_layer_above_that_no_machine_uses_is_still_a_reader() -> None:
    world, base, active = shared()
    stray = world.image("vda", size=1, backing=base)
    forest = world.forest.apply("web", Change(layers=(stray,)))
    assert f"layer {stray.id}" in forest.readers(base, but_layer=active)
    assert forest.machines_above(stray.id) == frozenset()


def test_a_change_touches_its_own_machine_only() -> None:
    world, base, active = shared()
    (snapshot,) = world.guests["web"].snapshots
    forest = world.forest.apply("shop", Change(active={"vda": base}, snapshots=(snapshot,)))
    assert Writer("web", "vda", active) in forest.writers
    assert forest.writers_of(base) == (Writer("shop", "vda", base),)
    assert set(forest.references) == {Reference(name, "s1", "vda", base) for name in ("web", "shop")}
    gone = forest.apply("shop", Change(removed_snapshots=("s1",)))
    assert gone.references_to(base) == (Reference("web", "s1", "vda", base),)


def test_a_renamed_snapshot_is_read_under_its_new_name() -> None:
    world, base, _ = shared()
    forest = world.forest.apply("web", Change(renamed={"s1": "first"}))
    assert forest.references_to(base) == (Reference("web", "first", "vda", base),)
    assert world.situation("web").after(Change(renamed={"s1": "first"})).snapshots[0].name == "first"
