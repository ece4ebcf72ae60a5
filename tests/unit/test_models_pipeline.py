"""The pipeline and its export: the exported folder makes the images of the model, without i2am_train."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file

from i2am_train.attention.trace import trace
from i2am_train.errors import CheckpointError
from i2am_train.models.exported import export_pipeline
from i2am_train.models.lora import add_adapters, save_adapters
from i2am_train.models.pipeline import TryOnPipeline
from i2am_train.models.sampling import sample
from i2am_train.models.tryon import TryOnModel
from i2am_train.types import Direction, GridSize

pytestmark = pytest.mark.filterwarnings("default")  # diffusers' own deprecations

SEEDS = [3, 8]


@pytest.fixture(scope="module")
def exported(model: TryOnModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    export_pipeline(model, folder, dtype=torch.float32, card="# Card")
    return folder


def read(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(exported: Path) -> Any:
    return read(exported)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(2, 3, 64, 48, generator=generator) * 2 - 1 for name in ("garment", "agnostic", "densepose")
    }


def made(pipeline: Any, inputs: dict[str, Any], guidance: float = 2.0, steps: int = 3) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(
        **inputs, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
    ).images


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_images_are_those_of_the_model(
    model: TryOnModel, pipeline: Any, inputs: dict[str, Any], guidance: float
) -> None:
    """Bit by bit, with and without guidance."""
    ours = sample(model, **inputs, seeds=SEEDS, steps=3, guidance=guidance)
    assert made(pipeline, inputs, guidance).equal(ours)
    assert not ours[0].equal(ours[1])


def test_epsilon_and_class_token(make_small_model: Callable[..., Any], inputs: dict[str, Any], tmp_path: Path) -> None:
    """The other parametrisation, and a class token in front of the patches."""
    model = make_small_model(class_token=True, prediction_type="epsilon")
    export_pipeline(model, tmp_path / "model", dtype=torch.float32, card="")
    ours = sample(model, **inputs, seeds=SEEDS, steps=2, guidance=2.0)
    assert made(read(tmp_path / "model"), inputs, steps=2).equal(ours)


def test_another_scheduler(model: TryOnModel, exported: Path, inputs: dict[str, Any]) -> None:
    """One that is put in place of the model's own steps on its own grid, as the sampler of that name does."""
    pipeline = read(exported)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    ours = sample(model, **inputs, seeds=SEEDS, steps=3, guidance=2.0, sampler="dpmpp")
    assert made(pipeline, inputs).equal(ours)


SAMPLE_IT = {
    "DDIMParallelScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
}  # fmt: skip
"""Schedulers that know a schedule that ends in pure noise, which a model of v has."""
SAMPLE_EPSILON = SAMPLE_IT | {
    "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "SASolverScheduler",
}  # fmt: skip
ALL_SCHEDULERS = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and "Flax" not in name)
NEEDS_MORE = {"DPMSolverSDEScheduler": "torchsde", "CosineDPMSolverMultistepScheduler": "torchsde"}


def by_hand(pipeline: Any, scheduler: Any, inputs: dict[str, Any], steps: int) -> Any:
    """The loop of any pipeline of diffusers with guidance 2, one sample at a time of its batch of networks."""
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    noise = [torch.randn(1, 4, *pipeline.latent_size, generator=one) for one in generators]
    latents = torch.cat(noise) * scheduler.init_noise_sigma
    tokens = pipeline._tokens(inputs["garment"])
    nothing = pipeline.projector.null_tokens.expand_as(tokens)
    beside = [pipeline._latents(inputs[name]) for name in ("agnostic", "densepose")]
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generators
    for timestep in scheduler.timesteps:
        scaled = torch.cat([scheduler.scale_model_input(latents, timestep), *beside], dim=1)
        without, within = (pipeline.unet(scaled, timestep, context).sample for context in (nothing, tokens))
        prediction = without + 2 * (within - without)
        latents = scheduler.step(prediction, timestep, latents, **options)[0]
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("name", ALL_SCHEDULERS)
def test_every_scheduler_is_right_or_refused(
    name: str, kind: str, pipelines: dict[str, Any], inputs: dict[str, Any]
) -> None:
    """Scaled inputs and noise, fractional timesteps, evaluations twice, noise of each step's own: by a loop by hand."""
    if name in NEEDS_MORE:
        pytest.skip(f"made only with {NEEDS_MORE[name]}, which is not installed")
    pipeline = pipelines[kind]
    own = pipeline.scheduler
    accepted = name == "DDIMScheduler" or name in (SAMPLE_IT if kind[0] == "v" else SAMPLE_EPSILON)
    try:
        scheduler = getattr(diffusers.schedulers, name).from_config(own.config)
    except (TypeError, ValueError):  # it cannot be made of the model's options at all
        assert not accepted
        return
    pipeline.scheduler = scheduler
    try:
        if not accepted:
            with pytest.raises(ValueError, match=r"from_config\(pipeline.scheduler.config\)"):
                made(pipeline, inputs)
        elif name != "DDIMScheduler":
            found = made(pipeline, inputs, steps=4)
            with torch.no_grad():
                expected = by_hand(pipeline, pipeline.scheduler, inputs, 4)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
            assert expected.std() > 0.05
    finally:
        pipeline.scheduler = own


