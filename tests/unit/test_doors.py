"""Code from outside by its import path: what is imported, what is refused, and in which words."""

import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest

from i2am_train.config.store import compose
from i2am_train.doors import VARIABLE, allow_named, calls, derives, is_import_path, resolve
from i2am_train.errors import ConfigError
from i2am_train.trainers import imported_callbacks

MODULE = """
from abc import ABC, abstractmethod
class Base(ABC):
    @abstractmethod
    def read(self): ...
class Half(Base): ...
class Whole(Base):
    def read(self): return 1
def score(generated, real, *, scale=1.0): return scale
number = 3
a0 = a1 = a2 = a3 = a4 = a5 = 0
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package in the working directory that nobody has allowed."""
    folder = tmp_path / "of_a_stranger"
    folder.mkdir()
    (folder / "__init__.py").write_text("(__import__('pathlib').Path(__file__).parent / 'run').touch()\n")
    (folder / "parts.py").write_text(MODULE)
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "unread.py").write_text("x = 1\ndef\n")
    (folder / "lacking.py").write_text("import never_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "of_a_stranger"
    for name in [name for name in sys.modules if name.partition(".")[0] == "of_a_stranger"]:
        del sys.modules[name]


def test_a_file_causes_no_import(package: str) -> None:
    """Neither the module nor its package runs; the words say how to allow it."""
    allow_named(f"x={allowed}:name" for allowed in ("of_a", "of_a_stranger.other", "of_a_stranger.part"))
    with pytest.raises(
        ConfigError, match=rf"callbacks\[0\]=.*read from a file.*{VARIABLE}=of_a,of_a_stranger in front"
    ):
        resolve(f"{package}.parts:score", "callbacks[0]", "a function")
    assert not (Path(package) / "run").exists()
    assert package not in sys.modules


@pytest.mark.parametrize("how", ["variable", "word", "compose"])
def test_what_the_user_named_is_imported(package: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable a whole package, by a word its module; a word anywhere in a list or a mapping counts."""
    if how == "variable":
        monkeypatch.setenv(VARIABLE, f"other, {package}")
    elif how == "word":
        allow_named(["seed=1", f"x=[ssim,{{fn: {package}.parts:score, scale: 2}}]"])
    else:
        compose("explain", ["model=factory", "reference=x", f"factory={package}.parts:number"])
    assert resolve(f"{package}.parts:score", "x", "a function", calls("a", "b", scale=2))(1, 2) == 1.0
    assert resolve(f"{package}.parts:Whole.read", "x", "a method", calls("self"))
    assert (Path(package) / "run").is_file()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("parts.score", "x=parts.score is not possible: expected package.module:name, the import path of a thing."),
        (
            "of_a_stranger_:a",
            "No module named 'of_a_stranger_'. Run from the folder that holds of_a_stranger_ (this one",
        ),
        ("of_a_stranger.part:a", "No module named 'of_a_stranger.part'. The package of_a_stranger was found in "),
        ("of_a_stranger.part:a", "of_a_stranger; it has: parts; --debug"),
        ("of_a_stranger.parts.x:a", "The package of_a_stranger.parts was found in one file; it has: nothing;"),
        (
            "of_a_stranger.broken:a",
            "ZeroDivisionError: division by zero. The module of_a_stranger.broken was found, and",
        ),
        ("of_a_stranger.unread:a", "of_a_stranger/unread.py, line 2: correct it there"),
        ("of_a_stranger.lacking:a", "of_a_stranger.lacking was found, and needs never_installed: install it here"),
        ("of_a_stranger.parts:xyz", "(it has: ABC, Base, Half, Whole, a0, a1, a2, a3, and 5 more). Expected a thing."),
        ("of_a_stranger.parts:scor", "of_a_stranger.parts has no 'scor' (it has: score). Expected a thing."),
        ("of_a_stranger.parts:number", "cannot be called: it is of type int. Expected a thing."),
        (
            "of_a_stranger.parts:Base.read",
            "(generated, real): too many positional arguments; its arguments are (self).",
        ),
    ],
)
def test_what_cannot_be_taken_is_named(package: str, path: str, message: str) -> None:
    """What was found, what was expected."""
    allow_named([f"x={package}:name", "x=of_a_stranger_:name"])
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(path, "x", "a thing", calls("generated", "real"))


def test_classes_are_whole(package: str) -> None:
    """A class that leaves a method abstract is refused before it is made."""
    allow_named([f"x={package}:name"])
    base = resolve(f"{package}.parts:Base", "x", "a class")
    assert resolve(f"{package}.parts:Whole", "x", "a class", derives(base))().read() == 1
    with pytest.raises(ConfigError, match=r"parts:Half lacks read\. Expected a class\."):
        resolve(f"{package}.parts:Half", "x", "a class", derives(base))
    allow_named(["x=collections:name"])
    with pytest.raises(ConfigError, match="does not derive from Base"):
        resolve("collections:OrderedDict", "x", "a class", derives(base))
    assert resolve("collections:OrderedDict", "x", "a class", derives(dict)) is OrderedDict


@pytest.mark.parametrize("text", ["s3://a/b", "a:b:c", "runs/a:b", "a.b", "1:2", "C:\\x", "a:b/c", ":b", "a:"])
def test_other_texts_are_no_import_paths(text: str) -> None:
    """Addresses, paths and times stay what they are."""
    assert not is_import_path(text)


def test_lightning_s_own_callbacks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their methods take what Lightning gives, in whatever way they write it."""
    monkeypatch.setenv(VARIABLE, "lightning")
    names = ["LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "Timer", "DeviceStatsMonitor"]
    assert len(imported_callbacks([f"lightning.pytorch.callbacks:{name}" for name in names])) == len(names)
