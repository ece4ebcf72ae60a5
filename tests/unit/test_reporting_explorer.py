"""reporting/explorer.py: what the page holds, how exactly, how large, and what it refuses."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord
from i2am_train.config.evaluation import AttributionConfig
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.evaluation.explanation import Explanation
from i2am_train.reporting import explorer
from i2am_train.reporting.explorer import explorer_data, explorer_page
from i2am_train.types import GridSize, LayerWeighting

SIZE = (24, 20)
STEPS = 5
REFERENCE = GridSize(3, 2)
GRIDS = (GridSize(4, 3), GridSize(4, 3), GridSize(8, 6))
HEADS = (2, 2, 3)
OPTIONS = AttributionConfig(layer=2, time_groups=2)


def make_explanation(steps: int = STEPS, matrices: bool = True, name: str = "50003_00") -> Explanation:
    """Of a sample with known correspondence."""
    torch.manual_seed(0)
    records = []
    for number, (grid, heads) in enumerate(zip(GRIDS, HEADS, strict=True)):
        logits = 2 * torch.randn(1, grid.tokens, REFERENCE.tokens)
        records.append(
            LayerRecord(
                f"up_blocks.1.attentions.{number}",
                grid,
                REFERENCE,
                torch.rand(1, steps, heads, grid.tokens).softmax(-1),
                torch.rand(1, steps, heads, REFERENCE.tokens).softmax(-1),
                True,
                logits.softmax(-1) if matrices else None,
                logits.softmax(-2) if matrices else None,
            )
        )
    timesteps = tuple(range(999, 999 - steps, -1))
    draw = np.random.default_rng(0)
    mask = np.zeros(SIZE, np.bool_)
    mask[5:17, 3:11] = True
    return Explanation(
        name=name,
        inputs={"person": name, "garment": name},
        index=3,
        paired=True,
        images={key: draw.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for key in ("generated", "garment")},
        masks={"inpaint": mask, "garment": mask[:, ::-1], "warped_garment": mask},
        correspondence=draw.random((*SIZE, 2), dtype=np.float32),
        maps=AttributionMaps(AttributionStore(tuple(records), timesteps)),
        layer="up_blocks.1.attentions.1",
        delta=0.4,
        weighting=LayerWeighting.PAPER,
        time_groups=2,
    )


def unpacked(packed: Mapping[str, str], tokens: int) -> NDArray[np.float64]:
    """The maps as the page reads them."""
    raw = {name: base64.b64decode(text) for name, text in packed.items()}
    units = np.frombuffer(raw["units"], "<u2").reshape(-1, tokens)
    low, step = (np.frombuffer(raw[name], "<f4")[:, None] for name in ("low", "step"))
    return low.astype(np.float64) + units * step.astype(np.float64)


def data_of(models: Sequence[str] = ("tiny",), **explanation: Any) -> dict[str, Any]:
    made = {name: [make_explanation(**explanation)] for name in models}
    return explorer_data(made, OPTIONS)


def test_maps_are_exact_to_half_a_step_of_16_bits() -> None:
    """Matrices come back within 1/131070 of each map's range, also columns; a constant exactly."""
    explanation = make_explanation()
    layer = explorer_data({"tiny": [explanation]}, OPTIONS)["captures"][0][0]
    maps = explanation.maps
    for name, expected in (("looks", maps.scores(2)[0]), ("feeds", maps.scores(2, over="generated")[0].T)):
        read = unpacked(layer["layers"][1][name], expected.shape[1])
        allowed = np.ptp(expected.numpy(), axis=1, keepdims=True) / (2 * 65535)
        assert (np.abs(read - expected.double().numpy()) <= allowed + 1e-8).all()
        assert np.abs(read - expected.double().numpy()).max() > 0
    constant = explorer._packed_maps(torch.full((2, 5), 0.125))
    assert (unpacked(constant, 5) == 0.125).all()


def test_time_groups_are_means_over_their_steps() -> None:
    """Two groups of 2 and 3 steps, every head on its own."""
    explanation = make_explanation()
    data = explorer_data({"tiny": [explanation]}, OPTIONS)
    assert [group["steps"] for group in data["groups"]] == [2, 3]
    assert data["groups"][1]["label"] == "step 2–4 (t 997 to 995)"
    record = explanation.maps.store.layers[2]
    expected = torch.stack([record.to_generated[0, :2].mean(0), record.to_generated[0, 2:].mean(0)])
    read = unpacked(data["captures"][0][0]["layers"][2]["generated"], record.generated_grid.tokens)
    np.testing.assert_allclose(read, expected.flatten(0, 1).numpy(), atol=1e-6)


def test_matrices_fill_what_the_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer of single patches always, then small before large; models share the room."""

    def kept(limit: int, *models: str) -> list[bool]:
        monkeypatch.setattr(explorer, "SIZE_LIMIT", limit)
        return [layer["matrix"] for layer in data_of(models)["layers"]]

    monkeypatch.setattr(explorer, "_PAGE_ALLOWANCE", 0)
    parts = data_of()
    sizes = [explorer._packed_size(record) for record in make_explanation().maps.store.layers]
    assert kept(10**7, "tiny") == [True, True, True]
    for part in parts["captures"][0][0]["layers"]:
        part.pop("looks"), part.pop("feeds")
    bare = explorer._length(parts["samples"]) + explorer._length(parts["captures"])
    assert kept(round(bare + sizes[1] + 8), "tiny") == [False, True, False]
    assert kept(round(bare + sizes[0] + sizes[1] + 8), "tiny") == [True, True, False]
    assert kept(round(bare + sizes[0] + sizes[1] + 8), "tiny", "refined") == [False, True, False]


def test_the_estimate_of_a_matrix_is_its_size() -> None:
    """What a layer is said to cost is what it costs, but for the padding of base64."""
    data = data_of()
    for record, layer in zip(make_explanation().maps.store.layers, data["captures"][0][0]["layers"], strict=True):
        length = explorer._length(layer["looks"]) + explorer._length(layer["feeds"])
        assert 0 <= length - explorer._packed_size(record) <= 6 * 3


def test_the_page_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with maps of single patches are named where not all have them."""
    assert "All layers have them here." in explorer_page(data_of(), {})
    data = data_of()
    data["layers"][2]["matrix"] = False
    assert "Layers that have them here: Layer 1, Layer 2;" in explorer_page(data, {})


def test_the_page_stands_alone() -> None:
    """Nothing in it points anywhere, and a name cannot break out of its place."""
    evil = "</script><script>alert(1)</script>"
    data = explorer_data({evil: [make_explanation(name=evil)]}, OPTIONS)
    page = explorer_page(data, {"Command": f"i2am explain {evil}"})
    assert "alert(1)</script>" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<script") == 2
    assert "default-src 'none'" in page


def test_captures_that_cannot_stand_side_by_side() -> None:
    """Other steps or layers are refused, as are captures without the matrices of patches."""
    models = {"a": [make_explanation()], "b": [make_explanation(steps=4)]}
    with pytest.raises(ConfigError, match="cannot show them side by side"):
        explorer_data(models, OPTIONS)
    with pytest.raises(CaptureError, match=r"score matrix of layer .* was not kept"):
        data_of(matrices=False)
    with pytest.raises(ConfigError, match="cannot be cut into 2 time groups"):
        data_of(steps=1)
