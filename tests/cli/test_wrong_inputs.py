"""No traceback: wrong words, homes, descriptors, limits and encodings through every verb of the command line.

Every verb has a line in ``LINES``; a new one without a line fails. From each line are made: every word replaced by
every hostile one, words left out and added, homes that are none (all in this process), streams and limits (in forks).
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.cli.main import main
from qmpsnap.model.home import Home
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.cli import seeded
from tests.cli.test_help import LEAVES, families

COPY = "/nonexistent/copy.qcow2"
LINES = {
    "adopt": "adopt new --take /nonexistent/spec.yaml --allow-extra",
    "blockcommit": "blockcommit web vda --base fresh",
    "blockcopy": f"blockcopy web vda {COPY} --finish",
    "blockresize": "blockresize web vda 2G",
    "blockpull": "blockpull web vda --base fresh",
    "chain": "chain web vda",
    "check": "check web --deep",
    "commit": "commit web vda --base fresh --top after-upgrade --bandwidth 50M",
    "console": "console web",
    "copy": f"copy web vda {COPY} --finish",
    "define": "define /nonexistent/spec.yaml --allow /nonexistent",
    "demo": "demo --nonsense",  # a real one builds a guest
    "disk attach": "disk attach web /nonexistent/data.img --name vdb --format raw --bus scsi --allow /nonexistent",
    "disk detach": "disk detach web vdx",
    "doctor": "doctor --nonsense",  # a real one asks the whole host
    "edit": "edit web --yes --allow-extra",
    "exec": "exec --timeout 5 --wait 1 -i --env A=b --cwd /tmp web -- true",
    "flatten": "flatten web vda --progress plain",
    "fork": "fork web@fresh new -n 2 --ephemeral --identity keep -m text",
    "fstrim": "fstrim web --minimum 0 --timeout 5",
    "import argv": "import argv --define --dry-run --allow /nonexistent -- qemu-system-x86_64 -hda /nonexistent/x.img",
    "import bundle": "import bundle /nonexistent/web.bundle --name new --allow-extra",
    "import libvirt": "import libvirt /nonexistent/dom.xml --define --name new --snapshot /nonexistent/s.xml",
    "import proxmox": "import proxmox /nonexistent/100.conf --storage local=/nonexistent --define",
    "job cancel": "job cancel nobody",
    "job list": "job list web",
    "job set-speed": "job set-speed nobody 50M",
    "job wait": "job wait nobody --progress plain",
    "list": "list",
    "log": "log web",
    "machine export": "machine export web --to /nonexistent/web.bundle",
    "mirror": f"mirror web vda {COPY} --pivot",
    "nic attach": "nic attach nobody --kind user --model e1000 --mac 52:54:00:00:00:01 --forward 2222:22",
    "nic detach": "nic detach web 7 --timeout 1",
    "pause": "pause web",
    "pull": "pull web vda --base fresh",
    "recover": "recover nobody",
    "relocate": "relocate --nonsense",
    "rename": "rename web new",
    "resize": "resize web vda 2G",
    "restore": "restore web /nonexistent/state",
    "resume": "resume web",
    "save": "save web /nonexistent/state --name bed -m text",
    "set": "set web memory=4G vda.cache=none",
    "show": "show web",
    "snapshot create": "snapshot create web fresh -m text --tag k=v --disks vda --max-pause 5 --kind full"
    " --by blockdev-snapshot --lvm-size 20%",
    "snapshot delete": "snapshot delete web nothing --flatten",
    "snapshot describe": "snapshot describe web nothing text --tag k=v --untag w",
    "snapshot list": "snapshot list web --tag k=v",
    "snapshot pop": "snapshot pop web",
    "snapshot push": "snapshot push web fresh -m text",
    "snapshot rename": "snapshot rename web nothing other",
    "snapshot revert": "snapshot revert web nothing",
    "snapshot show": "snapshot show web fresh",
    "start": "start web --paused --allow-extra",
    "stop": "stop web --timeout 1",
    "stream": "stream web vda --base fresh",
    "template list": "template list",
    "template prune": "template prune --all",
    "tree": "tree web --tag k",
    "undefine": "undefine web",
    "wakeup": "wakeup web",
}
TELLS = frozenset({"check", "doctor"})
"""Whose answer is what is wrong."""

EACH = 3
"""Troubles that every line gets of those that there are, in turn: it costs a process each."""

HOSTILE = (
    *("", " ", "-", "--", "-x", "--nonsense", "../x", "/", ".", "UPPER", "nothing", "vda-3", "a b", "a\tb", "web\n"),
    *("\0", "we\0b", "\udcff", "\ud800", "é✓", "\x1b[31m", "\u202e", "%s%n", "{0}", "$HOME", "'; --", "x" * 300),
    *(
        "x" * 70_000,
        "/dev/null/x",
        "/proc/self/mem",
        "nbd://",
        "nbd://[::1",
        "vda=",
        "=x",
        ",",
        "nan",
        "-1",
        "1e999",
        "0x",
    ),
)
CODES = frozenset({family.exit_code for family in families()} | {141})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    found = Home.from_environment({"QMPSNAP_HOME": str(tmp_path_factory.mktemp("home"))}, uid=os.geteuid())
    seeded.fill(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QMPSNAP_HOME", str(found.data))
        patch.setenv("QMPSNAP_QEMU", "/nonexistent/qemu")
        patch.setenv("EDITOR", "true")
        patch.delenv("VISUAL", raising=False)
        patch.setenv("QMPSNAP_QEMU_IMG", "/nonexistent/qemu-img")
        patch.chdir(tmp_path_factory.mktemp("work"))
        yield found


def record(home: Home) -> Any:
    with SqliteStore(home.store, machines=home.machines) as store:
        return [(m, store.chains(m.name), store.snapshots(m.name)) for m in store.machines()]


def wrong(words: list[str]) -> Iterator[list[str]]:
    """The lines that are made of one: every word behind the verb replaced, left out, or followed by one too many."""
    for place in range(1, len(words)):
        for hostile in HOSTILE:
            yield [*words[:place], hostile, *words[place + 1 :]]
        yield [*words[:place], *words[place + 1 :]]
    for also in (["--nonsense"], ["-o", "xml"], ["-o"], ["\udcff"], ["surplus", "surplus", "surplus"]):
        yield [*words, *also]


def test_every_verb_has_a_line() -> None:
    assert sorted(LINES) == sorted(LEAVES)


@pytest.mark.parametrize("verb", LINES)
def test_wrong_words(verb: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    before = record(home)
    for words in wrong(shlex.split(LINES[verb])):
        try:
            code = main(words)
        except SystemExit as end:  # --help
            code = int(end.code or 0)
        told = capsys.readouterr()
        assert code in CODES | {0}, (words, code)
        assert code == 0 or told.err or (verb in TELLS and told.out), words  # what is refused says why
        assert "\x1b" not in told.err + told.out, words
    assert record(home) == before


def homes(folder: Path) -> Iterator[Path]:
    """Homes that are none."""
    (file := folder / "file").write_text("not a folder")
    yield file
    yield folder / ("x" * 300)
    yield Path("/proc/nowhere")
    for name, content in {"garbage": b"garbage " * 4096, "empty": b"", "cut": b"SQLite format 3\0"}.items():
        (made := folder / name).mkdir()
        (made / "qmpsnap.db").write_bytes(content)
        yield made
    (made := folder / "directory").mkdir()
    (made / "qmpsnap.db").mkdir()
    yield made
    (made := folder / "loop").symlink_to(made)
    yield made
    (made := folder / "b\udcffd").mkdir()
    yield made


def test_wrong_homes(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for place in homes(tmp_path):
        monkeypatch.setenv("QMPSNAP_HOME", str(place))
        for verb, line in LINES.items():
            code = main(shlex.split(line))
            told = capsys.readouterr()
            assert code in CODES | {0}, (place, line, code)
            assert verb in ("list", "template list", "template prune") or code, (place, line)
            assert not code or told.err or (verb in TELLS and told.out)


def cases() -> Iterator[dict[str, Any]]:
    streams: list[dict[str, str]] = [{str(number): "closed"} for number in (0, 1, 2)]
    streams += [{"0": "closed", "1": "closed", "2": "closed"}, {"1": "/dev/full"}, {"2": "/dev/full"}]
    streams += [{"1": "/dev/full", "2": "/dev/full"}, {"1": "pipe"}, {"2": "pipe"}, {"1": "pipe", "2": "pipe"}]
    limits = ({"NOFILE": 5}, {"NOFILE": 9}, {"NOFILE": 14}, {"FSIZE": 0}, {"FSIZE": 4096}, {"AS": 1 << 28})
    troubles: list[dict[str, Any]] = [*({"streams": each} for each in streams), *({"limits": each} for each in limits)]
    if os.geteuid() == 0:
        troubles.append({"limits": {"NPROC": 0}, "user": 65534})  # root is not limited
    others: tuple[list[str], ...] = (["--help"], ["--version"], [], ["snapshot"], ["nonsense"])
    turn = itertools.cycle(troubles)
    for words in (*map(shlex.split, LINES.values()), *others):
        yield from ({"words": words, **trouble} for trouble in itertools.islice(turn, EACH))


def test_descriptors_and_limits(home: Home) -> None:
    home.data.chmod(0o755)
    before = record(home)
    asked = list(cases())
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.forked"],
        input="\n".join(map(json.dumps, asked)),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    answers = json.loads(done.stdout[done.stdout.rindex("[[") :])
    assert len(answers) == len(asked)
    wrong = [
        (case, code, told)
        for case, (code, told) in zip(asked, answers, strict=True)
        # What Python itself ends with is 1 or 120; where there is no stderr, that is all there is to see.
        if code not in CODES - {1} | {0} or "Traceback" in told or "Exception ignored" in told
    ]
    assert not wrong, "\n".join(f"{case}: {code}\n{told}" for case, code, told in wrong[:10])
    assert record(home) == before
