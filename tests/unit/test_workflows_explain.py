"""What `i2am explain` finds by itself: patches that are drawn when the user names none, and figures of faithfulness."""

from pathlib import Path

import pytest
import torch

from i2am_train.config.explanation import ExplainConfig
from i2am_train.config.options import plain
from i2am_train.files import write_json
from i2am_train.ops.grids import PATCHES_SHOWN, spread_patches
from i2am_train.types import GridSize
from i2am_train.workflows.explain import known_causes


def test_patches_start_in_the_middle_and_lie_far_from_each_other():
    mask = torch.zeros(9, 7, dtype=torch.bool)
    mask[2:7, 1:6] = True  # five by five cells around (4, 3)
    middle, *corners, _ = spread_patches(mask.flatten(), GridSize(9, 7))
    assert middle == (4, 3)
    assert sorted(corners) == [(2, 1), (2, 5), (6, 1), (6, 5)]


def test_patches_are_masked_cells_each_once_and_all_count_without_a_mask():
    few = torch.tensor([[False, True, False], [True, False, False]])
    assert sorted(spread_patches(few.flatten(), GridSize(2, 3))) == [(0, 1), (1, 0)]
    none = torch.zeros(12, dtype=torch.bool)
    anywhere = spread_patches(none, GridSize(4, 3))
    assert len(set(anywhere)) == PATCHES_SHOWN


@pytest.mark.parametrize(
    ("changes", "is_said"),
    [
        ({}, True),
        ({"sample": 1}, False),
        ({"split": "train"}, False),
        ({"pairing": "unpaired"}, False),
        ({"sampling": {"steps": 3}}, False),
        ({"data": {"height": 64}}, False),
    ],
)
def test_known_causes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, is_said: bool) -> None:  # type: ignore[type-arg]
    """Figures of these very samples are said: of the same data, sampling and size, and of no others."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "tiny-faithful"
    settings = plain(ExplainConfig(checkpoint="tiny", attribution={"time_groups": 2}))
    row = {"index": 0, "name": "a", "use/up_blocks.1.attentions.1": 0.0004, "deletion/score": -0.01}
    write_json(folder / "faithfulness.json", {"settings": settings, "samples": [row]})
    write_json(folder / "manifest.json", {"data": "d0"})
    config = ExplainConfig(**{"checkpoint": "tiny", "attribution": {"layer": 2, "time_groups": 2}, **changes})
    found = known_causes(config, {"tiny": "tiny"}, "d0")
    figures = "use of up_blocks.1.attentions.1 0.0004, deletion, highest minus lowest patches -0.0100"
    expected = f"tiny, sample 0: {figures} ({folder})"
    assert found == ({"Whether attention is a cause": expected} if is_said else {})
    assert known_causes(config, {"tiny": "tiny"}, "other data") == {}
