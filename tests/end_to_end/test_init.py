"""From Stable Diffusion's files to a trained and judged try-on model on the command line, small and at true size."""

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from tests.support.trainings import curves

pytestmark = pytest.mark.long

AUTHORS = Path(__file__).parents[1] / "unit" / "test_models_single_file.py"
GIB = 2**20  # in the kilobytes of ru_maxrss
TRUE_SIZE = (512, 384)
MEMORY = 20
"""Most memory that a command at the true size may take, in GiB; DINOv2-g's forty layers are 5 of them."""


def i2am(words: Sequence[str], folder: Path, log: str = "log") -> tuple[str, float]:
    """Runs a command in a process of its own; its output, and its peak memory in GiB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (folder / log).open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "i2am_train", *words],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    assert process.returncode == 0, text
    return text, usage.ru_maxrss / GIB


def training(data: Path, size: tuple[int, int], sampling_steps: int = 1) -> list[str]:
    """Options of two steps at batch 1 with the paper's attention losses, and of sampling in few steps."""
    return [
        f"data.root={data}",
        f"data.height={size[0]}",
        f"data.width={size[1]}",
        "data.workers=0",
        f"sampling.steps={sampling_steps}",
        "attribution.time_groups=1",
        "evaluation.metrics=[ssim]",
        "evaluation.batch_size=1",
        "evaluation.samples=2",
    ]


TWO_STEPS = [
    "experiment=paper_refined",
    "optimization.steps=2",
    "optimization.global_batch=1",
    "optimization.precision=32-true",
    "optimization.condition_dropout=0.0",
    "optimization.trainable=cross_attention",
    "data.batch_size=1",
    "validation.samples=0",
    "trainer.accelerator=cpu",
    "trainer.progress_bar=false",
    "trainer.log_every_n_steps=1",
    "tracking.wandb=disabled",
    "tracking.tensorboard=false",
]


def make_data(root: Path, size: tuple[int, int]) -> Path:
    from i2am_train.data.synthetic import make_dataset
    from i2am_train.types import GridSize

    make_dataset(root, 2, 2, GridSize(*size), 0, workers=1, progress=False)
    return root


def assert_trained(before: Path, after: Path) -> None:
    """Cross-attention moved, everything else of the U-Net but the first convolution did not."""
    name = "unet/diffusion_pytorch_model.safetensors"
    old, new = load_file(before / name), load_file(after / name)
    moved = {key for key, value in new.items() if not torch.equal(value, old[key])}
    assert "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight" in moved
    assert all(".attn2." in key or key.startswith("conv_in.") for key in moved)


def losses(run: Path) -> list[dict[str, float]]:
    return [row for row in curves(run) if "loss/total" in row]


def test_from_files_to_scores(
    make_parts: Callable[..., Any], original_layout: Callable[..., Any], tmp_path: Path
) -> None:
    """init, train and evaluate as a user types them, from one file of Stable Diffusion; the paper's row is shown."""
    weights = original_layout(make_parts("unet"), make_parts("vae"))
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "sd.safetensors")
    make_parts("dinov2").save_pretrained(tmp_path / "dinov2")
    data = make_data(tmp_path / "data", (128, 64))
    words = ["unet=sd.safetensors", "encoder=dinov2", "output=model", "height=128", "width=64"]
    said, _ = i2am(["init", *words], tmp_path)
    assert "i2am train init=" in said
    options = training(data, (128, 64))
    said, _ = i2am(["train", "init=model", "output=run", *TWO_STEPS, *options], tmp_path)
    assert "Training 0.2 M of 3.9 M weights: U-Net 0.1 M, projector 0.1 M" in said
    assert "Table 2, refined_custom: FID 11.542" in said
    assert_trained(tmp_path / "model", tmp_path / "run" / "model")
    assert {"loss/denoising", "loss/dcml", "loss/tv", "loss/cwg"} <= losses(tmp_path / "run")[0].keys()
    said, _ = i2am(["evaluate", "checkpoint=run", "sampling.guidance=5", "device=cpu", *options], tmp_path)
    assert "0.8644" in said
    assert "2,032 test pairs" in said


