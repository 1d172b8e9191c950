"""What reading verbs have of a store as rows is what the models of the same store say."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import to_builtins
from msgspec.structs import replace

from qmpsnap.cli.listing.documents import document_of, shown
from qmpsnap.errors import NotFoundError
from qmpsnap.model.layers.stamp import Stamp
from qmpsnap.model.layers.vmstate import Hardware, Inside, Vmstate
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.places import Places
from qmpsnap.ops.base.reading import read_by
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.sqlite.listing import Listing
from tests.store.samples import PROCESS, defined, layer, settled, snapshot

HARDWARE = Hardware(
    uuid="u", qemu_version="7.2.22", machine_type="pc", accel="tcg", cpu="max", cpus=1, memory=1 << 20, devices=("a",)
)


@pytest.fixture
def at(tmp_path: Path) -> Places:
    tmp_path.chmod(0o700)
    home = str(tmp_path)
    return Places(home, f"{home}/run", f"{home}/cache", ())


@pytest.fixture
def store(at: Places) -> Iterator[SqliteStore]:
    """``web`` with three snapshots, of all kinds, and a layer that nobody reads; ``other`` on a layer of its."""
    folder = Path(at.machines)
    with SqliteStore(Path(at.store), machines=folder) as found:
        base = replace(layer("vda-1"), path=f"{folder}/web/vda-1.qcow2", device=1 << 63, birth=5)
        middle, top, left = (
            replace(layer(f"vda-{number}", base), path=f"{folder}/web/vda-{number}.qcow2") for number in (2, 3, 9)
        )
        top = replace(top, backing=middle.id)
        defined(found, "web", base, middle, top, left, active=top)
        state = Vmstate(
            path=f"{folder}/web/vda-2.state", bytes=7, digest="d", device=1, inode=2, mode="background",
            layout="stream", compression="none", hardware=HARDWARE, steps_ms={"stop": 1.5}, frozen=True,
        )  # fmt: skip
        taken = [
            replace(
                snapshot("a", base), pause_ms=3.0, max_pause_ms=2.0, description="d", unquiesced="why", tags={"k": "v"}
            ),
            replace(snapshot("b", middle, parent="a"), kind="full", vmstate=state, variables=f"{folder}/web/vars.fd"),
            replace(
                snapshot("c", middle, parent="b"), kind="internal",
                inside=Inside(layer=middle.id, bytes=9, hardware=HARDWARE), state="consumed",
            ),
        ]  # fmt: skip
        settled(found, Change(snapshots=tuple(taken), current="b"))
        found.set_process("web", PROCESS)
        for name, since in (("vda-1", 0), ("vda-1", 4), ("vda-2", 0)):
            stamp = Stamp(mtime_ns=1, size=2, ctime_ns=3, digest="x", since=since)
            found.frozen.record({LayerId(name): stamp})
        defined(found, "other", replace(layer("vda-7"), path="/elsewhere/vda-7.qcow2"))
        yield found


def test_machines_are_as_their_models(store: SqliteStore, at: Places) -> None:
    with Listing(at) as listing:
        rows = listing.machines()
        assert [listing.machine(row.name) for row in rows] == rows
        assert (listing.is_complete, listing.copied_from) == (True, None)
    for row, model in zip(rows, store.machines(), strict=True):
        shared = ("name", "uuid", "host", "current")
        assert [getattr(row, field) for field in shared] == [getattr(model, field) for field in shared]
        assert row.adopted == bool(model.adopted)
        assert row.snapshots == len(store.snapshots(model.name))
        assert bool(row.process) == bool(model.process)
        if row.process and model.process:
            fields = ("pid", "start_ticks", "boot_id")
            assert [getattr(row.process, name) for name in fields] == [getattr(model.process, name) for name in fields]


def test_snapshots_are_as_their_models(store: SqliteStore, at: Places) -> None:
    with Listing(at) as listing:
        rows = listing.snapshots("web")
    assert len(rows) == 3
    for row, model in zip(rows, store.snapshots("web"), strict=True):
        document = document_of(
            model,
            current="b",
            paths={point.layer: store.layer(point.layer).path for point in model.points},
            vmstate=to_builtins(model.vmstate),
            inside=to_builtins(model.inside),
            state=model.state,
        )
        assert json.dumps(shown(row, current="b", state=row.state)) == json.dumps(document)
        assert row.operation == model.operation


@pytest.mark.parametrize("machine", ["web", "other"])
def test_the_images_that_a_machine_reads_are_those_of_the_models(store: SqliteStore, machine: str) -> None:
    reads = store.images.read_by(machine)
    chains, snapshots = store.chains(machine), store.snapshots(machine)
    images = {found.id: found for found in read_by(chains, snapshots, store.forest())}
    assert reads.images.keys() == images.keys()
    for name, image in reads.images.items():
        fields = ("id", "path", "format", "backing", "device", "inode", "birth")
        assert [getattr(image, field) for field in fields] == [getattr(images[name], field) for field in fields]
    assert reads.active == {chain.active.id for chain in chains} == store.images.active()[machine].active
    assert reads.stamps == store.frozen.stamps(images)
    assert store.images.count() == len(store.forest().layers)


def test_layers_that_read_one_another_are_read_once(store: SqliteStore) -> None:
    with store._database.writing() as sql:
        sql.execute("UPDATE layer SET backing = 'vda-3' WHERE id = 'vda-1'")
    reads = store.images.read_by("web")
    assert reads.images.keys() == {"vda-1", "vda-2", "vda-3"}
    assert reads.below([LayerId("vda-2")]) == {"vda-1", "vda-2", "vda-3"}


def test_a_machine_that_is_not_there_is_told_by_the_store(store: SqliteStore, at: Places) -> None:
    assert store.images.read_by("nobody").images == {}
    with Listing(at) as listing, pytest.raises(NotFoundError, match="no machine 'nobody'") as refused:
        listing.machine("nobody")
    assert refused.value.hint == "known machines: other, web"


def test_a_record_of_a_machine_that_the_store_lacks_is_noticed(store: SqliteStore, at: Places) -> None:
    with store._database.writing() as sql:
        sql.execute("DELETE FROM machine WHERE name = 'other'")
    with Listing(at) as listing:
        assert not listing.is_complete
