"""Where everything lies, by the environment and the user."""

from pathlib import Path

import pytest

from qmpsnap.model.home import Home

USER = {"HOME": "/home/u"}


def places(environment: dict[str, str], *, uid: int = 1000) -> tuple[str, str, str]:
    home = Home.from_environment(environment, uid=uid)
    return str(home.data), str(home.run), str(home.cache)


@pytest.mark.parametrize("uid", [0, 1000])
def test_one_folder_holds_everything_when_it_is_named(uid: int) -> None:
    environment = USER | {"QMPSNAP_HOME": "/q", "XDG_DATA_HOME": "/x", "XDG_RUNTIME_DIR": "/r", "XDG_CACHE_HOME": "/c"}
    assert places(environment, uid=uid) == ("/q", "/q/run", "/q/cache")


def test_a_relative_home_is_the_one_below_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert places(USER | {"QMPSNAP_HOME": "q"})[0] == f"{tmp_path}/q"


def test_a_user_has_the_xdg_folders() -> None:
    environment = USER | {"XDG_DATA_HOME": "/x", "XDG_RUNTIME_DIR": "/r", "XDG_CACHE_HOME": "/c"}
    assert places(environment) == ("/x/qmpsnap", "/r/qmpsnap", "/c/qmpsnap")


@pytest.mark.parametrize(
    "environment",
    [
        USER,
        USER | {"XDG_DATA_HOME": "", "XDG_RUNTIME_DIR": "", "XDG_CACHE_HOME": "", "QMPSNAP_HOME": ""},
        USER | {"XDG_DATA_HOME": "x", "XDG_RUNTIME_DIR": "./r", "XDG_CACHE_HOME": "c/d"},
    ],
    ids=["unset", "empty", "relative"],
)
def test_without_usable_xdg_folders_a_user_has_the_usual_ones(environment: dict[str, str]) -> None:
    data = "/home/u/.local/share/qmpsnap"
    assert places(environment) == (data, f"{data}/run", "/home/u/.cache/qmpsnap")


def test_root_has_the_systems_folders() -> None:
    assert places({"HOME": "/home/u", "XDG_DATA_HOME": "/x"}, uid=0) == (
        "/var/lib/qmpsnap",
        "/run/qmpsnap",
        "/home/u/.cache/qmpsnap",
    )


def test_image_folders_are_a_list_of_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home.from_environment({"QMPSNAP_IMAGES": "/a::b:"}, uid=0)
    assert home.images == (Path("/a"), tmp_path / "b")
    assert Home.from_environment({}, uid=0).images == ()


def test_each_thing_has_its_place() -> None:
    home = Home(data=Path("/d"), run=Path("/r"), cache=Path("/c"))
    assert [str(place) for place in (home.store, home.machines, home.guest)] == [
        "/d/qmpsnap.db",
        "/d/machines",
        "/c/guest",
    ]
    assert (str(home.machine_dir("web")), str(home.run_dir("web"))) == ("/d/machines/web", "/r/web")