def test_names_on_the_hub_from_its_cache(
    make_parts: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline, a VAE of its own and a CLIP model by name, without network, where the hub's cache has them."""

    def cached(name: str) -> Path:
        folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("1234567890" * 4)
        return folder / "snapshots" / ("1234567890" * 4)

    make_parts("unet").save_pretrained(cached("someone/sd") / "unet")
    make_parts("vae").save_pretrained(cached("someone/vae"))
    make_parts("clip").save_pretrained(cached("clip"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    words = ["unet=someone/sd", "vae=someone/vae", "encoder=clip", "output=model"]
    said, _ = i2am(["init", *words, "height=128", "width=64"], tmp_path)
    assert "CLIPVisionModel (frozen)" in said
    for part, name in (("unet", "conv_out.weight"), ("vae", "decoder.conv_out.weight")):
        mine = load_file(tmp_path / "model" / part / "diffusion_pytorch_model.safetensors")
        assert torch.equal(mine[name], make_parts(part).state_dict()[name])


@pytest.fixture(scope="module")
def true_files(original_layout: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.5, its VAE, and the authors' model in every format, all of the true shape with random weights in float16.

    CLIP-L is whole; ``dinov2`` has DINOv2-g's width, patches and feed-forward, and one of its forty
    layers; the authors' checkpoint is tried with all of them.
    """
    root = tmp_path_factory.mktemp("true")
    torch.manual_seed(0)
    write_stable_diffusion(root, original_layout)
    write_dinov2(root / "dinov2", layers=1)
    write_clip(root / "clip")
    with torch.device("meta"):
        theirs = runpy.run_path(str(AUTHORS))["TheirModel"](
            (320, 640, 1280, 1280), 768, 1536, 1037, (128, 256, 512, 512)
        ).state_dict()
    filled = {n: 0.02 * torch.randn(v.shape, dtype=torch.float16) for n, v in theirs.items()}
    torch.save({"state_dict": filled}, root / "custom.ckpt")
    make_data(root / "data", TRUE_SIZE)
    return root


def write_stable_diffusion(root: Path, original_layout: Callable[..., Any]) -> None:
    """One U-Net and VAE as a folder of diffusers, as both kinds of single file, and the VAE alone (StableVITON's)."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half()
    levels = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    ).half()
    unet.save_pretrained(root / "sd" / "unet")
    vae.save_pretrained(root / "sd" / "vae")
    weights = {n: value.contiguous() for n, value in original_layout(unet, vae).items()}
    save_file(weights, root / "sd.safetensors")
    torch.save({"state_dict": weights}, root / "sd.ckpt")
    alone = original_layout(vae=vae, vae_prefix="")
    torch.save({"state_dict": alone, "epoch": 1}, root / "vae.ckpt")


def write_dinov2(folder: Path, layers: int) -> None:
    """DINOv2-g, or a piece of it."""
    config = Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=24,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=True,
    )
    Dinov2Model(config).half().save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """CLIP ViT-L/14 with its text model, as the hub has it."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    text |= {"num_attention_heads": 12}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    CLIPModel(clip).half().save_pretrained(folder)


def init_true_size(root: Path, output: str, *words: str) -> str:
    """``i2am init`` within the memory; what it said."""
    said, peak = i2am(["init", *words, f"output={output}"], root, f"{output}.log")
    print(f"\n{' '.join(words)}: peak memory {peak:.1f} GiB\n{said}")
    assert peak < MEMORY
    assert "latents 64x48" in said
    assert "37x28 patches" in said
    assert "U-Net 859.5 M" in said
    return said


def train_and_sample(root: Path, model: str) -> None:
    """Two steps with attention losses and two samples of two steps, each within the memory; clears both away."""
    options = training(root / "data", TRUE_SIZE, sampling_steps=2)
    run, images = f"{model}-run", f"{model}-images"
    words = ["train", f"init={model}", *TWO_STEPS, *options, f"output={run}"]
    said, peak = i2am(words, root, "train.log")
    print(f"{model}, two steps: peak memory {peak:.1f} GiB\n{said}\n{losses(root / run)}")
    assert peak < MEMORY
    assert len(losses(root / run)) == 2
    assert {"loss/dcml", "loss/tv", "loss/cwg"} <= losses(root / run)[0].keys()
    assert_trained(root / model, root / run / "model")
    words = ["evaluate", f"checkpoint={run}", "sampling.guidance=5", "device=cpu", *options]
    said, peak = i2am([*words, f"output={images}"], root, "evaluate.log")
    print(f"{model}, two samples of two steps: peak memory {peak:.1f} GiB\n{said}")
    assert peak < MEMORY
    assert json.loads((root / images / "results.json").read_text())["samples"] == 2
    for folder in (model, run, images):
        shutil.rmtree(root / folder)


def weight_digests(model: Path) -> dict[str, str]:
    """SHA-256 of each weight file of a model."""
    return {
        str(file.relative_to(model)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(model.rglob("*.safetensors"))
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_true_size_from_stable_diffusion(true_files: Path) -> None:
    """SD1.5 from a folder and both kinds of files, its VAE from a file of its own, with DINOv2: the same model to the
    bit, so the training from one is the training from each; two steps and a sample of it."""
    formats = {"folder": ["unet=sd"], "ckpt": ["unet=sd.ckpt"], "safetensors": ["unet=sd.safetensors", "vae=vae.ckpt"]}
    digests = {}
    for name, words in formats.items():
        init_true_size(true_files, name, *words, "encoder=dinov2")
        digests[name] = weight_digests(true_files / name)
        if name != "safetensors":
            shutil.rmtree(true_files / name)
    assert len(digests["folder"]) == 4
    assert digests["folder"] == digests["ckpt"] == digests["safetensors"]
    unet = true_files / "safetensors" / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(unet, "pt") as weights:
        assert weights.get_slice("conv_in.weight").get_shape() == [320, 12, 3, 3]
    train_and_sample(true_files, "safetensors")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_true_size_from_the_authors_checkpoint(true_files: Path) -> None:
    """Their U-Net, projector, null tokens and VAE, with the whole of DINOv2-g; two steps and a sample."""
    write_dinov2(true_files / "giant", layers=40)
    said = init_true_size(true_files, "custom", "custom=custom.ckpt", "encoder=giant")
    assert "Dinov2Model (frozen) 1,136.5 M" in said
    (report,) = json.loads((true_files / "custom.keys.json").read_text())
    assert len(report["mapped"]) > 700
    train_and_sample(true_files, "custom")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_true_size_with_clip(true_files: Path) -> None:
    """SD1.5 with the whole of CLIP ViT-L/14 as the reference encoder; two steps and a sample."""
    said = init_true_size(true_files, "with-clip", "unet=sd", "encoder=clip")
    assert "CLIPVisionModel (frozen) 30" in said
    train_and_sample(true_files, "with-clip")
