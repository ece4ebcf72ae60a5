"""NaN and infinity are an error that says where, in whatever computes; in a score NaN means "no value" only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2am_train.config.evaluation import AttributionConfig, EvaluateConfig
from i2am_train.config.models import InitConfig, SamplingConfig
from i2am_train.config.training import TrainConfig
from i2am_train.data.cache import CacheLayout
from i2am_train.detection.detectors import _detections
from i2am_train.errors import CheckpointError, I2AMError, NotFiniteError
from i2am_train.evaluation.evaluator import EvaluationSettings, Evaluator
from i2am_train.evaluation.explaining import explain_batch, value_or_none
from i2am_train.evaluation.scoring import ImageSet, ScoringOptions, score_images
from i2am_train.metrics import features
from i2am_train.models.sampling import sample
from i2am_train.models.tryon import TryOnModel
from i2am_train.models.watch import Watch
from i2am_train.training.encode_dataset import make_cache
from i2am_train.types import GridSize
from tests.conftest import SMALL

ONE_STEP = SamplingConfig(steps=2, guidance=1.0)
SMALL_SETS = EvaluationSettings(sampling=ONE_STEP, attribution=AttributionConfig(layer=2), metrics=("ssim", "stlpips"))


@pytest.fixture(scope="session")
def batch(read_batch: Callable[[list[int]], Any]) -> Any:
    """Two samples."""
    return read_batch([0, 1])


def sampled(model: TryOnModel, batch: Any) -> torch.Tensor:
    pictures = (batch["garment"], batch["agnostic"], batch["densepose"])
    return sample(model, *pictures, seeds=[0, 1], steps=3, guidance=2.0, names=batch["name"])


def overflowing(layer: torch.nn.Module, call: int, row: int, value: float = float("nan")) -> None:
    """At its n-th call, the layer gives another value in one row."""
    calls = iter(range(1000))

    def spoil(_: Any, __: Any, output: Any) -> Any:
        if next(calls) == call:
            output = output.clone()
            output[row] = value
        return output

    layer.register_forward_hook(spoil)


def test_the_sampler_names_the_step_and_the_sample(make_small_model: Any, batch: Any) -> None:
    """What follows from the first fault is not blamed."""
    model = make_small_model()
    overflowing(model.unet.conv_out, call=1, row=3)  # the second half of four rows is conditional
    message = rf"Step 2 of 3 of sampling .timestep \d+.: the latents became .* for {batch['name'][1]}, .* in float32"
    with pytest.raises(NotFiniteError, match=message):
        sampled(model, batch)


@pytest.mark.parametrize(
    ("part", "layer", "message"),
    [
        ("vae", "encoder.conv_out", "The VAE's latents of the agnostic image"),
        ("vae", "decoder.conv_out", "The images that the VAE decodes"),
        ("projector", "output", "The reference encoder's tokens of the garment"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_other_networks(
    make_small_model: Any, batch: Any, part: str, layer: str, message: str, value: float
) -> None:
    """Infinity, too, which would be clamped to white."""
    model = make_small_model()
    overflowing(getattr(model, part).get_submodule(layer), call=0, row=0, value=value)
    with pytest.raises(NotFiniteError, match=rf"^{message} became .* for {batch['name'][0]}, "):
        sampled(model, batch)


def test_half_precision_gets_its_advice(make_small_model: Any, batch: Any) -> None:
    """Under autocast it is autocast's type that overflows."""
    model = make_small_model()
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(1e6)
    with torch.autocast("cpu", torch.float16), pytest.raises(NotFiniteError, match=r"65,504.*precision=32-true"):
        sampled(model, batch)


def test_validation_and_evaluation_stop(make_small_model: Any, batch: Any) -> None:
    """No row is written for what could not be scored."""
    model = make_small_model()
    evaluator = Evaluator(SMALL_SETS, torch.device("cpu"))
    overflowing(model.unet.conv_out, call=0, row=1)
    with pytest.raises(I2AMError, match=r"NaN|not finite|no number"):
        evaluator.update(model, batch)
    assert not evaluator.rows


def test_attention_that_is_no_number(make_small_model: Any, batch: Any) -> None:
    """One layer's keys overflow where the images do not: the maps alone would be wrong."""
    model = make_small_model()
    layer = model.unet.get_submodule("up_blocks.1.attentions.1.transformer_blocks.0.attn2")
    overflowing(layer.to_k, call=0, row=0)
    with pytest.raises(I2AMError, match=r"NaN|not finite|no number"):
        explain_batch(model, batch, ONE_STEP, AttributionConfig(layer=2))


def test_a_score_without_value_is_no_fault(make_small_model: Any, batch: Any) -> None:
    """An empty mask, no partner and no truth leave None in the row."""
    changed = dict(batch) | {
        "inpaint_mask": batch["inpaint_mask"] & torch.tensor([False, True])[:, None, None],
        "warped_garment_mask": torch.zeros_like(batch["warped_garment_mask"]),
        "correspondence": torch.full_like(batch["correspondence"], torch.nan),
        "paired": torch.tensor([True, False]),
    }
    evaluator = Evaluator(SMALL_SETS, torch.device("cpu"))
    evaluator.update(make_small_model(), changed)
    first, second = evaluator.rows.values()
    assert (first["imacs_g"], second["ssim"], first["correspondence_error"]) == (None, None, None)
    assert None not in (second["imacs_g"], first["ssim"])
    assert (value_or_none(float("nan")), value_or_none(0.0)) == (None, 0.0)


