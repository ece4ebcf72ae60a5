"""i2am_train/EXTENDING.md is true: its files, written into an empty folder, do there what it says they do."""

import contextlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import i2am_train
from i2am_train.cli import main
from i2am_train.detection.bench import make_shapes
from tests.support.own_metrics import forget_own_metrics

TEXT = (Path(i2am_train.__file__).parent / "EXTENDING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))

DATA = "data.root={data} data.height=64 data.width=48 data.workers=0"
SMALL = {
    "train": (
        f"{DATA} init={{model}} data.batch_size=8 optimization.steps=1 validation=none "
        "trainer.progress_bar=false trainer.accelerator=cpu tracking=files"
    ),
    "evaluate": (
        f"{DATA} sampling.steps=1 attribution.time_groups=1 evaluation.samples=2 device=cpu "
        "progress_bar=false tracking=files"
    ),
    "report": "",
    "data": "",
    "explain": "sampling.steps=1 attribution.time_groups=1 device=cpu",
    "detect": (
        "pipeline={pipeline} height=32 width=48 steps=1 pictures=0 device=cpu progress_bar=false tracking=files"
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
def folder(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder with the files of all how-tos, and the dataset that one of them supposes."""
    root = tmp_path_factory.mktemp("stranger")
    for split in ("train", "test"):
        names = {"image": "people", "cloth": "shirts"}
        for part in (small_dataset / split).iterdir():
            place = root / "shop" / names.get(part.name, part.name)
            shutil.copytree(part, place, dirs_exist_ok=True)
        (root / "shop" / "lists").mkdir(exist_ok=True)
        shutil.copy(small_dataset / f"{split}_pairs.txt", root / f"shop/lists/{split}.txt")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    garment = next((small_dataset / "train" / "cloth").iterdir())
    Image.open(garment).save(root / "shirt.png")
    make_shapes(root / "data" / "coco", 2)
    before = [*sys.path]
    yield root
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def printed(folder: Path, small_dataset: Path, small_checkpoint: Path, paint_by_example: Path) -> Iterator[str]:
    """What all commands of all how-tos print and log in that folder; all trainings are one run."""
    lines = [shlex.split(line) for section in SECTIONS for line in blocks(section, "bash")]
    training = [words for words in lines if words[:2] == ["i2am", "train"]]
    others = [words for words in lines if words not in training]
    together = {word.partition("=")[0]: word for words in training for word in words[2:]}
    places = {"data": small_dataset, "model": small_checkpoint, "pipeline": paint_by_example}
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        for words in [["i2am", "train", *together.values()], *others]:
            with patch.context() as of_this_command:
                run(words, places, of_this_command)
    yield shown.getvalue() + "".join(file.read_text() for file in folder.glob("runs/*/metrics.csv"))
    GlobalHydra.instance().clear()


@pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations
@pytest.mark.parametrize("section", SECTIONS)
def test_how_to(section: str, printed: str) -> None:
    """Every command succeeds, and prints, or logs, the lines that its section shows."""
    for line in blocks(section, "text"):
        pattern = re.escape(line).replace(r"\.\.\.", ".*")
        assert re.search(pattern, printed), f"{line}\n{printed}"


def test_a_report_knows_the_metric_of_a_finished_run(printed: str, folder: Path) -> None:
    """It imports nothing: label and direction stand in the results."""
    page = (folder / "runs" / "report" / "report.html").read_text()
    assert re.search("PSNR.{0,40}↑", page)


def run(words: list[str], places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of a shell, as a process of its own would run it, at the size of the tests."""
    for name in ("I2AM_ALLOW_IMPORTS", "I2AM_DEBUG", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    _, name, *options = words
    options = [w.replace("checkpoint=tiny", f"checkpoint={places['model']}") for w in options]
    given = {option.partition("=")[0] for option in options}
    more = [w for w in SMALL[name].format(**places).split() if w.partition("=")[0] not in given]
    monkeypatch.setattr(sys, "argv", ["i2am"])
    with pytest.raises(SystemExit, match="0"):
        main([name, *options, *more])
    forget_own_metrics()


def test_every_door_has_a_how_to_of_twenty_lines() -> None:
    """No how-to is longer than its reader's patience."""
    for name in FILES:
        assert len(FILES[name].strip().splitlines()) <= 20, name
