"""Opening a dataset without knowing its layout: what the options of ``data`` mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from i2am_train.config.data import DataConfig
from i2am_train.config.locations import dataset_folder
from i2am_train.data.layouts.dresscode import dresscode_layouts
from i2am_train.data.layouts.layout import Layout
from i2am_train.data.layouts.viton_hd import VitonHDLayout
from i2am_train.data.reading import TryOnDataset
from i2am_train.data.synthetic.dataset import make_dataset
from i2am_train.doors import calls, derives, resolve
from i2am_train.errors import DataError
from i2am_train.processes import first_process, wait_for
from i2am_train.runs import require_apart
from i2am_train.types import CATEGORIES, Category, Fit, GridSize, Pairing, Role, Split


@dataclass(frozen=True)
class Reading:
    """How a dataset folder is read."""

    layout: str = "auto"
    """A `types.LayoutName` (auto: dresscode where a category's folder exists, viton_hd otherwise), or the import path
    of a layout."""
    categories: tuple[Category, ...] = ()
    """Of DressCode, in this order; empty: all that exist."""
    fit: Fit = "stretch"
    """How pictures of another aspect come to the size that is asked for."""


AS_IT_LIES = Reading()
"""The layout found by looking, all categories, the proportions of the size that is asked for."""


def reading_of(data: DataConfig) -> Reading:
    """How the dataset folder is read."""
    return Reading(data.layout, tuple(data.categories), data.fit)


def data_root(data: DataConfig, *outputs: Path | None) -> Path:
    """The dataset's folder, which may not be there yet.

    Raises:
        RunFolderError: one of the folders that the command writes lies in it, or it in one of them.
    """
    synthetic = data.synthetic
    root = data.root or dataset_folder(data.size, synthetic.train, synthetic.test, synthetic.seed)
    require_apart(root, *outputs, data.cache_copies)
    return root


def prepare_data(data: DataConfig, *outputs: Path | None) -> Path:
    """The dataset's folder; the embedded dataset is made if it is not there yet.

    Raises:
        RunFolderError: as of :func:`data_root`.
    """
    synthetic, root = data.synthetic, data_root(data, *outputs)
    if data.root is not None:
        return root
    if not first_process():
        wait_for(root)
    elif not root.is_dir():
        make_dataset(root, synthetic.train, synthetic.test, data.size, synthetic.seed, progress=True)
    return root


def detect_layout(root: Path) -> Literal["viton_hd", "dresscode"]:
    """The layout of a folder, from its sub-folders.

    Raises:
        DataError: the folder is one category of DressCode.
    """
    if any((root / category).is_dir() for category in CATEGORIES):
        return "dresscode"
    if root.name in CATEGORIES and (root / "images").is_dir():
        raise DataError(
            f"{root} is one category of DressCode; expected the folder above it. "
            f"Set data.root={root.parent} data.categories=[{root.name}]."
        )
    return "viton_hd"


def split_layouts(root: Path, split: Split, reading: Reading) -> list[Layout]:
    """The layouts of a split: one, or one per category.

    Raises:
        DataError: categories were asked for that are not there.
        ConfigError: the layout cannot be imported, or is none.
    """
    name = detect_layout(root) if reading.layout == "auto" else reading.layout
    if name == "dresscode":
        there = tuple(category for category in CATEGORIES if (root / category).is_dir())
        return dresscode_layouts(root, split, reading.categories or there or CATEGORIES)
    if reading.categories:
        raise DataError(
            f"data.categories={list(reading.categories)} belongs to DressCode, and {root} is in another layout. "
            "Leave it out, or check data.root."
        )
    return [VitonHDLayout(root, split) if name == "viton_hd" else own_layout(name)(root, split)]


def own_layout(path: str) -> Callable[[Path, Split], Layout]:
    """The user's layout by its import path.

    Raises:
        ConfigError: it cannot be imported, or is no layout.
    """

    def lacking(found: Any) -> str | None:
        missing = [name for name in ("places", "small_mask_rule") if not hasattr(found, name)]
        roles = [] if missing else [role for role in Role if role not in found.places]
        named = [*missing, *(f"places[Role.{role.name}]" for role in roles)]
        return f"lacks {', '.join(named)}" if named else None

    layout: Callable[[Path, Split], Layout] = resolve(
        path,
        "data.layout",
        "a class derived from i2am_train.data.layouts.layout.Layout (or from one of those beside it), made by (root, "
        "split)",
        *(derives(Layout), lacking, calls("root", "split")),
    )
    return layout


def absent_halves(layouts: Sequence[Layout]) -> list[Layout]:
    """The halves that a dataset does not have: no pair list, and no folder of their own (never all of them)."""
    without = [one for one in layouts if not one.list_file(Pairing.PAIRED).is_file()]
    taken = {one.folder for one in layouts if one not in without}
    absent = [one for one in without if one.folder in taken or not one.folder.is_dir()]
    return absent if len(absent) < len(layouts) else []


def list_length(root: Path, split: Split, pairing: Pairing, reading: Reading) -> int:
    """How many pairs the lists of a split hold."""
    return sum(len(layout.listed(pairing)) for layout in split_layouts(root, split, reading))


def list_lengths(root: Path, reading: Reading) -> dict[str, int]:
    """How many people each list that exists holds, by split (and category)."""
    return {
        layout.label: len(layout.listed(Pairing.PAIRED))
        for split in Split
        for layout in split_layouts(root, split, reading)
        if layout.list_file(Pairing.PAIRED).is_file()
    }


def open_dataset(
    root: Path, split: Split, pairing: Pairing, size: GridSize, reading: Reading = AS_IT_LIES, *,
    augment: bool = False, seed: int = 0, indices: Sequence[int] | None = None, small_mask_rule: bool | None = None,
) -> TryOnDataset:  # fmt: skip
    """The samples of a split; options as :class:`TryOnDataset` has them.

    Raises:
        DataError: a folder, list or file is missing or broken.
    """
    return TryOnDataset(
        split_layouts(root, split, reading), pairing, size, augment=augment, seed=seed, indices=indices,
        small_mask_rule=small_mask_rule, fit=reading.fit,
    )  # fmt: skip
