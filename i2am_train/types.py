"""Words of the project as types: grids, and every vocabulary that options and functions share.

Everything here is plain Python, so that any module may import it at no cost.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple, get_args


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

    ``paper`` adds the scores as they are, so a 16x12 layer weighs sixteen times a 64x48 one. ``density`` multiplies by
    the number of tokens first, so that every layer weighs the same.
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
    """Forward hooks on the query and key projections: any attention kernel, but nothing that the model does to its
    tokens after the projection."""
    SDPA = "sdpa"
    """What reaches `torch.nn.functional.scaled_dot_product_attention`: true queries and keys, also normalised or
    rotated ones, but blind to any other kernel."""


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


class LossVariant(StrEnum):
    """A reading of equations 15-22. The last five are mean-normalised where the paper sums."""

    PAPER = "paper"
    """Equations 15-22 to the letter. For documentation: centres divided by h'w' ruin TV and CWG."""
    PAPER_WITHOUT_FACTOR = "paper_without_factor"
    """The same with true centres, the only meaningful reading of equation 15."""
    AUTHORS_V1 = "authors_v1"
    """VITON-v1. Its scores are a softmax over class token and patches, that column dropped; training here gives all
    variants a softmax over the patches, which is the same without a class token. Its CWG divides by the mask's cells of
    the whole batch."""
    AUTHORS_V2 = "authors_v2"
    """viton-step-1/v2."""
    HINGE = "hinge"
    """The paper's hinge over valid pairs (``default`` in the golden files). Can collapse."""
    REWARD = "reward"
    """The authors' reward for gaps, divided by the number of valid pairs."""
    MARGIN = "margin"
    """Hinge that asks for a gap of ``margin`` reference patches per generated step."""
    MIXED = "mixed"
    """Reward on ordered pairs plus hinge on misordered ones."""


Need = Literal["target", "matches", "log_heads", "log_mass", "slope", "pictures"]
"""What an attention term may ask for beside scores, centres and masks: a field of ``losses.attention.Attention``, which
says what each is. ``target`` and ``matches`` are the true correspondence; arms with a term that is given one of them
are marked and not ranked. ``pictures`` are not in a cache of encoded data."""
TermSchedule = Literal["constant", "early", "late", "ramp"]
"""How a term's weight goes over the run; ``losses.objective.Term`` has the formulas."""

Category = Literal["upper_body", "lower_body", "dresses"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""What a garment covers; the names are DressCode's folders."""
LayoutName = Literal["auto", "viton_hd", "dresscode"]
"""How a dataset folder is laid out; auto: dresscode where it has folders of categories."""
Fill = Literal["white", "mean", "blur"]
"""What stands in the place of a deleted patch of the reference: white, the mean colour of the garment, or the blurred
picture."""
FaithfulnessControl = Literal["random", "middle", "truth", "gradient", "gradient_attention"]
"""A ranking of reference patches that a map's is compared with: by chance; the nearest to the garment's middle first;
those that the true correspondence shows most, where it is known; those that the denoiser is most sensitive to
(`evaluation.remaking.token_sensitivity`), and its sensitivity times the map."""
PerceptualNetwork = Literal["stlpips", "lpips"]
"""A learned distance of pictures; the weights of the first come with a package."""
Fit = Literal["stretch", "pad", "crop"]
"""How a picture of another aspect comes to the size that is asked for."""
PoseSource = Literal["auto", "keypoints", "densepose", "none"]
"""Where bodies come from; auto: keypoints where there are any, else DensePose."""

Trainable = Literal["all", "v1", "v2", "cross_attention", "lora"]
"""Which weights of the U-Net train; ``training.optimization`` says what each holds."""
OptimizerName = Literal["adamw", "adamw8bit"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
"""Arithmetic of the denoiser, in Lightning's words."""
SamplingPrecision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
"""Likewise where images are made; auto: bf16-mixed on a GPU that has bfloat16, else 32-true."""
WeightType = Literal["float32", "float16", "bfloat16"]
"""Numbers that weights are stored as; the names are torch's."""
Device = Literal["auto", "cpu", "cuda"]
Normalisation = Literal["imagenet", "clip", "authors"]
"""Scale of a reference encoder's input."""
SamplerName = Literal["ddim", "dpmpp", "unipc"]
"""ddim is the paper's; dpmpp is DPM-Solver++ (2M)."""
PublishedModel = Literal["dci_vton", "stableviton", "custom", "refined_custom"]
"""A row of the paper's Table 2."""
FigureFormat = Literal["png", "svg", "pdf"]
FigureName = Literal[
    "layers",
    "time_heads",
    "flow",
    "specific_layers",
    "reverse_layers",
    "refinement",
    "guidance",
    "specific_reference",
    "scores",
    "daam",
    "two_axis",
    "unpaired",
]
"""Figures of explained samples; ``reporting.figures.paper`` draws them."""
