"""From Stable Diffusion's files to a trained and judged try-on model on the command line, small and at true size."""

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
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

AUTHORS = Path(__file__).parents[1] / "unit" / "test_models_authors_layout.py"
GIB = 2**20  # in the kilobytes of ru_maxrss


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


def training(data: Path, size: tuple[int, int]) -> list[str]:
    """Options of two steps at batch 1 with the paper's attention losses, and of sampling in one step."""
    return [
        f"data.root={data}",
        f"data.height={size[0]}",
        f"data.width={size[1]}",
        "data.workers=0",
        "sampling.steps=1",
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
    from i2am_train.datasets.synthetic import make_dataset
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
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    found = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    return [
        {name: float(value) for name, value in row.items() if name.startswith("loss/")}
        for row in found
        if row.get("loss/total")
    ]


def test_from_files_to_scores(
    make_parts: Callable[..., Any], original_layout: Callable[..., Any], tmp_path: Path
) -> None:
    """init, train and evaluate as a user types them, from one file of Stable Diffusion; the paper's row is shown."""
    weights = original_layout(make_parts("unet"), make_parts("vae"))
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, tmp_path / "sd.safetensors"
    )
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
    assert {"loss/denoising", "loss/dcml", "loss/tv", "loss/cwg"} <= losses(tmp_path / "run")[
        0
    ].keys()
    said, _ = i2am(
        ["evaluate", "checkpoint=run", "sampling.guidance=5", "device=cpu", *options], tmp_path
    )
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


def make_true_size(root: Path, original_layout: Callable[..., Any]) -> None:
    """SD1.5, its VAE, and the authors' model in every format, all of the true shape with random weights in float16.

    The encoder has DINOv2-g's width, patches and feed-forward, and one of its forty layers.
    """
    torch.manual_seed(0)
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
    encoder = Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=1,
        num_attention_heads=24,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=True,
    )
    Dinov2Model(encoder).save_pretrained(root / "dinov2")
    del unet, vae, weights, alone
    with torch.device("meta"):
        theirs = runpy.run_path(str(AUTHORS))["TheirModel"](
            (320, 640, 1280, 1280), 768, 1536, 1037, (128, 256, 512, 512)
        ).state_dict()
    filled = {n: 0.02 * torch.randn(v.shape, dtype=torch.float16) for n, v in theirs.items()}
    torch.save({"state_dict": filled}, root / "custom.ckpt")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_true_size(original_layout: Callable[..., Any], tmp_path: Path) -> None:
    """SD1.5 at 512x384 from each format; two training steps with attention losses and a sample, below 14 GiB each."""
    make_true_size(tmp_path, original_layout)
    formats = {
        "folder": ["unet=sd"],
        "ckpt": ["unet=sd.ckpt"],
        "custom": ["custom=custom.ckpt"],
        "safetensors": ["unet=sd.safetensors", "vae=vae.ckpt"],
    }
    digests = {}
    for name, words in formats.items():
        said, peak = i2am(["init", *words, "encoder=dinov2", "output=model"], tmp_path, name)
        print(f"\n{name}: peak memory {peak:.1f} GiB\n{said}")
        assert peak < 14
        assert "latents 64x48" in said
        assert "37x28 patches" in said
        assert "U-Net 859.5 M" in said
        weights = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        digests[name] = {key: float(value.double().sum()) for key, value in weights.items()}
        assert weights["conv_in.weight"].shape == (320, 12, 3, 3)
        del weights
        if name == "custom":
            reports = json.loads((tmp_path / "model.keys.json").read_text())
            assert len(reports[0]["mapped"]) > 700
        if name != "safetensors":
            shutil.rmtree(tmp_path / "model")
    assert digests["folder"] == digests["ckpt"] == digests["safetensors"]
    assert digests["custom"].keys() == digests["folder"].keys()
    for file in ("sd", "sd.ckpt", "custom.ckpt", "sd.safetensors"):
        path = tmp_path / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    options = training(make_data(tmp_path / "data", (512, 384)), (512, 384))
    said, peak = i2am(["train", "init=model", "output=run", *TWO_STEPS, *options], tmp_path)
    print(f"two steps: peak memory {peak:.1f} GiB\n{said}\n{losses(tmp_path / 'run')}")
    assert peak < 14
    assert len(losses(tmp_path / "run")) == 2
    assert_trained(tmp_path / "model", tmp_path / "run" / "model")
    words = ["evaluate", "checkpoint=run", "sampling.guidance=5", "device=cpu", *options]
    said, peak = i2am(words, tmp_path)
    print(f"two samples of one step: peak memory {peak:.1f} GiB\n{said}")
    assert peak < 14
