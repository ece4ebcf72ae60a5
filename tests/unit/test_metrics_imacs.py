"""IMACS: empty and full masks, refusals, and the average over a dataset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from i2am_train.errors import ConfigError, DataError
from i2am_train.metrics.imacs import imacs


@pytest.fixture
def maps() -> Tensor:
    return torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks() -> Tensor:
    inside = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(1)) > 0.5
    inside[2] = False
    return inside


def test_bounds_are_reached() -> None:
    """1 for a map that is its mask, -penalty for the opposite."""
    mask = torch.zeros(2, 4, 3, dtype=torch.bool)
    mask[:, 1:3, :2] = True
    assert imacs(mask.float(), mask, penalty=3.0).tolist() == [1.0, 1.0]
    assert imacs((~mask).float(), mask, penalty=3.0).tolist() == [-3.0, -3.0]


def test_an_empty_mask_has_no_score_and_a_full_one_no_outside(maps: Tensor) -> None:
    """NaN where the score is undefined; the mean of the map where there is no outside."""
    mask = torch.ones(4, 5, 3, dtype=torch.bool)
    mask[1] = False
    scores = imacs(maps, mask)
    assert scores.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(scores[0], maps[0].mean())


def test_several_penalties_equal_one_at_a_time(maps: Tensor, masks: Tensor) -> None:
    """One pass over the map gives every row."""
    rows = imacs(maps, masks, (0.0, 3.0, 10.0))
    assert rows.shape == (3, 4)
    for row, penalty in zip(rows, (0.0, 3.0, 10.0), strict=True):
        torch.testing.assert_close(row, imacs(maps, masks, penalty), equal_nan=True)


@pytest.mark.parametrize("scale", [255.0, -1.0, float("nan")])
def test_a_map_that_is_not_normalised_is_refused(maps: Tensor, masks: Tensor, scale: float) -> None:
    """A picture in bytes, a negative map and NaN are found before they give a number."""
    with pytest.raises(DataError, match=r"maps in \[0, 1\]"):
        imacs(maps * scale, masks)


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), ()])
def test_impossible_penalties_are_refused(maps: Tensor, masks: Tensor, penalty: float) -> None:
    """Negative, NaN and none at all."""
    with pytest.raises(ConfigError, match="at least 0"):
        imacs(maps, masks, penalty=penalty)
