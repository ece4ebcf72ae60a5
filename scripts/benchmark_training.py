"""What a training step costs: images per second and peak memory, ours in its forms and two rivals, in one run.

- ``baseline``: denoising loss, frozen encoders run in every step. ``refined``: with the attention losses.
- ``baseline_cached``, ``refined_cached``: from `i2am data cache`; the encoders are not on the GPU.
- ``baseline_cached_compiled``: with torch.compile; left out, with the reason, where there is no compiler.
- ``authors``: the rival with the habits of the authors' code, written here for comparison: VAE and image encoder are
  moved to the GPU and back in every step, float16 autocast with a loss scale, the refined layer's softmax written out.
- ``diffusers``: diffusers' usual loop (its text_to_image example): frozen networks in half precision on the GPU,
  autocast, clipping, AdamW; denoising loss only.

All take steps of the same networks with random weights, in turn, so that a busy machine slows all alike; ratios are
medians over steps of times in the same round. On a CPU all compute in float32: moving networks costs nothing there,
and the rivals' other habits little, so their ratios mean something on a GPU only. Peak memory is the allocator's on
a GPU; on a CPU it is that of a fresh process per variant. ``input`` is what the loaders give with ``--workers``,
against what the fastest variant consumes. ``true`` is SD1.5 at 512x384 with DINOv2-g/14 at 518x392 and AdamW.

    python scripts/benchmark_training.py --shape small
    python scripts/benchmark_training.py --shape true --device cuda --batch 16
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from process_memory import printed_by, resident
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from i2am_train.attention import ScoreTap
from i2am_train.attention.compiled import guard_hooks
from i2am_train.config.objective import ObjectiveConfig
from i2am_train.data.cache import ENCODED, LatentCache
from i2am_train.data.dataset import CachedDataset, TryOnDataset
from i2am_train.data.synthetic import make_dataset
from i2am_train.losses.attention import attention_on_grids
from i2am_train.losses.objective import Objective, make_objective
from i2am_train.models.architecture import build_model
from i2am_train.models.projector import ReferenceProjector
from i2am_train.models.tryon import TryOnConfig, TryOnModel
from i2am_train.ops.grids import mask_on_grid
from i2am_train.reporting.table import markdown_lines
from i2am_train.training.encode_dataset import make_cache
from i2am_train.training.step import Draws, draw, encode_pictures, step_losses
from i2am_train.types import GridSize, Pairing, Split

SIZES = {"small": GridSize(128, 96), "true": GridSize(512, 384)}
BATCHES = {"small": 4, "true": 8}
SAMPLES = {"small": 64, "true": 32}
"""Of the dataset that the loaders read."""
AIMS = {
    "refined / baseline time": ("refined", "baseline", "at most 1.05"),
    "refined / baseline time, cached": ("refined_cached", "baseline_cached", "at most 1.05"),
    "uncached / cached time, baseline": ("baseline", "baseline_cached", ""),
    "uncached / cached time, refined": ("refined", "refined_cached", ""),
    "eager / compiled time": ("baseline_cached", "baseline_cached_compiled", ""),
    "authors / refined time": ("authors", "refined", ""),
    "authors / refined_cached time": ("authors", "refined_cached", "at least 2 on a GPU"),
    "diffusers / baseline time": ("diffusers", "baseline", ""),
    "diffusers / baseline_cached time": ("diffusers", "baseline_cached", "at least 1.2 on a GPU"),
}
"""Ratios: measured, against, what is aimed at."""
LAYER = 2
VARIANTS = (
    "baseline", "refined", "baseline_cached", "refined_cached", "baseline_cached_compiled", "authors", "diffusers",
)  # fmt: skip


def true_model() -> TryOnModel:
    """The paper's: SD1.5's U-Net with 12 channels, its VAE, DINOv2-g/14, three projector blocks."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import Dinov2Config, Dinov2Model

    size = SIZES["true"]
    unet = UNet2DConditionModel(
        sample_size=(64, 48), in_channels=12, cross_attention_dim=768,
        block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8,
    )  # fmt: skip
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths, layers_per_block=2, latent_channels=4, sample_size=512,
    )  # fmt: skip
    encoder = Dinov2Model(
        Dinov2Config(
            hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, image_size=518,
            patch_size=14, use_swiglu_ffn=True, use_mask_token=False,
        )
    )  # fmt: skip
    config = TryOnConfig(
        height=size.height, width=size.width, reference_height=518, reference_width=392, class_token=True
    )  # fmt: skip
    projector = ReferenceProjector(1536, 768, tokens=1037, depth=3)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return TryOnModel(config, unet, vae, encoder, projector, scheduler)


