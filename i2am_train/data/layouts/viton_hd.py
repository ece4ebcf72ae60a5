"""The VITON-HD folder layout: the real dataset, the embedded one and own photographs alike.

Two distributions are about: ``zalando-hd-resized``, and the folders of HR-VITON and StableVITON. They differ in
spelling (``cloth_mask`` for ``cloth-mask``, ``agnostic`` for ``agnostic-v3.2``, ...) and in what they hold;
:data:`VitonHDLayout.places` lists the spellings that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from i2am_train.data.layouts.layout import DERIVED_ROLES, Layout, Place
from i2am_train.errors import DataError
from i2am_train.types import Category, Pairing, Role, Split


def require_correspondence(root: Path) -> None:
    """Raise DataError unless training samples have their true correspondence, which only synthetic data has."""
    folder = root / Split.TRAIN / Role.CORRESPONDENCE
    if not folder.is_dir():
        raise DataError(
            f"A term (objective.supervised, or one with truth: true) is given the true correspondence, and {root} has "
            f"none (no folder {folder}). Use the embedded dataset, or set objective.supervised=0."
        )


def _spelled(folders: Sequence[str], patterns: Sequence[str]) -> tuple[Place, ...]:
    """All combinations, the usual folder and pattern first."""
    return tuple(Place(folder, pattern) for folder in folders for pattern in patterns)


class VitonHDLayout(Layout):
    """``<root>/{train,test}/<role>/<name>``, and ``<root>/{train,test}_pairs.txt``."""

    small_mask_rule = True
    places = {
        Role.PERSON: _spelled(["image"], ["{}.jpg", "{}.png", "{}.jpeg"]),
        Role.GARMENT: _spelled(["cloth"], ["{}.jpg", "{}.png", "{}.jpeg"]),
        Role.GARMENT_MASK: _spelled(["cloth-mask", "cloth_mask"], ["{}.jpg", "{}.png"]),
        Role.AGNOSTIC: _spelled(["agnostic-v3.2", "agnostic-v3.3", "agnostic"], ["{}.jpg", "{}.png"]),
        Role.INPAINT_MASK: _spelled(["agnostic-mask", "agnostic_mask"], ["{}_mask.png", "{}.png", "{}.jpg"]),
        Role.POSE_PICTURE: _spelled(["image-densepose", "image_densepose", Role.DRAWN_POSE], ["{}.jpg", "{}.png"]),
        Role.DRAWN_POSE: _spelled([Role.DRAWN_POSE], ["{}.jpg"]),
        Role.WARPED_MASK: _spelled(["gt_cloth_warped_mask", "gt-cloth-warped-mask"], ["{}.jpg", "{}.png"]),
        Role.CORRESPONDENCE: _spelled(["correspondence"], ["{}.png"]),
        Role.PARSING: _spelled(["image-parse-v3", "image-parse"], ["{}.png"]),
        Role.KEYPOINTS: _spelled(["openpose_json", "openpose-json"], ["{}_keypoints.json"]),
    }

    @property
    def folder(self) -> Path:
        """The split's folder."""
        return self.root / self.split

    @property
    def label(self) -> str:
        """The split."""
        return str(self.split)

    @property
    def category(self) -> Category | None:
        """VITON-HD has upper garments; own photographs may have others."""
        return None

    def list_file(self, pairing: Pairing) -> Path:
        """Both pairings share a list."""
        return self.root / f"{self.split}_pairs.txt"

    def own_garment(self, person: str) -> str:
        """The garment of the same name."""
        return person

    def advice(self, role: Role) -> str:
        """Where the files of a role come from."""
        if role in DERIVED_ROLES:
            return (
                f"Some downloads of VITON-HD lack it; 'i2am data derive root={self.root}' makes it from human-parsing "
                "maps and keypoints or DensePose."
            )
        if role == Role.POSE_PICTURE:
            return (
                "DensePose pictures come with VITON-HD's zalando-hd-resized, or from detectron2; 'i2am data derive' "
                "draws a stand-in from keypoints."
            )
        return "It comes with VITON-HD (zalando-hd-resized); for own photographs see data/README.md."
