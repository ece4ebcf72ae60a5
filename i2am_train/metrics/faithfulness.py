"""Whether a map tells what the model uses: the reference is changed, and the images are made again from the same noise.

Three questions, none of which needs a truth (all need the generated image's mask):

- **use**: how much does the image change if a layer may no longer choose where it looks?
- **where**: does the image change where the attention to the changed part of the reference is?
- **deletion**: does the image change more if the patches go that the map ranks highest?

Here is what is computed from images and maps; :mod:`i2am_train.evaluation.faithfulness` makes the images. Images are
``float32`` in [0, 1], maps are on the grid of reference patches, row-major. Deletion and insertion are RISE's (Petsiuk
et al. 2018), with the change of a generated image in the place of a class's probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from i2am_train.errors import ConfigError
from i2am_train.ops.grids import mask_on_grid, reference_coordinates
from i2am_train.types import Fill, GridSize

SAMPLE = ("index", "name")
"""What else stands in a row of scores."""


def image_change(
    image: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
    mask: Bool[Tensor, "batch height width"],
) -> Float[Tensor, " batch"]:
    """Mean absolute difference of two images inside a mask, as a share of the range; NaN where the mask is empty.

    >>> image = torch.zeros(1, 3, 1, 2)
    >>> other = torch.tensor([[[[0.3, 1.0]]] * 3]).reshape(1, 3, 1, 2)
    >>> image_change(image, other, torch.tensor([[[True, False]]]))
    tensor([0.3000])
    """
    difference = (image - other).abs().mean(dim=1)
    return torch.where(mask, difference, 0.0).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1)


def patch_change(
    image: Float[Tensor, "batch 3 height width"], other: Float[Tensor, "batch 3 height width"], grid: GridSize
) -> Float[Tensor, "batch generated"]:
    """Mean absolute difference of two images in each patch, as a share of the range.

    >>> patch_change(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2) * torch.tensor([0.0, 1.0]), GridSize(1, 2))
    tensor([[0., 1.]])
    """
    difference = (image - other).abs().mean(dim=1, keepdim=True)
    return F.adaptive_avg_pool2d(difference, (grid.height, grid.width)).flatten(1)


def rank_correlation(
    first: Float[Tensor, "batch patch"], second: Float[Tensor, "batch patch"], mask: Bool[Tensor, "batch patch"]
) -> Float[Tensor, " batch"]:
    """Spearman's rank correlation over the masked patches, in [-1, 1]; equal values share their mean rank.

    NaN where one side has a single value, so that there is no order to agree with.

    >>> first = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    >>> second = torch.tensor([[10.0, 400.0, 20.0, 0.0]])
    >>> rank_correlation(first, second, torch.tensor([[True, True, True, False]]))
    tensor([0.5000])
    """
    x, y = (_centred_ranks(values, mask) for values in (first, second))
    return ((x * y).sum(dim=1) / (x.square().sum(dim=1) * y.square().sum(dim=1)).sqrt()).float()


def _centred_ranks(
    values: Float[Tensor, "batch patch"], mask: Bool[Tensor, "batch patch"]
) -> Float[Tensor, "batch patch"]:
    """Ranks among the masked values, minus their mean; 0 outside. Twice the rank is a whole number: sums are exact."""
    ordered = torch.where(mask, values, torch.inf).sort(dim=1).values
    below, up_to = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    above = mask.sum(dim=1, keepdim=True) - up_to
    return torch.where(mask, (below - above).to(torch.float64) / 2, 0.0)


def quarters(garment: Bool[Tensor, "batch reference"], grid: GridSize) -> Bool[Tensor, "batch 4 reference"]:
    """The garment's patches in four parts, cut at the middle of their extent: upper left,
    upper right, lower left, lower right.

    >>> quarters(torch.ones(1, 4, dtype=torch.bool), GridSize(2, 2))[0].int().tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    """
    places = reference_coordinates(grid, device=garment.device)
    far = torch.inf
    low = torch.where(garment[..., None], places, far).amin(dim=1)
    high = torch.where(garment[..., None], places, -far).amax(dim=1)
    lower, right = (places > ((low + high) / 2)[:, None]).unbind(dim=-1)
    parts = torch.stack([~lower & ~right, ~lower & right, lower & ~right, lower & right], dim=1)
    return parts & garment[:, None]


def attention_to_parts(
    scores: Float[Tensor, "batch generated reference"], parts: Bool[Tensor, "batch part reference"]
) -> Float[Tensor, "batch part generated"]:
    """How much of each generated patch's attention goes to each part of the reference, in [0, 1].

    >>> scores = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])
    >>> attention_to_parts(scores, torch.tensor([[[True, False]]]))
    tensor([[[0.9000, 0.2000]]])
    """
    return torch.einsum("bgr,bpr->bpg", scores, parts.to(scores))


def where_correlation(
    attention: Float[Tensor, "batch part generated"],
    changes: Float[Tensor, "batch part generated"],
    mask: Bool[Tensor, "batch generated"],
) -> Float[Tensor, " batch"]:
    """Whether the image changes where the attention to a changed part of the reference is, in [-1, 1].

    Spearman's correlation, over the masked generated patches, of the attention that goes to a part with the change of
    the patch when the part is changed; mean over the parts that have a value, NaN where none has.

    Args:
        attention: to each part (:func:`attention_to_parts`).
        changes: of each generated patch, by part (:func:`patch_change`).

    >>> attention = torch.tensor([[[0.9, 0.5, 0.2]]])
    >>> changes = torch.tensor([[[0.3, 0.2, 0.1]]])  # the part gone, the image changes most where it is looked at most
    >>> where_correlation(attention, changes, torch.ones(1, 3, dtype=torch.bool))
    tensor([1.])
    """
    values = [rank_correlation(*part, mask) for part in zip(attention.unbind(1), changes.unbind(1), strict=True)]
    return torch.stack(values, dim=1).nanmean(dim=1)


def ranked_patches(
    importance: Float[Tensor, "batch reference"], candidates: Bool[Tensor, "batch reference"], share: float
) -> Bool[Tensor, "batch reference"]:
    """The candidates with the highest importance: ``share`` of them, rounded, and at least one.

    Of equal ones the first comes first. A sample without candidates has none.

    Raises:
        ConfigError: the share does not lie above 0 and up to 1.

    >>> importance = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    >>> ranked_patches(importance, torch.tensor([[True, True, True, False]]), 0.34)
    tensor([[False,  True, False, False]])
    """
    if not 0 < share <= 1:
        raise ConfigError(f"The share of patches is {share}. Expected a number above 0 and up to 1, such as 0.25.")
    order = torch.where(candidates, -importance, torch.inf)
    ranks = order.argsort(dim=1, stable=True).argsort(dim=1)
    count = (candidates.sum(dim=1) * share).round().clamp(min=1)
    return (ranks < count[:, None]) & candidates


def central_importance(garment: Bool[Tensor, "batch reference"], grid: GridSize) -> Float[Tensor, "batch reference"]:
    """A ranking without a model: the nearer to the middle of the garment's patches, the higher.

    >>> central_importance(torch.ones(1, 3, dtype=torch.bool), GridSize(1, 3))
    tensor([[-1., -0., -1.]])
    """
    places = reference_coordinates(grid, device=garment.device)
    weight = garment.to(places) / garment.sum(dim=1, keepdim=True).clamp(min=1)
    middle = weight @ places
    distance: Tensor = torch.linalg.vector_norm(places - middle[:, None], dim=-1)
    return -distance


def random_importance(seeds: Sequence[int], count: int) -> Float[Tensor, "batch reference"]:
    """A ranking by chance, one stream for each sample: the same alone and in a batch.

    >>> random_importance([3, 4], 6)[1].equal(random_importance([4], 6)[0])
    True
    """
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def without_patches(
    picture: Float[Tensor, "batch 3 height width"],
    patches: Bool[Tensor, "batch reference"],
    grid: GridSize,
    *,
    fill: Fill = "mean",
    garment: Bool[Tensor, "batch height width"] | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """The reference picture with some of its patches replaced; no pixel of theirs is left.

    Args:
        picture: in [0, 1].
        patches: those that go.
        fill: ``mean`` is the mean colour of the ``garment`` (None: of the picture), ``blur`` a Gaussian blur whose
            standard deviation is the longer side of a patch.

    >>> picture = torch.tensor([0.2, 0.4]).expand(1, 3, 1, 2)
    >>> without_patches(picture, torch.tensor([[True, False]]), GridSize(1, 2), fill="white")[0, 0]
    tensor([[1.0000, 0.4000]])
    """
    size = picture.shape[-2:]
    on_grid = patches.reshape(-1, 1, grid.height, grid.width).to(picture)
    gone = F.interpolate(on_grid, size, mode="nearest-exact").bool()
    match fill:
        case "white":
            stand_in = torch.ones_like(picture)
        case "mean":
            counted = torch.ones_like(gone) if garment is None else garment[:, None]
            total = torch.where(counted, picture, 0.0).sum(dim=(-2, -1), keepdim=True)
            stand_in = (total / counted.sum(dim=(-2, -1), keepdim=True).clamp(min=1)).expand_as(picture)
        case "blur":
            sigma = max(size[0] / grid.height, size[1] / grid.width)
            stand_in = gaussian_blur(picture, 2 * int(2 * sigma) + 1, sigma)
    return torch.where(gone, stand_in, picture)


def curve_area(shares: Sequence[float], values: Float[Tensor, "batch share"]) -> Float[Tensor, " batch"]:
    """Area under a curve over shares of deleted patches, from nothing at 0, divided by the last share: a mean change.

    >>> curve_area([0.5, 1.0], torch.tensor([[0.2, 0.2]]))  # a triangle and a rectangle
    tensor([0.1500])
    """
    at = values.new_tensor([0.0, *shares])
    from_zero = F.pad(values, (1, 0))
    return torch.trapezoid(from_zero, at, dim=1) / shares[-1]


def garment_patches(mask: Bool[Tensor, "batch height width"], grid: GridSize) -> Bool[Tensor, "batch reference"]:
    """Reference patches that lie at least half on the garment: the candidates of a deletion.

    >>> garment_patches(torch.tensor([[[True, True, True, False, False, False]]]), GridSize(1, 3))
    tensor([[ True,  True, False]])
    """
    return mask_on_grid(mask, grid)
