"""Attention losses that other papers propose, and their relatives: the arms that the I2AM paper's are compared with.

Built from the papers' descriptions. Where a paper leaves a constant open, or its sum depends on the garment's size, the
docstring says what is done here. When a term acts (timesteps below 500, the last stage of a training) is the schedule's
matter and not the term's.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.config.options import NotNegative, Positive, Share
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.losses.attention import (
    SCORE_FLOOR,
    Attention,
    attention_centers,
    mean_inside,
    needed,
    score_entropy,
    squared_distances,
)
from i2am_train.losses.paper import Norm, variation
from i2am_train.ops.grids import resize_maps, scaled
from i2am_train.types import GridSize

# -- towards a known correspondence --------------------------------------------------------------------------------


def supervised(attention: Attention, *, sigma: Positive = 1.0) -> Float[Tensor, " batch"]:
    """Cross-entropy (nats) from a Gaussian at the true reference position to the scores. Not in the paper.

    Mean over the patches in the mask that have a target. For comparison: no bound on what other terms reach. The
    minimum is the entropy of the discrete Gaussian (2.84 nats for sigma 1 away from the border).

    Args:
        sigma: of the Gaussian, in reference patches; 1 was chosen by us.

    Raises:
        ConfigError: the data has no targets.

    >>> scores = torch.tensor([[[[[0.25, 0.5, 0.25]], [[0.2, 0.2, 0.6]]]]])
    >>> target = torch.tensor([[[[0.0, 1.0], [float("nan"), float("nan")]]]])
    >>> inside, counted = torch.ones(1, 1, 2).bool(), torch.ones(1).bool()
    >>> supervised(Attention(scores, attention_centers(scores), inside, counted, target), sigma=0.1)  # log 2
    tensor([0.6931])
    """
    if attention.target is None:
        raise ConfigError(
            "The attention term 'supervised' got no correspondence. Use data with a 'correspondence' folder, or set "
            "its weight to 0."
        )
    valid = attention.mask & attention.target.isfinite().all(dim=-1)
    target = torch.where(valid[..., None], attention.target, 0.0)

    def surprise(scores: Tensor, target: Tensor) -> Tensor:
        squared = squared_distances(target, scores, origin=0)
        goal = torch.softmax(-squared.flatten(-2) / (2 * sigma**2), dim=-1)
        logarithms = scores.flatten(-2).clamp(min=SCORE_FLOOR).log()
        return -(goal * logarithms).sum(dim=-1)

    return mean_inside(attention.by_patch(surprise, target), valid)


def matches(attention: Attention, *, per_head: bool = True, sigma: NotNegative = 0.5) -> Float[Tensor, " batch"]:
    """Cross-entropy (nats) from where a patch's matches lie to its attention (SIFT-VTON, arXiv:2605.01296).

    Mean over the patches in the mask that have a match, and over heads, of ``-sum_j T_j log(A_j + 1e-8)``. ``T`` is the
    patch's histogram of matches, blurred by a Gaussian of 3x3 cells; what would lie beyond the border is left out, and
    the rest sums to 1. At least the mean entropy of ``T``, at most 18.4. The paper counts patches beside the mask, too.

    Args:
        per_head: False: of the head mean, as ``supervised`` has it, which lets heads look at different places.
        sigma: of the blur, in reference patches; the paper's are .5, .71 and 1 for grids of 16x12, 32x24 and 64x48.
            0: no blur.

    >>> scores = torch.tensor([[[[[0.25, 0.5, 0.25]]]]])
    >>> on = Attention(scores, attention_centers(scores), torch.ones(1, 1, 1).bool(), torch.ones(1).bool())
    >>> on = on._replace(log_heads=scores[:, None].log(), matches=torch.tensor([[[[[0.0, 1.0, 0.0]]]]]))
    >>> matches(on, sigma=0.0)  # log 2
    tensor([0.6931])
    """

    def surprise(found: Tensor, scores: Tensor) -> Tensor:
        goal = _blurred(_blurred(found, sigma, axis=-2), sigma, axis=-1)
        goal = goal / goal.sum(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(goal.dtype).tiny)
        if per_head:
            goal, scores = goal[:, None], scores.exp()
        each = -(goal * (scores + SCORE_FLOOR).log()).sum(dim=(-2, -1))
        if per_head:
            each = each.mean(dim=1)
        return torch.stack((each, found.sum(dim=(-2, -1))), dim=-1)

    each, share = attention.by_patch(surprise, of=("matches", "log_heads" if per_head else "scores")).unbind(dim=-1)
    return mean_inside(each, attention.mask & (share > 0))


def _blurred(values: Tensor, sigma: float, axis: int) -> Tensor:
    """With a Gaussian of three cells along an axis; nothing comes in from beyond the border. No convolution, which
    autocast would compute in half precision."""
    beside = math.exp(-1 / (2 * sigma**2)) if sigma else 0.0
    length = values.shape[axis]
    before, after = values.narrow(axis, 0, length - 1), values.narrow(axis, 1, length - 1)
    blurred = values.clone()
    blurred.narrow(axis, 1, length - 1).add_(before, alpha=beside)
    blurred.narrow(axis, 0, length - 1).add_(after, alpha=beside)
    return blurred


# -- towards a garment that fits the picture -----------------------------------------------------------------------


def leffa(attention: Attention, *, tau: Positive = 2.0) -> Float[Tensor, " batch"]:
    """The garment, warped by the attention, shows what the person wears (Leffa, arXiv:2412.08486, section 3).

    Each head's scores are softened to ``softmax(logits / tau)`` and averaged over heads. Their centres, brought to the
    size of the person's picture (bilinear), say where each pixel looks; the garment is sampled there (bilinear). The
    value is the mean squared difference to the person's picture over worn pixels and channels, in [0, 4].

    It has a gradient only where the garment's picture has one near the place looked at: on plain cloth it is blind, and
    on a fine pattern it sees the next repetition and no further. The worn pixels at the mask's border look where the
    patches beside it look, too, so that these get a gradient.

    Departures: the paper takes the norm and not the mean of squares, and puts the centre of the first patch on the
    first pixel (``align_corners``); here patches and pixels keep their places. Its other choices are the schedule's and
    the configuration's: layers of more than 1/32 of the picture's height, timesteps below 500 of 1000, weight 1e-3,
    last stage only.

    Args:
        tau: temperature of the softening, in this term only; 2 is the paper's.

    Raises:
        CaptureError: no pictures.

    >>> from i2am_train.losses.attention import Pictures
    >>> looks_right = torch.tensor([[[[[0.0, 1.0]], [[0.0, 1.0]]]]])  # both patches look at the garment's right one
    >>> inside, counted = torch.ones(1, 1, 2).bool(), torch.ones(1).bool()
    >>> picture = torch.tensor([[[0.0, 1.0]]]).expand(1, 3, 1, 2)  # one pixel a patch
    >>> on = Attention(looks_right, attention_centers(looks_right), inside, counted)
    >>> leffa(on._replace(log_heads=looks_right[:, None].log(), pictures=Pictures(picture, inside, picture)))
    tensor([0.5000])
    """
    if (pictures := attention.pictures) is None:
        raise CaptureError(
            "The attention term 'leffa' needs pictures, which this Attention does not have: a cache of encoded data "
            "holds none. Train from the pictures (data.cache=null), or leave the term out."
        )
    grid = attention.reference_grid

    def softened_centers(heads: Tensor) -> Tensor:
        softened = (heads.flatten(-2) / tau).softmax(dim=-1).mean(dim=1)
        return attention_centers(torch.unflatten(softened, -1, grid))

    centers = attention.by_patch(softened_centers, of=("log_heads",)).movedim(3, 1)
    height, width = pictures.worn.shape[1:]
    flow = resize_maps(centers, GridSize(height, width))
    pixels = [length / cells for length, cells in zip(pictures.garment.shape[2:], grid, strict=True)]
    places = (scaled((flow + 0.5).movedim(1, -1), *pixels) - 0.5).movedim(-1, 1)
    difference = _sampled(pictures.garment.to(places), places) - pictures.person.to(places)
    return mean_inside(difference.square().mean(dim=1), pictures.worn)


def _sampled(
    picture: Float[Tensor, "batch 3 rows columns"], places: Float[Tensor, "batch 2 height width"]
) -> Float[Tensor, "batch 3 height width"]:
    """Bilinear samples of a picture at ``yx`` in pixels, 0 at the centre of the first; with a gradient for the places.

    Not ``grid_sample``, whose backward has no deterministic form on a GPU.
    """
    rows, columns = picture.shape[2:]
    flat = picture.flatten(2)
    y, x = places[:, 0].clamp(0, rows - 1), places[:, 1].clamp(0, columns - 1)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = (y - top)[:, None], (x - left)[:, None]

    def picked(row: Tensor, column: Tensor) -> Tensor:
        index = row.long().clamp(max=rows - 1) * columns + column.long().clamp(max=columns - 1)
        return flat.gather(2, index.flatten(1)[:, None].expand(-1, 3, -1)).view(len(flat), 3, *index.shape[1:])

    upper = picked(top, left) * (1 - right) + picked(top, left + 1) * right
    lower = picked(top + 1, left) * (1 - right) + picked(top + 1, left + 1) * right
    return upper * (1 - down) + lower * down


# -- without a correspondence --------------------------------------------------------------------------------------


def entropy(attention: Attention, *, floor: Share = 0.0) -> Float[Tensor, " batch"]:
    """Mean entropy of the patches' attention as a share of the largest possible one, in [0, 1]: sharpness without a
    centre, a cheaper relative of CWG. CORAL (arXiv:2602.17636, of which only the abstract could be read) has one.

    It does not choose between places: attention that gathers at the wrong one is as good.

    Args:
        floor: in [0, 1]; a patch with less counts as this and feels nothing.

    >>> scores = torch.tensor([[[[[0.25, 0.25, 0.25, 0.25]], [[0.5, 0.5, 0.0, 0.0]]]]])
    >>> on = Attention(scores, attention_centers(scores), torch.ones(1, 1, 2).bool(), torch.ones(1).bool())
    >>> entropy(on), entropy(on, floor=0.6)
    (tensor([0.7500]), tensor([0.8000]))
    """
    return mean_inside(attention.by_patch(score_entropy).clamp(min=floor), attention.mask)


def mass(attention: Attention) -> Float[Tensor, " batch"]:
    """The garment's patches look at the reference, and others elsewhere: IMACS_g as a loss, for softmaxes that run over
    other tokens, too (a class token, or both pictures). Ours.

    ``m`` being the share of a patch's attention that goes to the reference: mean of ``-log m`` over the mask, plus mean
    of ``m`` over the patches outside it. At least 0; 0 where all inside and nothing outside goes to the reference. It
    says nothing about where on the reference.

    >>> share = torch.tensor([[[0.5, 0.25]]])  # the first patch is inside
    >>> inside, counted = torch.tensor([[[True, False]]]), torch.ones(1).bool()
    >>> on = Attention(torch.ones(1, 1, 2, 1, 1), torch.zeros(1, 1, 2, 2), inside, counted)
    >>> mass(on._replace(log_mass=share.log()))  # log 2 + .25
    tensor([0.9431])
    """
    logarithm = needed(attention, "log_mass", "mass")
    outside = ~attention.mask & attention.mask.flatten(1).any(dim=1)[:, None, None]
    return mean_inside(-logarithm, attention.mask) + mean_inside(logarithm.exp(), outside)


def atv(attention: Attention, *, norm: Norm = "valid") -> Float[Tensor, " batch"]:
    """Attention total variation: ``tv`` with power 1, of each head's own centres, then the mean over heads
    (StableVITON, arXiv:2312.01725, section 3.3). At least 0, and 0 for a constant centre of each head.

    In reference patches, over neighbours in the mask. The paper's coordinates run from -1 to 1 and its sum is plain
    (``norm=sum``). It is at least ``tv`` with power 1: heads whose jumps cancel in the mean count.

    >>> heads = torch.tensor([[[[[[1.0, 0.0]], [[0.0, 1.0]]]], [[[[0.0, 1.0]], [[1.0, 0.0]]]]]])  # they swap sides
    >>> scores = heads.mean(dim=1)
    >>> on = Attention(scores, attention_centers(scores), torch.ones(1, 1, 2).bool(), torch.ones(1).bool())
    >>> atv(on._replace(log_heads=heads.log()))
    tensor([1.])
    """

    def centers_of_heads(heads: Tensor) -> Tensor:
        return attention_centers(heads.exp()).movedim(1, -2)

    centers = attention.by_patch(centers_of_heads, of=("log_heads",)).movedim(-2, 1)
    heads = centers.shape[1]
    each = variation(centers.flatten(0, 1), attention.mask.repeat_interleave(heads, dim=0), 1, norm)
    return each.view(-1, heads).mean(dim=1)
