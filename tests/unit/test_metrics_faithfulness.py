"""Scores of faithfulness against scipy, by hand, and on pictures where every pixel is known."""

import pytest
import torch
from scipy.stats import spearmanr

from i2am_train.errors import ConfigError
from i2am_train.metrics.faithfulness import (
    attention_to_parts,
    central_importance,
    curve_area,
    image_change,
    quarters,
    random_importance,
    rank_correlation,
    ranked_patches,
    where_correlation,
    without_patches,
)
from i2am_train.types import GridSize

GRID = GridSize(3, 3)


def test_rank_correlation_is_scipys() -> None:
    """Equal values share their mean rank; what is outside the mask does not count."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(0, 6, (5, 40), generator=draw).float()
    second = first * 0.3 + torch.randint(0, 6, (5, 40), generator=draw)
    mask = torch.rand(5, 40, generator=draw) > 0.3
    expected = [spearmanr(a[m], b[m]).statistic for a, b, m in zip(first, second, mask, strict=True)]
    torch.testing.assert_close(rank_correlation(first, second, mask), torch.tensor(expected).float())


def test_no_order_has_no_correlation() -> None:
    """A constant side agrees with nothing; the mean over the parts leaves it out."""
    every = torch.ones(1, 4, dtype=torch.bool)
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert rank_correlation(torch.ones(1, 4), values, every).isnan().all()
    scores = torch.tensor([[[0.1, 0.0], [0.2, 0.0], [0.3, 0.0], [0.4, 0.0]]])
    parts = torch.eye(2, dtype=torch.bool)[None]
    changes = values[:, None].expand(1, 2, 4)
    torch.testing.assert_close(where_correlation(attention_to_parts(scores, parts), changes, every), torch.ones(1))


def test_no_mask_has_no_change() -> None:
    """An empty mask gives no value, and never 0."""
    image = torch.zeros(2, 3, 2, 2)
    mask = torch.tensor([[[True, False], [False, False]], [[False, False], [False, False]]])
    change = image_change(image, image + 0.25, mask)
    assert change[0] == 0.25
    assert change[1].isnan()


def test_quarters_are_those_of_the_garment() -> None:
    """They cut the garment's own extent, cover it and do not overlap."""
    garment = torch.zeros(1, 4, 6, dtype=torch.bool)
    garment[:, 1:3, 2:6] = True
    parts = quarters(garment.flatten(1), GridSize(4, 6))
    assert torch.equal(parts.sum(dim=1).bool(), garment.flatten(1))
    assert parts.sum(dim=2).tolist() == [[2, 2, 2, 2]]
    assert parts[0, 0].nonzero().flatten().tolist() == [8, 9]  # row 1, columns 2 and 3


@pytest.mark.parametrize(("share", "lowest", "chosen"), [(0.5, False, [1, 3]), (0.5, True, [0, 2]), (0.01, False, [1])])
def test_ranked_patches(share: float, lowest: bool, chosen: list[int]) -> None:
    """A share of the candidates, at least one; the patch that is no candidate never."""
    importance = torch.tensor([[0.1, 0.9, 0.2, 0.8, 5.0]])
    candidates = torch.tensor([[True, True, True, True, False]])
    found = ranked_patches(-importance if lowest else importance, candidates, share)
    assert found[0].nonzero().flatten().tolist() == chosen


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_shares_out_of_range(share: float) -> None:
    """Refused with the value."""
    with pytest.raises(ConfigError, match=r"The share of patches is .*above 0 and up to 1"):
        ranked_patches(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), share)


def test_the_middle_comes_first() -> None:
    """The prior knows the garment's place and no model."""
    garment = torch.tensor([[False, True, True, True, False]])
    assert central_importance(garment, GridSize(1, 5))[0].argmax() == 2


def test_chance_does_not_depend_on_the_batch() -> None:
    """Each sample has its own stream."""
    together = random_importance([3, 4], 7)
    assert torch.equal(together[1:], random_importance([4], 7))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("fill", ["white", "mean", "blur"])
def test_nothing_is_left_of_a_deleted_patch(fill: str) -> None:
    """The patch's pixels are replaced, and no others; white is white, and the mean is the garment's."""
    draw = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 12, 12, generator=draw)
    patches = torch.zeros(1, 9, dtype=torch.bool)
    patches[0, 4] = True  # second row, second column: pixels 4..7 x 4..7
    garment = torch.zeros(1, 12, 12, dtype=torch.bool)
    garment[:, :4, :4] = True
    changed = without_patches(picture, patches, GRID, fill=fill, garment=garment)
    difference = (changed != picture).any(dim=1)[0]
    assert difference[4:8, 4:8].all()
    assert difference.sum() == 16
    expected = {"white": torch.ones(3), "mean": picture[0, :, :4, :4].mean(dim=(1, 2))}
    if fill in expected:
        torch.testing.assert_close(changed[0, :, 5, 5], expected[fill])


def test_area_is_a_mean_change() -> None:
    """Of a curve that begins with nothing at 0: of a straight line to .6 the half."""
    values = torch.tensor([[0.1, 0.3, 0.6]])
    torch.testing.assert_close(curve_area([0.1, 0.3, 0.6], values), torch.tensor([0.3]))
