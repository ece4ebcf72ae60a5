"""Where the shipped files and the embedded dataset lie, in a checkout and in an installed wheel."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from i2am_train.config.hub import HUB, pull
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.types import GridSize

PACKAGE = Path(__file__).resolve().parent.parent

SHIPPED_CHECKPOINT = "tiny"
"""Name by which ``init`` and ``checkpoint`` mean the weights that come with the package."""


def absolute(path: Path) -> Path:
    """The path from the root on, with the user's home folder for ``~``.

    Raises:
        ConfigError: ``~name``, and there is no such user.
    """
    return expanded(path).absolute()


def expanded(path: str | Path) -> Path:
    """The path with the user's home folder for ``~``.

    Raises:
        ConfigError: ``~name``, and there is no such user.
    """
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"The path {path} is not possible: there is no user {path.parts[0][1:]}. A folder of that name is ./{path}."
        ) from error


def conf_folder() -> Path:
    """The folder of the Hydra files: inside the package in a wheel, beside it in a checkout."""
    return _shipped("conf", "conf")


def weights_folder() -> Path:
    """The folder of the shipped weights; one checkpoint folder per name in it."""
    return _shipped("weights", "data/weights")


def experiment_names(options: Collection[str]) -> list[str]:
    """Names of the files in ``conf/experiment`` that set only the given top-level options."""
    names = []
    for path in sorted((conf_folder() / "experiment").glob("*.yaml")):
        # The top-level keys, without the cost of a YAML reader: --help lists these names.
        keys = re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE)
        if set(keys) <= {"defaults", *options}:
            names.append(path.stem)
    return names


def dataset_folder(size: GridSize, train: int, test: int, seed: int) -> Path:
    """Where the embedded dataset of these settings is made and looked for.

    In a checkout ``data/synthetic-...``; for an installed package the user's cache folder.
    """
    return _made_data(f"synthetic-{size}-train{train}-test{test}-seed{seed}")


def shapes_folder(images: int) -> Path:
    """Where the made set of shapes in COCO's layout lies, or will lie."""
    return _made_data(f"shapes-coco-{images}")


def _made_data(name: str) -> Path:
    return (checkout() / "data" if checkout_exists() else _user_cache()) / name


def checkpoint_folder(name: str) -> Path:
    """The folder that ``init`` or ``checkpoint`` means: a shipped name, a path, or ``hub:USER/NAME[@REVISION]``.

    Raises:
        CheckpointError: there is no such folder, or no such model on the hub.
    """
    shipped = weights_folder() / name
    if name == SHIPPED_CHECKPOINT:
        return shipped
    if name.startswith(HUB):
        return pull(name)
    folder = absolute(Path(name))
    if not folder.is_dir():
        found = (
            f"{folder} is a file, and a checkpoint is a folder"
            if folder.exists()
            else f"There is no checkpoint folder {folder}"
        )
        raise CheckpointError(
            f"{found}. Give the folder of a saved model or of "
            f"a run, '{SHIPPED_CHECKPOINT}' for the shipped weights, or {HUB}USER/NAME."
        )
    return folder


def checkout() -> Path:
    """The folder that the package lies in: the root of the repository, in a checkout."""
    return PACKAGE.parent


def checkout_exists() -> bool:
    """True if the package runs from a checkout (also if installed editable), not from a wheel."""
    return not (PACKAGE / "conf").is_dir()


def _shipped(inside_package: str, inside_checkout: str) -> Path:
    if checkout_exists():
        return checkout() / inside_checkout
    return PACKAGE / inside_package


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "i2am_train"
