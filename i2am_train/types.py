"""Words of the project as types: grids, directions, branches, layer numbers.

Everything here is plain Python, so that any module may import it at no cost.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple


class GridSize(NamedTuple):
    """Size of a token grid or an image, height first.

    >>> GridSize(16, 12).tokens
    192
    """

    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of cells, in row-major order."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Direction(StrEnum):
    """The axis that an attribution map lies on (paper section 4.2, eq. 6)."""

    REFERENCE_TO_GENERATED = "reference_to_generated"
    """Which generated positions the reference feeds; a map on the generated grid."""
    GENERATED_TO_REFERENCE = "generated_to_reference"
    """Which reference positions were used; a map on the reference grid."""


class Branch(StrEnum):
    """The half of classifier-free guidance that a row of the batch belongs to."""

    CONDITIONAL = "conditional"
    UNCONDITIONAL = "unconditional"


class LayerWeighting(StrEnum):
    """How layers of different grids are summed: the paper leaves it open.

    ``paper`` adds the scores as they are, so a 16x12 layer weighs sixteen times a 64x48 one.
    ``density`` multiplies by the number of tokens first, so that every layer weighs the same.
    """

    PAPER = "paper"
    DENSITY = "density"


class Canvas(StrEnum):
    """How a picture was fitted to the canvas that a grid of tokens covers."""

    STRETCH = "stretch"
    """The grid covers the whole picture, whatever its proportions."""
    CENTRE_CROP = "centre_crop"
    """The grid covers the largest part in the middle that has the canvas's proportions."""
    LETTERBOX = "letterbox"
    """The whole picture lies in the middle of the grid, with empty borders."""


class Backend(StrEnum):
    """How the queries and keys of an attention module are observed."""

    PROJECTIONS = "projections"
    """Forward hooks on the query and key projections: any attention kernel, but nothing that the
    model does to its tokens after the projection."""
    SDPA = "sdpa"
    """What reaches `torch.nn.functional.scaled_dot_product_attention`: true queries and keys, also
    normalised or rotated ones, but blind to any other kernel."""


class PredictionType(StrEnum):
    """What the denoiser predicts; the values are diffusers' own."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"


class Split(StrEnum):
    """The two halves of a try-on dataset."""

    TRAIN = "train"
    TEST = "test"


class Pairing(StrEnum):
    """Whether a person gets the garment that they wear (paired) or another one (unpaired)."""

    PAIRED = "paired"
    UNPAIRED = "unpaired"


class Role(StrEnum):
    """What a file is to a sample, named after the folder that VITON-HD keeps it in."""

    PERSON = "image"
    GARMENT = "cloth"
    AGNOSTIC = "agnostic-v3.2"
    """The person with the clothes greyed out."""
    INPAINT_MASK = "agnostic-mask"
    """White is the region to paint."""
    POSE_PICTURE = "image-densepose"
    GARMENT_MASK = "cloth-mask"
    WARPED_MASK = "gt_cloth_warped_mask"
    """White is the garment on the person."""
    CORRESPONDENCE = "correspondence"
    PARSING = "image-parse-v3"
    KEYPOINTS = "openpose_json"
    DRAWN_POSE = "pose-drawn"
    """Pose pictures that ``i2am data derive`` drew, in a folder of their own: DensePose never mixes in."""


Category = Literal["upper_body", "lower_body", "dresses"]
CATEGORIES: tuple[Category, ...] = ("upper_body", "lower_body", "dresses")
"""What a garment covers; the names are DressCode's folders."""
