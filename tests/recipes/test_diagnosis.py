"""A diagnosis of other people's models: joint attention over two pictures, keys on each layer's own grid, and words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from i2am_train.config.evaluation import DiagnosisConfig
from i2am_train.doors import allow_named
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.evaluation.diagnosis import diagnosis, images_of, layer_heads
from i2am_train.evaluation.remaking import remake_of_picture
from i2am_train.models.loaders import loader_of
from i2am_train.models.traceable import Request, Source
from i2am_train.reporting.diagnosis import diagnosed
from i2am_train.types import GridSize
from tests.support.pipelines import tiny_catvton, tiny_ip_adapter

SIZE = GridSize(64, 64)


def request_of(reference: tuple[int, int] = SIZE, **changes: Any) -> Request:
    """A picture that is painted anew in its middle after a garment of many colours."""
    random = np.random.default_rng(0)
    image, garment = (random.integers(0, 256, (*size, 3), np.uint8) for size in (SIZE, reference))
    mask = np.zeros(SIZE, np.bool_)
    mask[8:56, 8:56] = True
    given = {"image": image, "mask": mask, "size": SIZE, "steps": 1, "guidance": 2.0, "seed": 0, "prompt": "a shirt"}
    return Request(reference=garment, **{**given, **changes})


@pytest.fixture(scope="module")
def catvton(tmp_path_factory: pytest.TempPathFactory) -> Source:
    base, adapter = tiny_catvton(tmp_path_factory.mktemp("catvton"))
    return Source(model="catvton", checkpoint=str(base), adapter=adapter)


STABLEVITON = Source(model="factory", factory="tests.support.stableviton_like:build", guided=False)


@pytest.mark.parametrize("kind", ["catvton", "stableviton"])
def test_models_that_are_not_trained(kind: str, request: pytest.FixtureRequest) -> None:
    """Every layer and head gets its figures, on grids of its own, and nothing is proposed."""
    allow_named([str(STABLEVITON.factory)])
    source = request.getfixturevalue("catvton") if kind == "catvton" else STABLEVITON
    model = loader_of(source.model).load(source)
    # Of CatVTON two layers, which have grids of their own.
    options = DiagnosisConfig(layers=[4, 9] if kind == "catvton" else None, heads=kind == "stableviton")
    heads = layer_heads(model.target, model.recipe, options)
    made: list[int] = []
    (row,) = diagnosis(remake_of_picture(model, request_of()), options, lambda: made.append(1))
    assert len(made) == images_of(heads, options)
    for layer in heads:
        assert 0 <= row[f"use/{layer}"] < 0.02
        assert 0 <= row[f"violations/{layer}"] <= 1
        assert 0 <= row[f"entropy/{layer}"] <= 1 + 1e-6
    assert sum("#" in key for key in row if key.startswith("use/")) == (18 if kind == "stableviton" else 0)
    found = diagnosed([row], list(heads), least_use=0.02)
    assert found["proposal"]["layers"] == []
    assert "not trained" in found["proposal"]["reason"]
    assert found["foretold"] == {}


def test_the_reference_lies_on_the_canvas(catvton: Source) -> None:
    """CatVTON pads a wide garment: what counts is inside the borders, and the picture is the one that was asked for."""
    model, asked = loader_of("catvton").load(catvton), request_of((40, 80))
    remade = remake_of_picture(model, asked)
    assert remade.reference.shape == (1, 3, *SIZE)
    assert (remade.reference[:, :, :16] == 1).all()
    assert not remade.garment[:, :16].any()
    assert remade.garment[:, 16:48].all()
    picture = remade.make(remade.reference)
    assert (picture[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8).tolist() == model.make(asked).tolist()
    with pytest.raises(ConfigError, match="no mask, or an empty one"):
        remake_of_picture(model, request_of(image=None, mask=None))


def test_a_reference_of_pooled_tokens(tmp_path: Path) -> None:
    """IP-Adapter's tokens have no place in the picture: refused before an image is made."""
    base, adapter = tiny_ip_adapter(tmp_path, "ip_adapter_plus")
    model = loader_of("ip_adapter_plus").load(Source(model="ip_adapter_plus", checkpoint=str(base), adapter=adapter))
    with pytest.raises(CaptureError, match="tokens without a place in the picture"):
        layer_heads(model.target, model.recipe, DiagnosisConfig())
