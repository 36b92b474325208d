"""Replacements in a host: found wherever they are bound, refused as a whole, taken out exactly."""

import importlib
import importlib.metadata
import sys

import pytest

from fuserl.trainers.patching import Host

SOURCES = {
    "__init__.py": "from rented.ops import double\n",
    "ops.py": "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n",
    "trainer.py": """
from rented.ops import double as twice, half


class Trainer:
    def step(self, x):
        return twice(x) + half(x)

    @staticmethod
    def name():
        return "theirs"
""",
    "late.py": "from rented.ops import double\n",
}


@pytest.fixture
def rented(tmp_path, monkeypatch):
    """A host package of version 1.16.3, trainer imported and late not."""
    for name, text in SOURCES.items():
        (tmp_path / "rented").mkdir(exist_ok=True)
        (tmp_path / "rented" / name).write_text(text)
    (tmp_path / "rented-1.16.3.dist-info").mkdir()
    (tmp_path / "rented-1.16.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rented\nVersion: 1.16.3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module("rented.trainer")
    for name in [name for name in sys.modules if name.partition(".")[0] == "rented"]:
        del sys.modules[name]


def triple(x):
    return 3 * x


def ten(x):
    return 10


def host(replacements, since="1.16", below="1.17", package="rented", **more):
    return Host(package, since=since, below=below, replacements=replacements, **more)


def test_every_binding_is_replaced_and_restored(rented):
    double = sys.modules["rented.ops"].double
    ours = host({"rented.ops:double": triple})
    with ours.patch():
        assert rented.Trainer().step(2) == 7 and sys.modules["rented"].double is triple
        late = importlib.import_module("rented.late")
        assert late.double is triple
        assert ours.original("rented.ops:double") is double
        places = ["rented.double", "rented.late.double", "rented.ops.double", "rented.trainer.twice"]
        assert ours.report().replaced == {"rented.ops:double": places}
    assert rented.Trainer().step(2) == 5
    assert all(each is double for each in (late.double, rented.twice, sys.modules["rented"].double))
    assert ours.report().replaced == {}


def test_a_path_to_an_import_is_that_place_alone(rented):
    with host({"rented.trainer:half": ten}).patch():
        assert rented.half is ten and sys.modules["rented.ops"].half(2) == 1
    assert rented.half is sys.modules["rented.ops"].half


def test_attributes_of_a_class_come_back_as_they_were(rented):
    before = vars(rented.Trainer)["name"]
    ours = host({"rented.trainer:Trainer.name": staticmethod(lambda: "ours")})
    with ours.patch():
        assert rented.Trainer().name() == "ours"
        assert list(ours.report().replaced.values()) == [["rented.trainer.Trainer.name"]]
    assert vars(rented.Trainer)["name"] is before


def test_twice_is_once(rented):
    ours = host({"rented.ops:double": triple})
    ours.patch()
    with ours.patch():
        assert rented.twice is triple
    assert rented.twice is triple, "the inner context took out what it had not put in"
    ours.unpatch()
    ours.unpatch()
    assert rented.twice(1) == 2


def test_what_another_put_over_ours_is_left(rented):
    ours = host({"rented.trainer:half": triple})
    ours.patch()
    rented.half = ten
    ours.unpatch()
    assert rented.half is ten


def test_a_missing_name_changes_nothing(rented):
    with pytest.raises(RuntimeError, match=r"must have rented\.ops:treble; got 1\.16\.3"):
        host({"rented.ops:double": triple, "rented.ops:treble": ten}).patch()
    assert rented.twice(1) == 2


@pytest.mark.parametrize(("since", "below", "fits"), [
    ("1.16", "1.17", True), ("1.16.3", "1.16.4", True), ("1", "2", True),
    ("1.17", "1.18", False), ("1.2", "1.16", False), ("1.16.4", "2", False),
])  # fmt: skip
def test_versions(rented, since, below, fits):
    ours = host({"rented.ops:double": triple}, since, below)
    if fits:
        ours.patch()
        ours.unpatch()
    else:
        with pytest.raises(RuntimeError, match=rf"must be >= {since} and < {below}.*; got 1\.16\.3"):
            ours.patch()
        assert rented.twice(1) == 2


def test_a_missing_host_gives_the_line_for_pip():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'no-such-host>=1\.16,<1\.17'"):
        host({}, package="no-such-host")


def test_the_report_is_a_list(rented):
    ours = host({"rented.ops:half": ten}, left={"rented.ops:double": "it is fast enough"})
    assert str(ours.report()) == "rented 1.16.3: replaced\n  nothing\nleft\n  rented.ops:double: it is fast enough"
    with ours.patch():
        assert "  rented.ops:half  bound as rented.ops.half, rented.trainer.half\nleft" in str(ours.report())


def test_without_trl_the_import_gives_the_line_for_pip(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.delitem(sys.modules, "fuserl.trainers.trl", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trl>=1\.16,<1\.17'"):
        importlib.import_module("fuserl.trainers.trl")
