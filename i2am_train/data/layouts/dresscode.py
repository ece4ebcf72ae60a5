"""The DressCode folder layout, as its authors distribute it: three categories, each with lists and folders of its own.

::

    <root>/{upper_body,lower_body,dresses}/
        train_pairs.txt, test_pairs_paired.txt, test_pairs_unpaired.txt    lines "000000_0.jpg <tab> 000000_1.jpg"
        images/000000_0.jpg, images/000000_1.jpg                           person, garment
        label_maps/000000_4.png      human parsing, 18 labels              skeletons/000000_5.jpg    not used here
        dense/000000_5.png           DensePose's part labels 0...24        keypoints/000000_2.json   18 joints

Agnostic pictures and masks are not distributed; ``i2am data derive`` writes them beside the others, in folders with
VITON-HD's names. The authors' rule on small inpainting masks is off: DressCode shows whole people, and many garments
are smaller than that rule allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from i2am_train.data.layouts.layout import DERIVED_ROLES, Layout, Pair, Place, entries
from i2am_train.errors import DataError
from i2am_train.types import CATEGORIES, Category, Pairing, Role, Split


class DressCodeLayout(Layout):
    """The files of one category and split; splits share folders, and differ in their lists alone."""

    small_mask_rule = False
    places = {
        Role.PERSON: (Place("images", "{}_0.jpg"),),
        Role.GARMENT: (Place("images", "{}_1.jpg"),),
        Role.GARMENT_MASK: (
            Place("cloth-mask", "{}_1.png"), Place("cloth_mask", "{}_1.png"), Place("masks", "{}_1.png"),
        ),
        Role.AGNOSTIC: (Place("agnostic-v3.2", "{}_0.jpg"), Place("agnostic", "{}_0.jpg")),
        Role.INPAINT_MASK: (Place("agnostic-mask", "{}_0_mask.png"), Place("agnostic-mask", "{}_0.png")),
        Role.POSE_PICTURE: (
            Place("dense", "{}_5.png"), Place("image-densepose", "{}_0.jpg"), Place(Role.DRAWN_POSE, "{}_0.jpg"),
        ),
        Role.DRAWN_POSE: (Place(Role.DRAWN_POSE, "{}_0.jpg"),),
        Role.WARPED_MASK: (
            Place("gt_cloth_warped_mask", "{}_0.png"), Place("gt_cloth_warped_mask", "{}_0.jpg"),
        ),
        Role.CORRESPONDENCE: (Place("correspondence", "{}_0.png"),),
        Role.PARSING: (Place("label_maps", "{}_4.png"),),
        Role.KEYPOINTS: (Place("keypoints", "{}_2.json"),),
    }  # fmt: skip

    def __init__(self, root: Path, split: Split, category: Category) -> None:
        super().__init__(root, split)
        self._category: Category = category

    @property
    def folder(self) -> Path:
        """The category's folder."""
        return self.root / self._category

    @property
    def label(self) -> str:
        """Category and split."""
        return f"{self._category} {self.split}"

    @property
    def category(self) -> Category:
        """The category."""
        return self._category

    def key(self, stem: str) -> str:
        """The number that all files of a person and their own garment share."""
        return stem.rpartition("_")[0]

    def own_garment(self, person: str) -> str:
        """``000000_1`` for ``000000_0``."""
        return f"{self.key(person)}_1"

    def list_file(self, pairing: Pairing) -> Path:
        """Training has one list, tests have one per pairing."""
        name = "train_pairs.txt" if self.split is Split.TRAIN else f"test_pairs_{pairing}.txt"
        return self.folder / name

    def listed(self, pairing: Pairing) -> list[Pair]:
        """The pair list.

        Raises:
            DataError: the list is missing or broken, or names are not DressCode's.
        """
        pairs = super().listed(pairing)
        for pair in pairs:
            if not (pair.person.endswith("_0") and pair.garment.endswith("_1")):
                raise DataError(
                    f"{self.list_file(pairing)} names '{pair.person}' and '{pair.garment}'; expected a person "
                    "NNNNNN_0.jpg and a garment NNNNNN_1.jpg. Use DressCode's own lists, or layout=viton_hd."
                )
        return pairs

    def advice(self, role: Role) -> str:
        """Where the files of a role come from."""
        if role in DERIVED_ROLES:
            return (
                f"DressCode does not distribute it; 'i2am data derive root={self.root}' makes it from label_maps and "
                "keypoints."
            )
        return "It comes with DressCode (https://github.com/aimagelab/dress-code, on request)."


def dresscode_layouts(root: Path, split: Split, categories: Sequence[Category]) -> list[Layout]:
    """One layout per category.

    Raises:
        DataError: a category has no folder.
    """
    missing = [name for name in categories if not (root / name).is_dir()]
    if missing:
        there = [name for name in CATEGORIES if (root / name).is_dir()]
        advice = f"Set data.categories=[{','.join(there)}]" if there else "Check data.root"
        raise DataError(
            f"{root} has no folder {', '.join(missing)} (found: {entries(root)}); expected DressCode's folders "
            f"{', '.join(categories)}. {advice}, or data.layout=viton_hd for the other layout."
        )
    return [DressCodeLayout(root, split, category) for category in categories]
