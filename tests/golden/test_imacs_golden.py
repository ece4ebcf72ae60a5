"""Golden file 09: IMACS for several penalties, and values that must not come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from i2am_train.metrics.attention import imacs

Golden = Callable[[str], dict[str, Any]]
PENALTIES = (1.0, 3.0, 5.0, 10.0)
ALIKE = {"rtol": 0.0, "atol": 1e-9}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def thresholded(values: Tensor, delta: float = 0.4) -> Tensor:
    return torch.where(values > delta, values, 0.0)


def pair(values: Any) -> Tensor:
    """A batch of two different samples, the golden one last."""
    return torch.stack([tensor(values).flip(0), tensor(values)])


def expected_of(content: dict[str, Any], start: str) -> Tensor:
    (values,) = (v for k, v in content["expected"].items() if k.startswith(start))
    return tensor([values[str(int(penalty))] for penalty in PENALTIES])


@pytest.mark.parametrize(("which", "start"), [("g", "imacs_g (paper"), ("r", "imacs_r (paper, default)")])
def test_imacs(golden: Golden, which: str, start: str) -> None:
    """Both directions, four penalties from one map."""
    content = golden("09")
    heat_map = thresholded(pair(content["inputs"][f"map_{which}"]))
    mask = pair(content["inputs"][f"mask_{which}"]).bool()
    scores = imacs(heat_map, mask, PENALTIES)
    torch.testing.assert_close(scores[:, 1], expected_of(content, start), **ALIKE)


def test_the_authors_epsilon_makes_no_difference_that_matters(golden: Golden) -> None:
    """Their 1e-8 in the denominators changes the score by less than 1e-8."""
    content = golden("09")
    heat_map = thresholded(pair(content["inputs"]["map_r"]))
    scores = imacs(heat_map, pair(content["inputs"]["mask_r"]).bool(), PENALTIES)[:, 1]
    authors = expected_of(content, "imacs_r_authors_code")
    torch.testing.assert_close(scores, authors, rtol=0.0, atol=1e-8)


def test_inverted_and_unthresholded_maps_score_otherwise(golden: Golden) -> None:
    """The function scores the map that it is given: neither thresholds nor inverts it."""
    content = golden("09")
    raw, mask = pair(content["inputs"]["map_g"]), pair(content["inputs"]["mask_g"]).bool()
    plain = imacs(raw, mask, PENALTIES)[:, 1]
    expected = expected_of(content, "imacs_g_without_threshold")
    torch.testing.assert_close(plain, expected, **ALIKE)
    inverted = imacs(thresholded(1 - raw), mask, PENALTIES)[:, 1]
    expected = expected_of(content, "imacs_g_inverted_map")
    torch.testing.assert_close(inverted, expected, **ALIKE)
    right = expected_of(content, "imacs_g (paper")
    assert (plain - right).abs().min() > 0.01
    assert (inverted - right).abs().min() > 0.01


def test_cloth_forcing_hides_the_penalty(golden: Golden) -> None:
    """A map multiplied by the mask has nothing outside, so that the penalty stops to matter."""
    content = golden("09")
    mask = pair(content["inputs"]["mask_r"]).bool()
    forced = pair(content["inputs"]["map_r"]) * mask
    low, high = forced.amin(dim=(1, 2), keepdim=True), forced.amax(dim=(1, 2), keepdim=True)
    scores = imacs(thresholded((forced - low) / (high - low)), mask, PENALTIES)[:, 1]
    expected = expected_of(content, "imacs_r_cloth_forcing")
    torch.testing.assert_close(scores, expected, rtol=0.0, atol=1e-7)


def test_imacs_is_affine_in_the_penalty(golden: Golden) -> None:
    """The slope is minus the mean outside (paper table 4 cannot come from fixed maps)."""
    content = golden("09")
    heat_map = thresholded(pair(content["inputs"]["map_g"]))
    mask = pair(content["inputs"]["mask_g"]).bool()
    one, three, five, ten = imacs(heat_map, mask, PENALTIES)[:, 1]
    inside, outside = content["expected"]["inside_outside_means_g"]
    for slope in ((three - one) / 2, (five - three) / 2, (ten - five) / 5):
        torch.testing.assert_close(slope, tensor(-outside), **ALIKE)
    torch.testing.assert_close(one + outside, tensor(inside), **ALIKE)