class WrittenOut:
    """The authors' way at the refined layer: the attention matrix of all heads, kept for the losses."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        """diffusers' interface of an attention processor."""
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        scores = (query @ key.transpose(1, 2) * attn.scale).softmax(dim=-1)
        self.scores = scores.unflatten(0, (-1, attn.heads)).mean(dim=1)
        mixed = attn.batch_to_head_dim(scores @ value)
        return attn.to_out[1](attn.to_out[0](mixed))


class Bench:
    """One set of networks and one optimizer, which all variants step in turn."""

    def __init__(self, shape: str, device: str, batch: int) -> None:
        torch.manual_seed(0)
        self.device, self.batch = torch.device(device), batch
        self.on_gpu = self.device.type == "cuda"
        with self.device:  # a GPU draws two billion weights in a second
            model = build_model(SIZES["small"]) if shape == "small" else true_model()
        self.model = model.to(self.device).train()
        self.frozen = (model.vae.eval(), model.reference_encoder.eval())
        for network in self.frozen:
            network.requires_grad_(False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)
        self.scaler = torch.amp.GradScaler(enabled=self.on_gpu)
        refined = ObjectiveConfig(layers=LAYER, terms={name: {"weight": 1e-3} for name in ("dcml", "tv", "cwg")})
        self.objectives = {"baseline": Objective(), "refined": make_objective(refined)}
        self.half: TryOnModel | None = None
        self.compiled: dict[Any, Any] = {}
        self.resize(batch)

    def resize(self, batch: int) -> None:
        """Inputs of another batch size."""
        self.batch = batch
        self.place_frozen(self.device)
        self.pictures = self._pictures()
        self.encoded = self._encoded()
        self.draws = Draws(*(values.to(self.device) for values in self._drawn()))

    def _pictures(self) -> dict[str, Any]:
        """Noise in the shape of a batch; garments cover the middle of the person."""
        height, width = self.model.image_size
        noise = torch.rand(4, self.batch, 3, height, width, device=self.device) * 2 - 1
        mask = torch.zeros(self.batch, height, width, dtype=torch.bool, device=self.device)
        mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
        names = (*ENCODED, "garment")
        return dict(zip(names, noise, strict=True)) | {"warped_garment_mask": mask}

    def _encoded(self) -> dict[str, Any]:
        return {"warped_garment_mask": self.pictures["warped_garment_mask"]} | encode_pictures(
            self.model, self.pictures
        )

    def _drawn(self) -> Draws:
        return draw(
            0, 0, list(range(self.batch)), latent=self.model.latent_size,
            timesteps=self.model.schedule.length, condition_dropout=0.2,
        )  # fmt: skip

    def autocast(self, dtype: torch.dtype) -> Any:
        """Half precision on a GPU, nothing on a CPU."""
        return torch.autocast("cuda", dtype) if self.on_gpu else contextlib.nullcontext()

    def place_frozen(self, device: torch.device | str) -> None:
        """Puts VAE and encoder where a variant has them between its steps."""
        for network in self.frozen:
            network.to(device)

    # -- variants --------------------------------------------------------------------------------------------------

    def prepare(self, variant: str) -> None:
        """What is there before a step of the variant and not part of it."""
        in_half = self.on_gpu and variant in ("baseline", "refined", "diffusers")
        if in_half and self.half is None:
            self.place_frozen(self.device)
            self.half = self.model.with_encoders(torch.bfloat16)
        elif not in_half:
            self.half = None
        parked = "cached" in variant or variant == "authors" or in_half
        self.place_frozen("cpu" if parked else self.device)
        if variant.endswith("compiled") and not self.compiled:
            guard_hooks()
            self.model.unet.compile_repeated_blocks(dynamic=False)
            blocks = (block for block in self.model.unet.modules() if block._compiled_call_impl)
            self.compiled = {block: block._compiled_call_impl for block in blocks}
        for block, compiled in self.compiled.items():
            block._compiled_call_impl = compiled if variant.endswith("compiled") else None

    def step(self, variant: str) -> None:
        """One step of a variant."""
        if variant == "authors":
            self.authors_step()
        elif variant == "diffusers":
            self.diffusers_step()
        else:
            self.our_step(variant.split("_")[0], cached="cached" in variant)

    def our_step(self, arm: str, *, cached: bool) -> None:
        """As `i2am train` does."""
        objective = self.objectives[arm]
        batch: Any = self.encoded if cached else self.pictures
        tap = ScoreTap(self.model, layers=[LAYER]) if objective.terms else None
        with tap or contextlib.nullcontext():
            with self.autocast(torch.bfloat16):
                total = step_losses(self.model, batch, self.draws, objective, tap, encoders=self.half)["total"]
            torch.autograd.backward(total)
        self._descend()

    def _descend(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def _written_out(self) -> Iterator[WrittenOut]:
        name = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
        layer, processor = self.model.unet.get_submodule(name), WrittenOut()
        usual = layer.processor
        layer.set_processor(processor)
        try:
            yield processor
        finally:
            layer.set_processor(usual)

    def authors_step(self) -> None:
        """Frozen networks to the device and back, float16, the attention matrix kept."""
        model, draws, pictures = self.model, self.draws, self.pictures
        with torch.no_grad(), self.autocast(torch.float16):
            model.vae.to(self.device)
            latents = [
                model.encode_latents(pictures[name], draws.posterior[:, position]).float()
                for position, name in enumerate(ENCODED)
            ]
            model.vae.to("cpu")
            model.reference_encoder.to(self.device)
            tokens = model.encode_garment(pictures["garment"])
            model.reference_encoder.to("cpu")
        noisy = model.schedule.noised(latents[0], draws.noise, draws.timesteps)
        target = model.schedule.target(latents[0], draws.noise, draws.timesteps)
        grid = GridSize(*(side // 4 for side in model.latent_size))
        with self._written_out() as attention, self.autocast(torch.float16):
            prediction = model(noisy, draws.timesteps, *latents[1:], tokens, draws.dropped)
            loss = F.mse_loss(prediction.float(), target)
        assert attention.scores is not None
        scores = attention.scores.float()[..., model.special_tokens :]
        attended = attention_on_grids(
            scores,
            mask_on_grid(pictures["warped_garment_mask"], grid),
            grid,
            model.reference_grid,
            conditioned=~draws.dropped,
        )
        total, _ = self.objectives["refined"]({LAYER: attended})
        torch.autograd.backward(self.scaler.scale(loss + total))
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def diffusers_step(self) -> None:
        """As in diffusers' training examples, with our conditions."""
        model, draws, pictures = self.model, self.draws, self.pictures
        encoders = self.half or model
        vae, encoder = encoders.vae, encoders.reference_encoder
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        with torch.no_grad():
            latents = [
                vae.encode(pictures[name].to(dtype)).latent_dist.sample() * vae.config.scaling_factor
                for name in ENCODED
            ]
            size = (model.config.reference_height, model.config.reference_width)
            garment = F.interpolate(pictures["garment"], size, mode="bilinear", antialias=True)
            tokens = encoder(pixel_values=garment.to(dtype)).last_hidden_state
        noise = torch.randn_like(latents[0])
        steps = torch.randint(0, model.schedule.length, (self.batch,), device=self.device)
        noisy = model.schedule.noised(latents[0], noise, steps)
        target = model.schedule.target(latents[0], noise, steps)
        with self.autocast(torch.bfloat16):
            prediction = model(noisy, steps, *latents[1:], tokens, draws.dropped)
            loss = F.mse_loss(prediction.float(), target.float())
        torch.autograd.backward(loss)
        self._descend()

    # -- measuring -------------------------------------------------------------------------------------------------

    def seconds(self, variant: str) -> float:
        """Wall time of a step."""
        self.prepare(variant)
        self._wait()
        start = time.perf_counter()
        self.step(variant)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def gpu_peak(self, variant: str) -> float:
        """Most memory that a step takes, networks and optimizer included, in MiB."""
        self.prepare(variant)
        torch.cuda.reset_peak_memory_stats()
        self.step(variant)
        self._wait()
        return torch.cuda.max_memory_allocated() / 2**20


def no_compiler(device: str) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler"
    if device == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "no Triton"
        if shutil.which("gcc") is None and shutil.which("clang") is None:
            return "no C compiler for Triton"
    return None


def peak_of_process(options: argparse.Namespace, variant: str) -> float:
    """Peak resident memory of a fresh process that takes two steps of one variant, in MiB."""
    words = ["--shape", options.shape, "--batch", str(options.batch), "--threads", str(options.threads)]
    return printed_by(__file__, [*words, "--peak", variant])


def print_peak(options: argparse.Namespace) -> None:
    """The other side of `peak_of_process`."""
    bench = Bench(options.shape, "cpu", options.batch)
    for _ in range(2):
        bench.seconds(options.peak)
    print(resident())


def loader_rates(options: argparse.Namespace, model: TryOnModel) -> dict[str, float]:
    """Samples per second of reading pictures, augmented pictures and a cache, after the workers' start."""
    size = SIZES[options.shape]
    with tempfile.TemporaryDirectory() as folder:
        root, count = Path(folder) / "data", SAMPLES[options.shape]
        make_dataset(root, count, 2, size, 0, workers=max(1, options.workers), progress=False)
        make_cache(model.eval(), root, Path(folder) / "cache", batch_size=options.batch)
        sets: dict[str, Any] = {
            "pictures": TryOnDataset(root, Split.TRAIN, Pairing.PAIRED, size),
            "augmented": TryOnDataset(root, Split.TRAIN, Pairing.PAIRED, size, augment=True),
            "cache": CachedDataset(LatentCache(Path(folder) / "cache"), root, Split.TRAIN),
        }
        return {name: loader_rate(data, options) for name, data in sets.items()}


def loader_rate(data: Any, options: argparse.Namespace) -> float:
    """Of the second of two passes over a dataset."""
    loader: DataLoader[Any] = DataLoader(
        data, batch_size=options.batch, num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )  # fmt: skip
    for _ in loader:
        pass
    start = time.perf_counter()
    count = sum(len(batch["index"]) for batch in loader)
    return round(count / (time.perf_counter() - start), 2)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers."""
    bench = Bench(options.shape, options.device, options.batch)
    skipped = {}
    variants = list(options.only)
    compiled = "baseline_cached_compiled"
    if compiled in variants and (reason := no_compiler(options.device)):
        variants.remove(compiled)
        skipped[compiled] = reason
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for variant in variants:
        say(f"{variant}: first step {bench.seconds(variant):.1f} s")  # warms up, and compiles
    for number in range(options.runs):
        for variant in variants if number % 2 else reversed(variants):
            times[variant].append(bench.seconds(variant))
        say(f"round {number + 1} of {options.runs}")
    say(f"ratios: {ratios(times)}")
    rows = {
        variant: {
            "seconds": round(statistics.median(seconds), 4),
            "images_per_second": round(options.batch / statistics.median(seconds), 2),
            "peak_mib": round(bench.gpu_peak(variant) if bench.on_gpu else peak_of_process(options, variant)),
        }
        for variant, seconds in times.items()
    }
    result: dict[str, Any] = {"variants": rows, "skipped": skipped, "ratios": ratios(times)}
    bench.prepare("baseline")
    rates = loader_rates(options, bench.model)
    fastest = {
        "pictures": max((r["images_per_second"] for n, r in rows.items() if "cached" not in n), default=0),
        "cache": max((r["images_per_second"] for n, r in rows.items() if "cached" in n), default=0),
    }  # fmt: skip
    fastest["augmented"] = fastest["pictures"]
    result["input"] = {
        name: {"samples_per_second": rate, "times_demand": round(rate / fastest[name], 2) if fastest[name] else None}
        for name, rate in rates.items()
    }
    return result


def say(text: str) -> None:
    """How far it is."""
    print(text, file=sys.stderr, flush=True)


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of the aims' ratios."""
    return {
        name: round(statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)), 3)
        for name, (one, other, _) in AIMS.items()
        if one in times and other in times
    }


def table(result: dict[str, Any]) -> str:
    """Variants, ratios and loaders."""
    variants = [
        (name, f"{row['seconds']:.3f}", f"{row['images_per_second']:.2f}", str(row["peak_mib"]))
        for name, row in result["variants"].items()
    ]
    skipped = [f"{name} left out: {reason}" for name, reason in result["skipped"].items()]
    ratios = [(name, f"{value:.3f}", str(AIMS[name][2])) for name, value in result["ratios"].items()]
    loaders = [
        (name, f"{row['samples_per_second']:.1f}", f"{row['times_demand'] or 0:.2f}")
        for name, row in result["input"].items()
    ]
    tables = (
        markdown_lines(("variant", "s/step", "images/s", "peak MiB"), variants, right=(1, 2, 3)),
        *skipped,
        markdown_lines(("ratio", "median", "aim"), ratios, right=(1,)),
        markdown_lines(("input", "samples/s", "x demand (aim: 3)"), loaders, right=(1, 2)),
    )
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="images per step; default 4 small, 8 true")
    parser.add_argument("--runs", type=int, default=7, help="timed steps per variant")
    parser.add_argument("--workers", type=int, default=2, help="processes of the loaders")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--peak", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch = options.batch or BATCHES[options.shape]
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options)
        return
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    about = {
        "shape": options.shape, "device": machine, "batch": options.batch, "runs": options.runs,
        "workers": options.workers, "torch": torch.__version__, "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    result = measure(options)
    print(table(result))
    print(json.dumps(about | result))


if __name__ == "__main__":
    main()
