"""A wheel, unpacked elsewhere, works from any folder with its configuration and weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import i2am_train

ROOT = Path(i2am_train.__file__).parents[1]
SHIPPED = ("i2am_train", "conf", "data/weights", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that nothing appears in it."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        place = ROOT / name
        copy = shutil.copytree if place.is_dir() else shutil.copy
        copy(place, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else of this project."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(installed: Path, folder: Path, *words: str) -> str:
    """Standard output of Python with the unpacked wheel before everything else."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_the_wheel_carries_everything(wheel: Path) -> None:
    """Every Python file, template, file of conf/ and shipped weight is inside; no test is."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "i2am_train").rglob("*.py")}
    expected |= {f"i2am_train/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    templates = (ROOT / "i2am_train" / "reporting" / "templates").iterdir()
    expected |= {str(path.relative_to(ROOT)) for path in templates}
    weights = ROOT / "data" / "weights"
    expected |= {f"i2am_train/weights/{path.relative_to(weights)}" for path in weights.rglob("*") if path.is_file()}
    assert expected <= names
    assert {"i2am_train/py.typed", "i2am_train/conf/experiment/refined.yaml"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"i2am_train", f"i2am_train-{i2am_train.__version__}.dist-info"}


@pytest.mark.long
def test_it_runs_from_any_folder(installed: Path, tmp_path: Path) -> None:
    """Help, composition and the shipped folders come from the wheel, not from this checkout."""
    assert "commands:" in python(installed, tmp_path, "-m", "i2am_train", "--help")
    words = ("-m", "i2am_train", "train", "experiment=refined", "--cfg", "job")
    assert "name: refined" in python(installed, tmp_path, *words)
    program = (
        "from i2am_train.config.locations import conf_folder, weights_folder\n"
        "print(conf_folder(), weights_folder(), conf_folder().is_dir(), weights_folder().is_dir())"
    )
    inside = installed / "i2am_train"
    expected = f"{inside / 'conf'} {inside / 'weights'} True True\n"
    assert python(installed, tmp_path, "-c", program) == expected
    assert list(tmp_path.iterdir()) == []


def test_one_version() -> None:
    """pyproject.toml and the package agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == i2am_train.__version__
    assert project["scripts"] == {"i2am": "i2am_train.cli:main"}
