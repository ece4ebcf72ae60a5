"""scripts/layer_effect.py: attention that is uniform in one layer, and how far pixels move by it."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from i2am_train.attention.trace import trace
from i2am_train.models.sampling import sample
from i2am_train.types import GridSize

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "layer_effect.py"))


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = SCRIPT["embedded_batch"](2, GridSize(64, 48))
    return made


def test_the_attention_of_that_layer_alone_is_uniform(model: Any, batch: Any) -> None:
    """Every generated patch looks at all reference tokens alike; the next layer does not."""
    given = {name: batch[name] for name in SCRIPT["CONDITIONS"]}
    with SCRIPT["uniform_attention"](model, 2), trace(model, matrix_layers=[2, 3]) as attention:
        sample(model, **given, seeds=[0, 1], steps=1, guidance=2.0)
    uniform, other = (attention.maps().scores(layer) for layer in (2, 3))
    assert uniform.std(dim=-1).max() < 1e-7
    assert other.std(dim=-1).max() > 1e-6
    with trace(model, matrix_layers=[2]) as attention:  # and it is itself again
        sample(model, **given, seeds=[0, 1], steps=1, guidance=2.0)
    assert attention.maps().scores(2).std(dim=-1).max() > 1e-6


def test_every_layer_has_a_number_per_sample(model: Any, batch: Any) -> None:
    effects = SCRIPT["layer_effects"](model, batch, steps=1, guidance=2.0)
    assert list(effects) == list(range(1, 10))
    assert all(len(values) == 2 and min(values) >= 0 for values in effects.values())


def test_change_is_a_share_of_the_range_inside_the_mask() -> None:
    """Black to white is 1, half of the range 1/2; what lies outside does not count."""
    first, second = -torch.ones(2, 3, 4, 5), -torch.ones(2, 3, 4, 5)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[:, 1:3, 1:3] = True
    second[0, :, 1:3, 1:3] = 1.0
    second[1, :, 1:3, 1:3] = 0.0
    second[:, :, 0] = 1.0
    assert SCRIPT["changes"](first, second, mask) == [1.0, 0.5]


def test_the_committed_result_is_as_the_documents_say() -> None:
    """Layer 2 moves pixels by less than a thousandth of their range, layers 5 and 9 by more than 30 and 80."""
    result = json.loads((ROOT / "data" / "results" / "layers.json").read_text())
    mean, largest = result["mean"], result["largest"]
    assert largest["2"] < 1e-3
    assert max(largest[n] for n in "1234") < 3e-3
    assert mean["5"] > 0.03
    assert mean["9"] > 0.08


@pytest.mark.slow
def test_layer_2_of_the_shipped_model_does_not_touch_the_picture() -> None:
    """Measured anew, with fewer samples and steps."""
    found = SCRIPT["measured"](samples=2, steps=4, guidance=2.0)["mean"]
    assert found[2] < 2e-3
    assert found[5] > 0.01
    assert found[9] > 0.03