class _Broken(torch.nn.Module):
    """A network whose answers are no numbers."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, first: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.full((len(first), self.answers), torch.nan)


@pytest.mark.parametrize("metric", ["stlpips", "fd_efficientnet_lite0", "kd_efficientnet_lite0"])
def test_folders_are_not_scored_by_a_broken_network(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distance that is no number was left out of the results without a word."""
    table = features.PERCEPTUAL_NETWORKS if metric == "stlpips" else features.FEATURE_NETWORKS
    name = metric.removeprefix("fd_").removeprefix("kd_")
    known = table[name]
    features.loaded.cache_clear()
    monkeypatch.setattr(features, "check_network", lambda *_: None)
    monkeypatch.setitem(
        table,
        name,
        type(known)(
            **{f: getattr(known, f) for f in known.__slots__}
            | {"build": partial(_Broken, 1 if metric == "stlpips" else 3)}
        ),
    )  # type: ignore[index]
    images = ImageSet(
        names=("a", "b", "c"),
        size=GridSize(*SMALL),
        read=lambda position: torch.full((3, *SMALL), position, dtype=torch.uint8),
    )
    options = ScoringOptions(metrics=(metric,), device=torch.device("cpu"))
    try:
        with pytest.raises(
            NotFiniteError, match=r"The stlpips of a is nan|efficientnet_lite0 gives features that are NaN"
        ):
            score_images(images, images, options, paired=True)
    finally:
        features.loaded.cache_clear()


def test_a_cache_holds_numbers(make_small_model: Any, small_dataset: Path, tmp_path: Path) -> None:
    """NaN is refused, and so is what half precision does not hold; nothing is written."""
    model = make_small_model()
    overflowing(model.vae.quant_conv, call=0, row=2)
    with pytest.raises(NotFiniteError, match=r"person_mean of .* the encoders give NaN or infinity"):
        make_cache(model, small_dataset, tmp_path / "a", batch_size=4)
    model = make_small_model()
    overflowing(model.reference_encoder.layernorm, call=0, row=1, value=1e5)
    with pytest.raises(NotFiniteError, match=r"encoded_garment of .* too large for float16"):
        make_cache(model, small_dataset, tmp_path / "b", CacheLayout(dtype="float16"), batch_size=4)
    for folder in ("a", "b"):
        assert not list(tmp_path.glob(f"{folder}/*"))


def test_a_detector_s_answers_are_numbers() -> None:
    """A score of NaN exceeds no threshold: nothing was seen, it would seem."""
    found = {"boxes": torch.zeros(1, 4), "scores": torch.tensor([torch.nan]), "labels": torch.tensor([0])}
    with pytest.raises(NotFiniteError, match="gives scores that are NaN"):
        _detections(found, 0.5, str)


def test_nothing_that_was_watched() -> None:
    """Numbers pass, and so does watching nothing."""
    watch = Watch()
    watch.check()
    watch.see(torch.zeros(2, 3), "Something")
    watch.check()


# -- at loading ------------------------------------------------------------------------------------------------------


def _evaluate(checkpoint: Path, data: Path, output: Path) -> None:
    from i2am_train.workflows.evaluate import run

    config = EvaluateConfig(checkpoint=str(checkpoint), output=output, device="cpu", progress_bar=False)
    config.data.root, config.data.height, config.data.width = data, *SMALL
    run(config)


def _train(checkpoint: Path, data: Path, output: Path) -> None:
    from i2am_train.workflows.train import run

    config = TrainConfig(init=str(checkpoint), output=output)
    config.data.root, config.data.height, config.data.width = data, *SMALL
    run(config)


COMMANDS: dict[str, Callable[[Path, Path, Path], None]] = {"evaluate": _evaluate, "train": _train}


@pytest.mark.parametrize("command", COMMANDS)
def test_one_tensor_of_nan_in_a_checkpoint(
    command: str, small_checkpoint: Path, small_dataset: Path, tmp_path: Path
) -> None:
    """Refused at loading, by its name, and before anything is made."""
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q.weight"
    weights[name].fill_(torch.nan)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"not finite numbers .{name}."):
        COMMANDS[command](folder, small_dataset, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_conversions_do_not_overflow(make_small_model: Any, small_checkpoint: Path, tmp_path: Path) -> None:
    """What float16 cannot hold is refused when it is written, with nothing left behind."""
    from i2am_train.models.exported import export_pipeline

    model = make_small_model()
    with torch.no_grad():
        model.unet.conv_out.bias[0] = 1e6
    with pytest.raises(CheckpointError, match=r"'unet in float16' .*conv_out.bias"):
        export_pipeline(model, tmp_path / "exported", dtype=torch.float16, card="")
    with pytest.raises(CheckpointError, match=r"'unet in float16' .*conv_out.bias"):
        model.save_pretrained(tmp_path / "half", half=True)
    assert not list(tmp_path.iterdir())


def test_single_files_are_numbers(make_parts: Any, original_layout: Any, tmp_path: Path) -> None:
    """Under the file's own names, and only where the network uses them."""
    from i2am_train.models.assembly import assemble

    weights = original_layout(make_parts("unet"), make_parts("vae"))
    weights = {name: value.contiguous() for name, value in weights.items()}
    make_parts("dinov2").save_pretrained(tmp_path / "encoder")
    key = "model.diffusion_model.out.2.bias"
    for value, message in (
        (torch.full((4,), torch.inf), rf"not finite numbers .{key}."),
        (torch.ones(4, dtype=torch.int64), rf"hold whole numbers .*{key}"),
    ):
        save_file({**weights, key: value, "model_ema.decay": value.clone()}, tmp_path / "a.safetensors")
        config = InitConfig(
            unet=str(tmp_path / "a.safetensors"), encoder=str(tmp_path / "encoder"),
            output=tmp_path / "m", height=128, width=64,
        )  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            assemble(config)
    save_file({**weights, "model_ema.decay": value * 0}, tmp_path / "a.safetensors")
    assemble(config)
