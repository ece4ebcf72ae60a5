"""i2am_train/EXTENDING.md is true: its files, written into an empty folder, do there what it says they do."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import i2am_train
from i2am_train.cli import main

TEXT = (Path(i2am_train.__file__).parent / "EXTENDING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))

DATA = "data.root={data} data.height=64 data.width=48 data.workers=0"
SMALL = {
    "train": (
        f"{DATA} init={{model}} data.batch_size=8 optimization.steps=1 validation=none "
        "trainer.progress_bar=false trainer.accelerator=cpu tracking=files"
    ),
}
"""Options that make each command quick."""


def blocks(section: str, language: str) -> list[str]:
    return [
        line
        for block in re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.DOTALL)
        for line in block.replace("\\\n", "").splitlines()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder with the files of all how-tos."""
    root = tmp_path_factory.mktemp("stranger")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    before = [*sys.path]
    yield root
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations
@pytest.mark.parametrize("section", SECTIONS)
def test_how_to(
    section: str,
    folder: Path,
    small_dataset: Path,
    small_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every command of the section succeeds, and together they print, or log, the lines that it shows."""
    monkeypatch.chdir(folder)
    places = {"data": small_dataset, "model": small_checkpoint}
    for command in blocks(section, "bash"):
        run(shlex.split(command), places, monkeypatch)
    logged = [file.read_text() for file in folder.glob("runs/*/metrics.csv")]
    printed = capsys.readouterr().out + "".join(logged)
    for line in blocks(section, "text"):
        assert re.search(re.escape(line).replace(r"\.\.\.", ".*"), printed), (line, printed)


def run(words: list[str], places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of a shell, as a process of its own would run it, at the size of the tests."""
    for name in ("I2AM_ALLOW_IMPORTS", "I2AM_DEBUG", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    _, name, *options = words
    given = {option.partition("=")[0] for option in options}
    more = [w for w in SMALL[name].format(**places).split() if w.partition("=")[0] not in given]
    with pytest.raises(SystemExit, match="0"):
        main([name, *options, *more])
    GlobalHydra.instance().clear()


def test_every_door_has_a_how_to_of_twenty_lines() -> None:
    """No how-to is longer than its reader's patience."""
    for name in FILES:
        assert len(FILES[name].strip().splitlines()) <= 20, name