@pytest.fixture(scope="module")
def pipelines(
    pipeline: Any, make_small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A model of v, and one of epsilon, as exported pipelines."""
    folder = tmp_path_factory.mktemp("epsilon") / "model"
    export_pipeline(make_small_model(prediction_type="epsilon"), folder, dtype=torch.float32, card="")
    return {"v_prediction": pipeline, "epsilon": read(folder)}


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "for prediction_type='epsilon'.*trained with 'v_prediction'"),
        (EulerDiscreteScheduler(prediction_type="v_prediction"), "has other noise levels"),
        (DDIMScheduler(prediction_type="v_prediction"), "has other noise levels"),
    ],
)
def test_a_scheduler_of_another_model_is_refused(
    exported: Path, inputs: dict[str, Any], scheduler: Any, message: str
) -> None:
    """Also where the pipeline is read with it: what the model was trained with is in its index."""
    pipeline = DiffusionPipeline.from_pretrained(
        str(exported), custom_pipeline=str(exported), trust_remote_code=True, scheduler=scheduler
    )
    with pytest.raises(ValueError, match=message):
        made(pipeline, inputs)


@pytest.mark.parametrize("options", [{"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}])
def test_options_of_a_scheduler_are_obeyed(exported: Path, inputs: dict[str, Any], options: dict[str, Any]) -> None:
    """Fractional timesteps of Euler's, and DDIM on diffusers' own grid."""
    pipeline = read(exported)
    kind = EulerDiscreteScheduler if "use_karras_sigmas" in options else DDIMScheduler
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    found = made(pipeline, inputs, steps=4)
    with torch.no_grad():
        expected = by_hand(pipeline, pipeline.scheduler, inputs, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_maps_are_those_of_the_model(model: TryOnModel, pipeline: Any, inputs: dict[str, Any], guidance: float) -> None:
    """``trace(pipeline)`` needs no recipe, changes no image and sees the conditional rows."""
    with trace(model) as ours:
        sample(model, **inputs, seeds=SEEDS, steps=3, guidance=guidance)
    with trace(pipeline) as theirs:
        images = made(pipeline, inputs, guidance)
    assert images.equal(made(pipeline, inputs, guidance))
    for direction in Direction:
        maps = [one.maps().unified(direction, size=GridSize(64, 48)).values for one in (ours, theirs)]
        assert maps[0].equal(maps[1])


def test_the_package_s_classes_read_the_folder(model: TryOnModel, exported: Path, inputs: dict[str, Any]) -> None:
    """The model's class and the pipeline's give the same images."""
    ours = sample(model, **inputs, seeds=SEEDS, steps=2, guidance=2.0)
    again = TryOnModel.from_pretrained(exported)
    assert sample(again, **inputs, seeds=SEEDS, steps=2, guidance=2.0).equal(ours)
    pipeline = TryOnPipeline.from_pretrained(str(exported), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert made(pipeline, inputs, steps=2).equal(ours)


def test_the_folder_needs_no_i2am_train(exported: Path) -> None:
    """In a process that cannot import the package it makes pictures of pictures."""
    program = f"""
import sys
sys.modules["i2am_train"] = None
from PIL import Image
from diffusers import DiffusionPipeline
name = {str(exported)!r}
pipeline = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)
grey = Image.new("RGB", (60, 90), (90, 120, 150))
images = pipeline(grey, [grey], grey, num_inference_steps=2).images
print(len(images), images[0].size)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1 (48, 64)", done.stderr


def test_adapters_go_on_the_pipeline(
    make_small_model: Callable[..., Any], exported: Path, inputs: dict[str, Any], tmp_path: Path
) -> None:
    """``load_lora_weights`` reads what a training of adapters leaves in lora/."""
    adapted = make_small_model()
    add_adapters(adapted.unet, rank=2, alpha=2)
    for name, weight in adapted.unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.5)
    save_adapters(adapted.unet, tmp_path)
    pipeline = read(exported)
    before = made(pipeline, inputs)
    pipeline.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    after = made(pipeline, inputs)
    ours = sample(adapted, **inputs, seeds=SEEDS, steps=3, guidance=2.0)
    assert (after - ours).abs().max() < 1e-2 * (after - before).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_the_weights(model: TryOnModel, dtype: torch.dtype, tmp_path: Path) -> None:
    """All weights are stored in the type asked for."""
    export_pipeline(model, tmp_path / "model", dtype=dtype, card="")
    files = list((tmp_path / "model").rglob("*.safetensors"))
    assert len(files) == 4
    assert {value.dtype for file in files for value in load_file(file).values()} == {dtype}
    TryOnModel.from_pretrained(tmp_path / "model")


def test_a_folder_in_use_is_left_alone(model: TryOnModel, tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_pipeline(model, tmp_path, dtype=torch.float32, card="")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_pictures_must_be_as_many(pipeline: Any, inputs: dict[str, Any]) -> None:
    """The error says how many of each there are."""
    with pytest.raises(ValueError, match="1, 2, 2 pictures of garment, agnostic and densepose"):
        pipeline(inputs["garment"][:1], inputs["agnostic"], inputs["densepose"])
